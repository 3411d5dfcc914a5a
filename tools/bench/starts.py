"""Starts a job of four processes again and again, each time to its health check and no further; counts flakes.

python tools/bench/starts.py [--starts=50]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = (
    "launch.submit --to=local --processes=4 --devices_per_process=2 --max_restarts=0 -- launch.env --check"
)


def main() -> None:
    """Prints how many starts went well, and how long they took; exits with 1 unless all did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--starts", type=int, default=50)
    seconds: list[float] = []
    failed = 0
    for number in range(starts := parser.parse_args().starts):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", *COMMAND.split()], cwd=ROOT, capture_output=True, text=True, timeout=600
        )
        seconds.append(time.perf_counter() - started)
        if done.returncode:
            failed += 1
            print(f"start {number}: code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    print(
        f"{starts - failed} of {starts} starts went well; seconds each: "
        f"{min(seconds):.1f} to {max(seconds):.1f}, median {statistics.median(seconds):.1f}"
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
