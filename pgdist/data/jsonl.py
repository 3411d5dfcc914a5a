"""Examples in a JSONL file: one JSON object a line, with `image`, `prefix`, `suffix` and any other fields.

The file is read once at opening, for where its lines begin and what it hashes to; a line is parsed when its
example is asked for. A line that cannot be used is a `BadRecord`, not an exception: the loader puts a masked
row in its place, so one bad line never shifts the examples after it. What is wrong with the whole file is a
`DataError` at opening.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from pgdist.errors import DataError

# Longer than any real example; a binary file without newlines must not be read into memory as one line.
_MAX_LINE_BYTES = 2**26
_FIELDS = ("image", "prefix", "suffix")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One example. `file` and `line` (from 1; 0 where there are no lines) say where it stands."""

    image: str  # where the image lies: an absolute path inside the data root
    image_name: str  # the `image` field as it is written in the file
    prefix: str
    suffix: str | None  # the first of `suffixes`, or the one that was drawn; None where there is none
    suffixes: tuple[str, ...]
    extra: Mapping[str, Any]  # the line's other fields
    file: str
    line: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadRecord:
    """One example that cannot be used, and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        place = f"{self.file}, line {self.line}" if self.line else self.file
        return f"{place}: {self.reason}"


class JsonlSource:
    """Random access to the examples of a JSONL file; picklable, safe to read from several threads."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        prefix: str | None = None,
        lowercase: bool = False,
        root: str | os.PathLike[str] | None = None,
        require_suffix: bool = True,
    ) -> None:
        """Opens the file and finds its lines; blank ones are no examples but count as lines.

        prefix: used for every example, whatever its own `prefix` is; None leaves the examples theirs.
        lowercase: suffixes become lower case.
        root: the folder that image paths are relative to and may not leave; the JSONL's own folder by
        default.
        require_suffix: an example without `suffix` is bad; False for prompts to be answered.
        Raises DataError where the file is missing, no JSONL file, or without examples.
        """
        self.path = os.path.abspath(os.fspath(path))
        self.prefix = prefix
        self.lowercase = lowercase
        self.require_suffix = require_suffix
        self.root = os.path.realpath(os.path.dirname(self.path) if root is None else os.fspath(root))
        if not os.path.isdir(self.root):
            raise DataError(f"image root {self.root!r} of {self.path}: expected a folder, found none")
        self._descriptor = _open(self.path)
        self._status = _status(self._descriptor)
        lines = _find_lines(self.path)
        self.sha256 = lines.sha256
        self._starts, self._numbers = lines.starts, lines.numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Record | BadRecord:
        """Example `index`, from 0; its image's path is checked, its image not opened."""
        record = self._parse(index)
        if isinstance(record, BadRecord):
            return record
        try:
            return dataclasses.replace(record, image=_path_inside(self.root, record.image_name))
        except ValueError as error:
            return BadRecord(file=record.file, line=record.line, reason=str(error))

    def prefix_of(self, index: int) -> str | None:
        """The prefix of example `index`, None of one that is bad; its image's path is not looked at."""
        record = self._parse(index)
        return record.prefix if isinstance(record, Record) else None

    def check(self) -> list[BadRecord]:
        """Parses every line, text only (no image is looked for); returns those that cannot be used."""
        return [found for found in map(self._parse, range(len(self))) if isinstance(found, BadRecord)]

    def _parse(self, index: int) -> Record | BadRecord:
        line = int(self._numbers[index])
        try:
            return self._record(_json_object(self._line_bytes(index)), line)
        except ValueError as error:
            return BadRecord(file=self.path, line=line, reason=str(error))

    def _record(self, fields: dict[str, Any], line: int) -> Record:
        image_name = _text("image", fields)
        prefix = _text("prefix", fields) if self.prefix is None else self.prefix
        suffixes = _suffixes(fields) if self.require_suffix or fields.get("suffix") is not None else ()
        if self.lowercase:
            suffixes = tuple(suffix.lower() for suffix in suffixes)
        return Record(
            image="",
            image_name=image_name,
            prefix=prefix,
            suffix=suffixes[0] if suffixes else None,
            suffixes=suffixes,
            extra={name: value for name, value in fields.items() if name not in _FIELDS},
            file=self.path,
            line=line,
        )

    def _line_bytes(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)} in {self.path}")
        start, end = int(self._starts[index]), int(self._starts[index + 1])
        # A read at an offset: threads share the descriptor and no position.
        return os.pread(self._descriptor, end - start, start).strip()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_descriptor"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._descriptor = _open(self.path)
        if _status(self._descriptor) != self._status:
            raise DataError(f"{self.path}: changed while it was in use; start again with a file that stays")

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class Fingerprinted(Protocol):
    """Examples with a digest of what they are."""

    @property
    def sha256(self) -> str: ...

    def __len__(self) -> int: ...


def fingerprint(source: Fingerprinted) -> str:
    """What tells one data file from another in a run's metadata: number of examples, content's SHA-256."""
    return f"{len(source)} examples, sha256 {source.sha256}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Lines:
    starts: np.ndarray  # int64[n + 1] byte offsets of the n examples' lines, and the end of the last
    numbers: np.ndarray  # int64[n] line numbers, from 1
    sha256: str


def _open(path: str) -> int:
    if not os.path.isfile(path):
        found = "a directory" if os.path.isdir(path) else "nothing"
        raise DataError(f"{path}: expected a JSONL file, found {found}")
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _find_lines(path: str) -> _Lines:
    digest = hashlib.sha256()
    starts, numbers = array.array("q"), array.array("q")
    offset = number = 0
    with open(path, "rb") as file:
        while line := file.readline(_MAX_LINE_BYTES):
            number += 1
            if number == 1:
                _refuse_other_formats(line, path=path)
            if len(line) == _MAX_LINE_BYTES:
                raise DataError(f"{path}, line {number}: longer than {_MAX_LINE_BYTES:,} bytes; is it JSONL?")
            digest.update(line)
            if not line.isspace():
                starts.append(offset)
                numbers.append(number)
            offset += len(line)
    if not numbers:
        raise DataError(
            f"{path}: expected one JSON object a line, found no line that is not blank ({offset} bytes)"
        )
    starts.append(offset)
    return _Lines(
        starts=np.asarray(starts, np.int64),
        numbers=np.asarray(numbers, np.int64),
        sha256=digest.hexdigest(),
    )


def _refuse_other_formats(first_line: bytes, *, path: str) -> None:
    for mark, found in (
        (b"\xff\xfe", "UTF-16"),
        (b"\xfe\xff", "UTF-16"),
        (b"\x1f\x8b", "a gzip file: unpack it"),
        (b"PK\x03\x04", "a zip or npz file"),
    ):
        if first_line.startswith(mark):
            raise DataError(f"{path}: expected JSON lines in UTF-8, found {found}")


def _status(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _json_object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; raises ValueError with the column (from 1) of what is wrong."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"column {error.start + 1}: not UTF-8 (byte 0x{line[error.start]:02x})") from error
    if text in ("[", "{"):
        raise ValueError(f"a {text} alone: is this JSON over several lines? Give each object one line")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" starting at")  # the column is told before
        raise ValueError(f"column {error.colno}: broken JSON: {what}") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deep") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {_shown(value)}")
    return value


def _text(name: str, fields: dict[str, Any]) -> str:
    if name not in fields:
        found = ", ".join(sorted(fields)) or "none"
        one_for_all = "give it, or one prefix for all: config.data.prefix in training, --prompt in prediction"
        remedy = f"; {one_for_all}" if name == "prefix" else ""
        raise ValueError(f"no field {name!r} (fields found: {found}){remedy}")
    return _checked_text(name, fields[name])


def _suffixes(fields: dict[str, Any]) -> tuple[str, ...]:
    value = fields.get("suffix")
    if isinstance(value, list):
        if not value:
            raise ValueError("field 'suffix': expected text or a list of texts, found an empty list")
        return tuple(_checked_text("suffix", one) for one in value)
    return (_text("suffix", fields),)


def _checked_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"field {name!r}: expected text, found {_shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON may spell half of a surrogate pair, which no tokenizer takes
        raise ValueError(
            f"field {name!r}: a lone surrogate \\u{ord(value[error.start]):04x} is not text"
        ) from error
    return value


def _shown(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    kind = kinds.get(type(value), "a number")
    text = json.dumps(value)
    return kind if value is None else f"{kind}: {text if len(text) <= 40 else text[:37] + '...'}"


def _path_inside(root: str, name: str) -> str:
    """The real path of image `name`; ValueError where it is none or, symlinks followed, outside `root`."""
    if not name:
        raise ValueError("field 'image': expected a path, found empty text")
    if "\0" in name:
        raise ValueError("field 'image': a path cannot hold a NUL character")
    path = os.path.realpath(os.path.join(root, name))
    if os.path.commonpath([root, path]) != root:
        raise ValueError(
            f"image {name!r}: leads out of the data root {root} (to {path}); images must lie inside it"
        )
    return path
