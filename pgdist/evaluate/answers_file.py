"""The file that answers are appended to as they come, and that a run which was killed goes on with.

Row `i` answers input `i`, so the number of whole rows says where to go on. Whose rows they are stands beside the
file: FILE.job.json is written before the first row, and a file of another job, or of nobody that we know, is never
written to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pgdist.errors import ConfigError, DataError
from pgdist.evaluate.runner import Prediction

_JOB = "answers_of"  # the field of FILE.job.json that marks it as ours
_SHOWN_REASONS = 10
_ROW_FIELDS = frozenset(  # what a row says itself, whether or not this one has it
    "index image prefix suffix prediction predictions logprob token_logprobs score error".split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failures:
    """Inputs that could not be read.  reasons: of the first few."""

    count: int = 0
    reasons: tuple[str, ...] = ()

    def add(self, reason: str) -> Failures:
        """These and another."""
        return Failures(count=self.count + 1, reasons=(*self.reasons, reason)[:_SHOWN_REASONS])

    def check(self) -> None:
        """Raises DataError if there are any."""
        if not self.count:
            return
        lines = [f"  {reason}" for reason in self.reasons]
        if self.count > len(lines):
            lines.append(f"  and {self.count - len(lines)} more")
        raise DataError("\n".join([f"{self.count} input(s) could not be read and have no answer:", *lines]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job is.  rows: written.  failures: those among them that are no answers."""

    rows: int = 0
    failures: Failures = Failures()

    def add(self, error: str | None) -> Progress:
        """After another row.  error: why it is no answer."""
        failures = self.failures if error is None else self.failures.add(error)
        return Progress(rows=self.rows + 1, failures=failures)


class AnswersFile:
    """The --out of one job. What is no plain file, such as /dev/null, is written to and never gone on with."""

    def __init__(self, path: str, *, describe: Callable[[], Mapping[str, Any]]) -> None:
        """path: as its user calls it.  describe: gives, by name, all that decides the answers; JSON values."""
        self._name = path
        self._is_plain = is_plain(path)
        # A pipe, such as a shell's >(gzip), has no path of its own to resolve.
        self._path = Path(os.path.realpath(path)) if self._is_plain else Path(path)
        self._description = self._path.with_name(self._path.name + ".job.json")
        self._describe = describe

    def look(self) -> Progress:
        """How far the job has come; changes nothing.

        A last row that is cut off, as by a kill, does not count.  Raises ConfigError for a file of another job, for one
        that no job has written, and for one that was edited.
        """
        if not self._is_plain or not self._path.exists() or not self._path.stat().st_size:
            return Progress()
        with self._blaming("read"):
            self._check_job()
            return self._count()

    @contextlib.contextmanager
    def open(self, *, after: Progress) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """What appends a row, JSON values by name; each is in the file when it returns.

        after: what `look` has found. A last row that is cut off is removed.  Raises ConfigError as `look`, where
        another process writes the file or has gone on with it meanwhile, and where it cannot be written.
        """
        flags = os.O_WRONLY | (os.O_CREAT | os.O_APPEND if self._is_plain else 0)
        with self._blaming("written"):
            # Unbuffered: what could not be written must not be tried again when the file is closed.
            file = open(os.open(self._path, flags, 0o666), "wb", buffering=0)
        with file:
            if self._is_plain:
                self._take(file)
                if self.look().rows != after.rows:
                    raise self._error("another process has gone on with it; start this one again")
                self._prepare(file)
            yield lambda row: self._append(file, row)

    @functools.cached_property
    def _job(self) -> dict[str, Any]:
        return json.loads(json.dumps(self._describe()))  # as it will be read: tuples are lists

    def _take(self, file: IO[bytes]) -> None:
        """For this process alone, as long as the file is open."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._error("another process is writing it; wait for its end") from None
        except OSError:
            pass  # a file system without locks

    def _prepare(self, file: IO[bytes]) -> None:
        """Leaves whole rows in the file, and says beside it what they answer."""
        with self._blaming("written"):
            with self._path.open("rb") as lines:
                size = sum(len(line) for line in lines if line.endswith(b"\n"))
            file.truncate(size)
            if not size:  # new, or of a run that was killed before its first answer
                replacement = self._description.with_suffix(".tmp")
                replacement.write_text(json.dumps({_JOB: self._job}, indent=2) + "\n", encoding="utf-8")
                os.replace(replacement, self._description)

    def _append(self, file: IO[bytes], row: Mapping[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=False) + "\n"
        # Half a surrogate pair, which JSON can spell and UTF-8 cannot, is written as JSON's own escape.
        rest = line.encode("utf-8", errors="backslashreplace")
        with self._blaming("written"):
            while rest:
                rest = rest[file.write(rest) :]

    def _check_job(self) -> None:
        try:
            known = dict(json.loads(self._description.read_text(encoding="utf-8"))[_JOB])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            raise self._error(
                f"is there already, and no {self._description.name} beside it says what its rows are answers to. It "
                "stays as it is: name another file, or delete it"
            ) from None
        lines = [
            f"  {name}: {known.get(name)!r} -> {self._job.get(name)!r}"
            for name in dict.fromkeys([*known, *self._job])
            if known.get(name) != self._job.get(name)
        ]
        if lines:
            raise self._error(
                "holds the answers of another job (there -> here):\n" + "\n".join(lines) + "\n"
                "It stays as it is: name another file, or delete it"
            )

    def _count(self) -> Progress:
        progress = Progress()
        with self._path.open("rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                row = _parse(line)
                if row.get("index") != number:
                    raise self._error(
                        f"line {number + 1} is not the answer to input {number}: the file was edited, or damaged. It "
                        "stays as it is: name another file, or delete it"
                    )
                progress = progress.add(None if row.get("prediction") is not None else str(row.get("error")))
        return progress

    @contextlib.contextmanager
    def _blaming(self, what: str) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # no mistake: nobody wants more of it
            raise
        except OSError as error:
            raise self._error(f"cannot be {what}: {error.strerror or error}") from error

    def _error(self, found: str) -> ConfigError:
        return ConfigError(f"--out={self._name}: {found}.")


def check_path(path: str, *, flag: str, inputs: Sequence[str]) -> None:
    """Raises ConfigError for a file that cannot be written, or is one of the inputs; changes nothing."""
    found = Path(os.path.realpath(path))
    if found.is_dir():
        raise ConfigError(f"{flag}={path}: expected a file to write, found a folder")
    if not is_plain(path):
        return  # nothing is made beside it
    if not found.parent.is_dir():
        raise ConfigError(f"{flag}={path}: there is no folder {found.parent}; make it first")
    if not os.access(found.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{flag}={path}: the folder {found.parent} cannot be written; name another one")
    if str(found) in map(os.path.realpath, inputs):
        raise ConfigError(
            f"{flag}={path}: is an input too, which the answers would replace; name another file"
        )


def is_plain(path: str) -> bool:
    """Whether it is a file, or will be one: no device, such as /dev/null, and no pipe."""
    return os.path.isfile(path) or not os.path.exists(path)


def answer_row(prediction: Prediction, *, several: bool, logprobs: bool) -> dict[str, Any]:
    """The row of an input: index, image, prefix, suffix, prediction, score, and other fields of the input's own.

    several: adds `predictions`, all answers, best first.  logprobs: adds `logprob` and `token_logprobs`, in nats; of
    several answers, lists of them in the order of `predictions`; None for what is not finite.  An input without an
    answer has `error` instead. A field of the input's own with one of these names is left out.
    """
    if prediction.error is not None:
        return {"index": prediction.index, "prediction": None, "error": prediction.error}
    row = {name: getattr(prediction, name) for name in ("index", "image", "prefix", "suffix", "prediction")}
    if several:
        row["predictions"] = [candidate.text for candidate in prediction.candidates]
    if logprobs:
        of_each = {
            "logprob": [_finite(one.logprob) for one in prediction.candidates],
            "token_logprobs": [[_finite(x) for x in one.token_logprobs] for one in prediction.candidates],
        }
        row |= {name: values if several else values[0] for name, values in of_each.items()}
    if prediction.score is not None:
        row["score"] = prediction.score
    return row | {name: value for name, value in prediction.extra.items() if name not in _ROW_FIELDS}


def _finite(number: float) -> float | None:
    """None for what JSON cannot say: a model's numbers may be NaN."""
    return number if math.isfinite(number) else None


def _parse(line: bytes) -> dict[str, Any]:
    """The row of a line; one without fields where it is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
