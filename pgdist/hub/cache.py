"""The folder of what was fetched: where it is, who may fetch at a time, and which files were checked already.

A mark is an empty file whose name is a hash of a file's path, size, time of change and checksum: it says that this
very file was read once and had that checksum. So a start does not read gigabytes again to trust them.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from pgdist.hub import failures
from pgdist.hub.failures import Asked

VARIABLE = "PGDIST_CACHE"

_BLOCK = 4 * 2**20  # bytes


def folder() -> Path:
    """$PGDIST_CACHE, else $XDG_CACHE_HOME/pgdist, else ~/.cache/pgdist."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pgdist"


def of_object(bucket: str, path: str) -> Path:
    """Where a copy of a bucket's object is, if it has been fetched."""
    return folder() / "gs" / bucket / path


@contextlib.contextmanager
def lock(what: str) -> Iterator[None]:
    """Holds off other processes that want the same; it goes with the process, however that ends.

    Where no lock can be had (a read-only home, a file system without locks) there is none: then each fetches for
    itself, and files still appear whole.
    """
    path = folder() / "locks" / hashlib.sha256(what.encode()).hexdigest()[:32]
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logging.info("%s: another process fetches it; waiting.", what)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_marked(path: Path, checksum: str) -> bool:
    """Whether the file is there and is the one that was marked with this checksum."""
    mark = _mark(path, checksum)
    return mark is not None and mark.exists()


def mark(path: Path, checksum: str) -> None:
    """Remembers that the file has this checksum; where that cannot be written it is found out again."""
    mark = _mark(path, checksum)
    with contextlib.suppress(OSError):
        if mark is None:  # the file has gone again
            return
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def has_checksum(path: Path, checksum: str) -> bool:
    """Reads the file and compares.

    checksum: "sha256:HEX"; "git:HEX", which is git's name of its content; "md5:BASE64" or "crc32c:BASE64", as Google
    Cloud Storage writes them; anything else counts as equal, for nothing is known.
    """
    kind, _, expected = checksum.partition(":")
    if kind == "crc32c":
        import google_crc32c

        digest = google_crc32c.Checksum()
    elif kind == "git":
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    elif kind in ("sha256", "md5"):
        digest = hashlib.new(kind, usedforsecurity=False)
    else:
        return True
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    found = digest.digest()
    return expected == (found.hex() if kind in ("sha256", "git") else base64.b64encode(found).decode())


def check_space(asked: Asked, needed: int, *, where: Path, variable: str) -> None:
    """Raises the error of `asked` where `needed` bytes do not fit; a quota shows only in writing."""
    there = next(path for path in (where, *where.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        found = f"{size_text(needed)} are needed, {size_text(free)} are free"
        raise asked.failed(failures.no_space(folder=where, variable=variable, found=found))


def size_text(size: int) -> str:
    """Bytes as people read them: 5.9 GB, 12.3 MB, 512 bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def _mark(path: Path, checksum: str) -> Path | None:
    try:
        found = path.stat()
    except OSError:
        return None
    text = f"{os.path.realpath(path)}\n{found.st_size} {found.st_mtime_ns}\n{checksum}"
    return folder() / "checked" / hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
