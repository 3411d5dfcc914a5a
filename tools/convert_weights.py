"""python tools/convert_weights.py SRC DST: `pgdist convert` for a checkout that is not installed."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
runpy.run_module("launch.convert", run_name="__main__", alter_sys=True)
