#!/usr/bin/env bash
# The quick tests: makes the virtual environment if there is none, then lint and all tests that are quick.
# Arguments go to pytest:  bash tools/run_tests.sh tests/launch -k help     bash tools/run_tests.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/venv.sh
source tools/venv.sh

venv=${PGDIST_VENV:-.venv}
ensure_venv "$venv"
"$venv/bin/python" -m ruff check --quiet .
exec "$venv/bin/python" -m pytest -m "not slow and not multiprocess and not parity" \
  --numprocesses=logical --maxprocesses=8 --dist=worksteal "$@"
