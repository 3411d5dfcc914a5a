# shellcheck shell=bash
# Sourced by the scripts beside it, from the repository's root: makes a virtual environment with the pinned packages
# and pgdist itself (editable). Needs Python 3.11 or newer and nothing else; does nothing when nothing has changed.

# Prints the first Python that is new enough; PYTHON=/path/to/python chooses one.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.11 python3.12 python3.13 python3.14 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
    if [ "$candidate" = "${PYTHON:-}" ]; then
      echo "error: PYTHON=$PYTHON is not a Python 3.11 or newer ($("$PYTHON" --version 2>&1))" >&2
      return 1
    fi
  done
  echo "error: pgdist needs Python 3.11 or newer, and found: $(python3 --version 2>&1 || true)." >&2
  echo "Install one (Debian and Ubuntu: apt-get install python3 python3-venv), or say where it is: PYTHON=/path/to/python3.11" >&2
  return 1
}

# What an environment is made from, word for word: when this changes, its packages are installed again.
_venv_recipe() {
  pwd
  cat requirements.lock setup.py
}

# ensure_venv DIRECTORY
ensure_venv() {
  local directory=$1 python
  local stamp=$directory/pgdist-recipe
  if [ -x "$directory/bin/python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(_venv_recipe)" ]; then
    return
  fi
  if [ -e "$directory" ] && [ ! -f "$directory/pyvenv.cfg" ]; then
    echo "error: $directory is in the way: it exists and is not a virtual environment. Move it." >&2
    return 1
  fi
  if ! "$directory/bin/python" -m pip --version >/dev/null 2>&1; then  # none yet, or broken off, or its Python is gone
    python=$(find_python) || return 1
    echo "Making $directory with $("$python" --version)" >&2
    if ! "$python" -m venv --clear "$directory"; then
      echo "error: $python could not make a virtual environment (Debian and Ubuntu: apt-get install python3-venv)" >&2
      return 1
    fi
  fi
  echo "Installing the pinned packages into $directory (minutes, the first time)" >&2
  rm -f "$stamp"
  "$directory/bin/python" -m pip install --quiet --disable-pip-version-check --no-input -r requirements.lock || return 1
  "$directory/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
    --no-deps --no-build-isolation --editable . || return 1
  _venv_recipe >"$stamp"
}
