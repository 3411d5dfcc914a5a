"""Runs commands as `python -m` would, in forks of one process that has imported everything already.

Importing JAX and its friends takes seconds, which a hundred small runs of a command cannot afford. The server
imports them once and starts nothing: it has no JAX backend and no second thread, so a fork of it is as good
as a fresh process. Each run has its own folder, standard streams, and a limit on its time.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """How a command ended: its exit code (minus a signal's number, if one killed it) and what it printed."""

    code: int
    out: str
    err: str


def environment() -> dict[str, str]:
    """The variables for a command that finds this checkout and one CPU device."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


class CommandServer:
    """A running server; `close()` ends it."""

    def __init__(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([sys.executable, __file__], env=environment(), text=True, **pipes)

    def run(
        self, module: str, arguments: Sequence[str], *, folder: Path, streams: Path, limit: int = 120
    ) -> Finished:
        """`python -m module arguments` in `folder`; killed by SIGALRM after `limit` seconds.

        streams: a folder for files with what is printed.
        """
        out, err = streams / "stdout", streams / "stderr"
        request = {"module": module, "arguments": list(arguments), "folder": str(folder), "limit": limit}
        request |= {"out": str(out), "err": str(err)}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        return Finished(code=code, out=out.read_text(), err=err.read_text())

    def close(self) -> None:
        """Ends the server, which leaves at the end of its standard input."""
        self._process.communicate(timeout=30)


def _serve() -> None:
    for module in ("launch.entry", "pgdist.finetune", "pgdist.inference", "pgdist.decode"):
        importlib.import_module(module)
    assert threading.active_count() == 1, threading.enumerate()
    gc.freeze()  # or the first collection in a fork would copy all of its memory
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(request)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(request: dict[str, Any]) -> NoReturn:
    """Becomes the command."""
    signal.alarm(request["limit"])
    os.chdir(request["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    sys.argv = [request["module"], *request["arguments"]]
    code = 1
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # taking the interpreter down in order costs more than most of these runs


if __name__ == "__main__":
    _serve()
