#!/usr/bin/env bash
# Writes requirements.lock, and those of tests that need more, anew from setup.py, with the newest releases. Needs uv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# torch stands in neither: a resolver would add the CUDA packages that its Linux wheels name. What else torch needs is
# listed here, so that `pip install torch==...` finds it installed.
torch_needs=(filelock fsspec jinja2 networkx setuptools sympy typing-extensions)

command -v uv >/dev/null || { echo "error: this needs uv (pip install uv)" >&2; exit 1; }

compile() {  # compile COMMENT OUTPUT ARGUMENTS...
  local comment=$1 output=$2
  shift 2
  { echo "# $comment"; uv pip compile --quiet --universal --python-version 3.11 --upgrade \
      --no-header --no-annotate --no-emit-index-url --no-emit-find-links "$@"; } >"$output.new" || { rm "$output.new"; exit 1; }
  mv "$output.new" "$output"
}

compile "What the scripts in tools/ install, for every Python from 3.11 on. Made by tools/update_locks.sh." \
  requirements.lock setup.py --extra test
transformers=$(grep -o 'transformers==[0-9.]*' setup.py)
compile "On top of requirements.lock, for tests/parity; torch comes after it. Made by tools/update_locks.sh." \
  requirements-parity.lock --constraint requirements.lock - < <(printf '%s\n' "$transformers" "${torch_needs[@]}")
compile "On top of requirements.lock, for tests of buckets, hubs and the notebook. Made by tools/update_locks.sh." \
  requirements-optional.lock --constraint requirements.lock setup.py --extra test_optional
