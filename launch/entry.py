"""The way into and out of every command: its flags are parsed and its exit code is chosen here.

A user's mistake prints one message and no traceback; a bug prints its traceback. The codes are those of
`pgdist.errors`: schedulers decide by them whether to restart, so nothing else may end a process. In a job of
several processes a failing one leaves before JAX's shutdown barrier: waiting there makes all of them abort
with code 134, and the mistake of one looks like the loss of a machine.
"""

from __future__ import annotations

import faulthandler
import logging as python_logging
import multiprocessing
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import IO, NoReturn

from absl import app, flags, logging

from launch import command_line, help_text
from pgdist.errors import ConfigError, PeerLostError, Preempted, UserError

BUG = 1

_SECONDS_FOR_PEERS = 2.0  # that a failing process waits for others that fail as well

# What Gloo, NCCL and JAX's coordination service say when a process is gone.
_LOST_PEER = re.compile(
    r"Gloo .* failed|Connection (reset|closed|refused)|coordination service|heartbeat|remote process exited"
    r"|UNAVAILABLE|DEADLINE_EXCEEDED",
    re.IGNORECASE,
)


def run(main: Callable[..., None], *, name: str, usage: str, positional: str = "") -> NoReturn:
    """Parses the command line, calls `main`, and leaves the process with the code of what happened.

    name: the command's word, as in `pgdist train`.  usage: what `--help` says first; a docstring will do.
    positional: how `--help` writes the arguments that are no flags, such as "[IMAGE...]"; `main` is called
    with them.  Without it such arguments are a mistake, and `main` is called with none.
    """

    # An agent asks a process that hangs where it does.
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)

    def parse(argv: Sequence[str]) -> list[str]:
        if help_text.is_wanted(argv):
            print(help_text.render(flags.FLAGS, argv, name=name, usage=usage, positional=positional))
            sys.exit(0)
        arguments = command_line.parse(flags.FLAGS, argv)[1:]
        if arguments and not positional:
            raise ConfigError(f"unexpected argument {arguments[0]!r}; values are given as --flag=value")
        _log_what_is_ours()
        return arguments

    _leave(_exit_code(lambda: app.run(lambda arguments: main(*arguments), flags_parser=parse)))


def require(*names: str) -> None:
    """Raises ConfigError unless all these flags were given a value."""
    missing = [f"--{name}" for name in names if flags.FLAGS[name].value in (None, "")]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be given; see --help")


def simulate_devices(count: int) -> None:
    """Makes this process see `count` CPU devices and nothing else; before JAX first looks at its devices.

    Raises ConfigError for a count below 1 and when JAX has already started.
    """
    if count < 1:
        raise ConfigError(f"cannot simulate {count} devices; give a number of at least 1")
    import jax  # not at the top: --help and a wrong flag need not wait for it

    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        raise ConfigError(
            f"cannot simulate {count} devices: JAX has already started, on {jax.device_count()} "
            f"{jax.default_backend()} devices; do it before anything asks for devices or makes an array"
        ) from error
    jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_PLATFORMS"] = "cpu"  # for the processes that this one starts


def _exit_code(call: Callable[[], None]) -> int:
    """Runs `call`; returns how it ended and, unless it ended well, says so on standard error."""
    try:
        call()
    except SystemExit as end:  # absl ends every run with one
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)  # as Python does for sys.exit("message")
        return BUG
    except UserError as error:
        kind = "" if isinstance(error, Preempted) else "error: "
        print(f"pgdist: {kind}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("pgdist: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone(sys.stdout):
            return 128 + signal.SIGPIPE  # as any command in `... | head`
        traceback.print_exc()
        if _tells_of_a_lost_peer(error):
            print("pgdist: error: another process of this job has gone; its log says why", file=sys.stderr)
            return PeerLostError.exit_code
        print("pgdist: this is a bug; please report it, with what python -m launch.env says", file=sys.stderr)
        return BUG
    return 0


def _leave(code: int) -> NoReturn:
    """Ends the process with `code`; a failing one waits neither for its peers nor for what it still compiles."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:  # the reader has gone, or the disk is full
            # Python will flush again as it ends, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if isinstance(error, BrokenPipeError):
                code = code or 128 + signal.SIGPIPE
            else:
                print(f"pgdist: error: cannot write the output: {error.strerror}", file=sys.stderr)
                code = code or BUG
    if code != 0 and (_has_peers() or _is_compiling()):
        for child in multiprocessing.active_children():  # data loading workers, which os._exit would orphan
            child.kill()
        if code != PeerLostError.exit_code and _has_peers() and _fails_with_all():
            sys.modules["jax"].distributed.shutdown()
        os._exit(code)
    sys.exit(code)


def _fails_with_all() -> bool:
    """Whether all processes of the job are about to leave, as after a mistake in what they share.

    They must leave together: those that stay a moment longer than the first are aborted by JAX, with 134.
    """
    from pgdist import cluster  # not at the top: it imports JAX

    return cluster.meet(seconds=_SECONDS_FOR_PEERS)


def _tells_of_a_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process ended; JAX has no exception of its own for it, and
    reading an array that one should have filled raises ValueError.
    """
    return (
        _has_peers()
        and type(error).__name__ in ("JaxRuntimeError", "ValueError")
        and bool(_LOST_PEER.search(str(error)))
    )


def _has_peers() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _is_compiling() -> bool:
    compilation = sys.modules.get("pgdist.train.compilation")
    return compilation is not None and compilation.is_compiling()


def _reader_has_gone(stream: IO[str]) -> bool:
    """Whether `stream` is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return bool(poll.poll(0))  # asked for nothing, it reports errors and hang-ups only


class _PlainFormatter(python_logging.Formatter):
    """The message alone; its level before it from warnings on."""

    def format(self, record: python_logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < python_logging.WARNING else f"{record.levelname.lower()}: {text}"


def _log_what_is_ours() -> None:
    """Without --verbosity, libraries only warn (Orbax alone logs a dozen lines for each checkpoint), and
    lines are
    for people: no time, process, thread and place before each.
    """
    if not flags.FLAGS["verbosity"].using_default_value:
        return
    logging.get_absl_handler().setFormatter(_PlainFormatter())
    ours = tuple(os.path.dirname(sys.modules[name].__file__) + os.sep for name in ("launch", "pgdist"))
    logging.get_absl_handler().addFilter(
        lambda record: record.levelno >= python_logging.WARNING or record.pathname.startswith(ours)
    )
