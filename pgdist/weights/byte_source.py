"""Files that are read by byte range, from several threads at once: local ones, and objects in gs:// buckets."""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
import tempfile
import threading
from typing import IO, Any, Protocol

import fsspec
import numpy as np

from pgdist import files
from pgdist.errors import UserError, WeightsError
from pgdist.weights.local_path import local_path

_LARGEST_READ = 2**30  # bytes; Linux gives at most 2 GiB at once
_SMALLEST_BUFFER, _LARGEST_BUFFER = 2**16, 2**25  # bytes, of those that are used again

_thread = threading.local()


class ByteSource(Protocol):
    """name: for messages.  size: bytes.  min_run: bytes below which a read costs as much as one of this size."""

    name: str
    size: int
    min_run: int

    def read(self, offset: int, size: int) -> np.ndarray:
        """uint8[size] from `offset` on, which the next read of the same thread may replace by its own.

        EOFError where the file ends before, OSError where it cannot be read.
        """
        ...

    def close(self) -> None:
        """Lets go of the file."""
        ...


def open_bytes(path: str | os.PathLike[str]) -> ByteSource:
    """The file or object at `path`; WeightsError where there is none."""
    if os.fspath(path).startswith("gs://"):
        return _BucketObject(os.fspath(path))
    return _LocalFile(local_path(path))


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file; WeightsError where there is none."""
    with contextlib.closing(open_bytes(path)) as source:
        content = source.read(0, source.size).tobytes()
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: is not JSON: {error}. Download it again.") from error
    if not isinstance(found, dict):
        raise WeightsError(
            f"{path}: expected a JSON object, found {type(found).__name__}. Download it again."
        )
    return found


def as_file(source: ByteSource) -> IO[bytes]:
    """The source as a seekable file, for libraries that want one."""
    return io.BufferedReader(_Raw(source), buffer_size=256 * 2**10)


class TemporaryBytes:
    """A temporary file that is written first and read then; it has no name and vanishes when it is closed."""

    min_run = 64 * 2**10

    def __init__(self, name: str) -> None:
        self.name = name
        self.size = 0
        self._file = tempfile.TemporaryFile(prefix="pgdist_", buffering=0)

    def append(self, data: bytes) -> None:
        """Adds to the end."""
        self._file.write(data)
        self.size += len(data)

    def read(self, offset: int, size: int) -> np.ndarray:
        """See ByteSource."""
        return _read_exactly(self._file.fileno(), offset, size)

    def close(self) -> None:
        """See ByteSource."""
        self._file.close()


class _LocalFile:
    min_run = 64 * 2**10

    def __init__(self, path: os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise WeightsError(
                f"{self.name}: no such file. Every host of a job needs it at this path."
            ) from error
        except OSError as error:
            raise WeightsError(f"{self.name}: cannot be read: {error.strerror or error}") from error
        found = os.fstat(self._descriptor)
        self.size = found.st_size
        if stat.S_ISDIR(found.st_mode):
            self.close()
            inside = sorted(entry for entry in os.listdir(path) if entry.endswith(".npz"))[:5]
            there = f" It holds {', '.join(inside)}." if inside else ""
            raise WeightsError(f"{self.name}: is a folder; name the .npz file itself.{there}")

    def read(self, offset: int, size: int) -> np.ndarray:
        return _read_exactly(self._descriptor, offset, size)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class _BucketObject:
    min_run = 2**20  # a request takes as long as the transfer of about so much

    def __init__(self, url: str) -> None:
        self.name = url
        files.prepare_buckets(url)
        with _blaming_bucket(url):
            self._bucket = fsspec.filesystem("gcs")
            self.size = int(self._bucket.info(url)["size"])

    def read(self, offset: int, size: int) -> np.ndarray:
        if size == 0:
            return np.empty(0, np.uint8)
        with _blaming_bucket(self.name):
            data = self._bucket.cat_file(self.name, start=offset, end=offset + size)
        if len(data) != size:
            raise EOFError(f"{size - len(data)} bytes are missing")
        return np.frombuffer(data, np.uint8)

    def close(self) -> None:
        """Nothing is held."""


class _Raw(io.RawIOBase):
    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._source.size}[whence]
        if base + offset < 0:
            raise OSError("before the beginning of the file")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._source.size - self._position))
        buffer[:size] = self._source.read(self._position, size).data
        self._position += size
        return size


def _read_exactly(descriptor: int, offset: int, size: int) -> np.ndarray:
    data = _buffer(size)
    view, done = memoryview(data), 0
    while done < size:
        count = os.preadv(descriptor, [view[done : done + _LARGEST_READ]], offset + done)
        if count == 0:
            raise EOFError(f"{size - done} bytes are missing")
        done += count
    return data


def _buffer(size: int) -> np.ndarray:
    """A thread's buffer, used again: fresh pages for each block cost as much as reading it."""
    if size > _LARGEST_BUFFER:
        return np.empty(size, np.uint8)
    if getattr(_thread, "buffer", None) is None or _thread.buffer.size < size:
        _thread.buffer = np.empty(max(size, _SMALLEST_BUFFER), np.uint8)
    return _thread.buffer[:size]


@contextlib.contextmanager
def _blaming_bucket(url: str):
    try:
        yield
    except FileNotFoundError as error:
        raise WeightsError(
            f"{url}: there is no such object. List what there is: gcloud storage ls."
        ) from error
    except (UserError, EOFError):
        raise
    except Exception as error:  # of gcsfs, aiohttp, google.auth: no common type
        found = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(
            f"{url}: cannot be read ({type(error).__name__}: {found[:500]}). May this host read the bucket? It needs "
            "the role Storage Object Viewer, by its service account or by `gcloud auth application-default login`."
        ) from error
