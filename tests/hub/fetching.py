"""A process that fetches one thing, as a command does: the libraries read much of their environment when imported."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_SECONDS = 100

_PROGRAM = """
import json, sys
from absl import logging
from pgdist.errors import UserError
{prelude}
from pgdist import hub
logging.set_verbosity(logging.INFO)
try:
    said = {{"path": str(hub.{call}), "jax": "jax" in sys.modules}}
except UserError as error:
    said = {{"error": type(error).__name__, "message": str(error)}}
print(json.dumps(said))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetched:
    """path: None where it failed.  message: of the error.  log: all of standard error."""

    path: Path | None
    error: str
    message: str
    log: str


def environment_for(folder: Path, url: str) -> dict[str, str]:
    """All caches in `folder`, no credentials of whoever runs the tests, and the server at `url` for both sites."""
    dropped = ("HF_", "HUGGING", "KAGGLE", "PGDIST_CACHE", "XDG_CACHE", "NO_PROXY", "HTTP_PROXY", "COV")
    own = {name: value for name, value in os.environ.items() if not name.upper().startswith(dropped)}
    return own | {
        "HOME": str(folder),
        "HF_ENDPOINT": url,
        "HF_HOME": str(folder / "hf"),
        "KAGGLEHUB_CACHE": str(folder / "kagglehub"),
        "PGDIST_CACHE": str(folder / "pgdist"),
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "HTTP_PROXY": url,
        "http_proxy": url,
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


def start_fetch(call: str, *, environment: Mapping[str, str], prelude: str = "") -> subprocess.Popen[str]:
    """call: as fetch_model('hf://...').  prelude: what the process does first."""
    program = _PROGRAM.format(call=call, prelude=prelude)
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish_fetch(process: subprocess.Popen[str]) -> Fetched:
    """Checks, too, that nothing but the result stood on standard output, and that JAX was not imported."""
    try:
        output, log = process.communicate(timeout=_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, log
    said = json.loads(output)
    assert not said.get("jax") and "Traceback" not in log
    path = Path(said["path"]) if "path" in said else None
    return Fetched(path=path, error=said.get("error", ""), message=said.get("message", ""), log=log)


def fetch(call: str, *, environment: Mapping[str, str], prelude: str = "") -> Fetched:
    """Starts it and waits for its end."""
    return finish_fetch(start_fetch(call, environment=environment, prelude=prelude))
