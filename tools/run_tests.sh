#!/usr/bin/env bash
# Lint and the quick tests, in a virtual environment that is made if there is none. With arguments, which go to
# pytest, no lint:  bash tools/run_tests.sh tests/launch -k help      bash tools/run_tests.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/venv.sh
source tools/venv.sh

venv=${PGDIST_VENV:-.venv}
ensure_venv "$venv"
[ $# -gt 0 ] || "$venv/bin/python" -m ruff check .
exec "$venv/bin/python" -m pytest -m "not slow and not multiprocess and not parity and not slurm and not ssh" \
  --numprocesses=logical --maxprocesses=8 --dist=worksteal "$@"
