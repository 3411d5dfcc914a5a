"""The arrays of an npz: what there is, and where in the file the bytes of each are.

A member that is stored is read by byte range, any part of it; one that is deflated is inflated into a temporary file
when it is first asked for.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import io
import lzma
import math
import os
import struct
import threading
import tokenize
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np

from pgdist.errors import WeightsError
from pgdist.weights.array_info import ArrayInfo
from pgdist.weights.byte_source import ByteSource, TemporaryBytes, as_file, open_bytes
from pgdist.weights.stored import BFLOAT16, ByteRange, Checksum, FileArray, blaming, damaged

_SUFFIX = ".npy"
_HEAD_BYTES = 1024  # of a member, read at once: the zip's header of it and that of the array
_HEADS_AT_ONCE = 16
_INFLATE_BYTES = 64 * 2**10
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of the zip format: signature, lengths of name and extra field
# What zipfile and the header parser raise on damaged bytes; all of it means the same to the user.
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, struct.error, UnicodeError, ValueError,
    TypeError, OverflowError, SyntaxError, RuntimeError, tokenize.TokenError,
)  # fmt: skip
_FIRST_BYTES = (
    (b"PK", "it starts as an npz but its end is missing: it is cut short. Download or copy it again"),
    (b"\x1f\x8b", "it is a gzip archive: unpack it and name the .npz in it"),
    (b"\x93NUMPY", "it is a single array (.npy): a checkpoint is an .npz"),
    (b"version https://git-lfs", "it is a Git LFS pointer: fetch the file itself (git lfs pull)"),
    (b"<", "it looks like a web page: the download went wrong"),
    (b"", "a checkpoint is an .npz, a zip archive of .npy members"),
)


class NpzReader:
    """An open npz. Use as a context manager; raises WeightsError for whatever is wrong with the file.

    arrays: what the file holds, by its own names, in its order.  fortran_order: the names of those whose first axis
    is the fastest; their data is that of the array with its axes reversed.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.arrays: dict[str, FileArray] = {}
        self.fortran_order: set[str] = set()
        # Python 3.12's zipfile opens a member from wherever another thread has just read the file to.
        self._zip_lock = threading.Lock()
        with contextlib.ExitStack() as on_error:
            self._source = on_error.enter_context(contextlib.closing(open_bytes(path)))
            self.path = self._source.name
            self._zip = on_error.enter_context(_open_zip(self._source))
            entries = [entry for entry in self._zip.infolist() if not entry.is_dir()]
            with concurrent.futures.ThreadPoolExecutor(_HEADS_AT_ONCE) as pool:
                for entry, head in zip(entries, pool.map(self._read_head, entries), strict=True):
                    self._add(entry, head)
            on_error.pop_all()

    def __enter__(self) -> NpzReader:
        return self

    def __exit__(self, *_: object) -> None:
        for array in self.arrays.values():
            array.release()
        self._zip.close()
        self._source.close()

    def fingerprint(self) -> str:
        """Hex digest of the members' names, sizes and CRCs."""
        entries = sorted((e.filename, e.file_size, e.CRC) for e in self._zip.infolist() if not e.is_dir())
        return hashlib.sha256(repr(entries).encode()).hexdigest()

    def _read_head(self, entry: zipfile.ZipInfo) -> tuple[int, bytes]:
        """Where the member's content begins in the file, and its first bytes, inflated."""
        name = entry.filename.removesuffix(_SUFFIX)
        with self._blaming(name):
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                with self._zip_lock, self._zip.open(entry) as stream:
                    return 0, stream.read(_HEAD_BYTES)
            size = min(_HEAD_BYTES, self._source.size - entry.header_offset)
            head = self._source.read(entry.header_offset, size).tobytes()
            signature, name_size, extra_size = _LOCAL_HEADER.unpack_from(head)
            if signature != b"PK\x03\x04":
                raise zipfile.BadZipFile("no member begins where the directory says")
            start = _LOCAL_HEADER.size + name_size + extra_size
            content = head[start : start + entry.file_size]
            return entry.header_offset + start, content

    def _add(self, entry: zipfile.ZipInfo, head: tuple[int, bytes]) -> None:
        name = entry.filename.removesuffix(_SUFFIX)
        if name == entry.filename:
            raise WeightsError(
                f"{self.path}: member {entry.filename!r} is not an array (.npy). "
                "Use an .npz as numpy.savez writes it."
            )
        if name in self.arrays:
            raise WeightsError(
                f"{self.path}: array {name!r} is in it twice. Write it again with one of them."
            )
        start, content = head
        with self._blaming(name):
            shape, fortran_order, dtype, header_bytes = _read_npy_header(content)
        native = _native_dtype(dtype)
        if native is None:
            what = "Python objects, which are never unpickled" if dtype.hasobject else f"{dtype}, not numbers"
            raise WeightsError(
                f"{self.path}: array {name!r} holds {what}. Write the file again from arrays of numbers "
                "(float32, float16, bfloat16)."
            )
        size = header_bytes + math.prod(shape) * dtype.itemsize
        if size != entry.file_size or any(n < 0 for n in shape):
            raise WeightsError(
                f"{self.path}: array {name!r} says that it is {dtype} {shape}, {size} bytes with its header, "
                f"but has {entry.file_size}. The file is damaged: download or copy it again."
            )
        is_stored = entry.compress_type == zipfile.ZIP_STORED
        if is_stored and start + size > self._source.size:
            raise damaged(self.path, name, "the file ends before it")
        self.arrays[name] = FileArray(
            ArrayInfo(name=name, shape=shape, dtype=native),
            data=ByteRange(source=self._source, start=start + header_bytes)
            if is_stored
            else _Inflated(self, entry, header_bytes),
            path=self.path,
            stored_dtype=dtype,
            # What is inflated has been compared already.
            checksum=Checksum(header=zlib.crc32(content[:header_bytes]), total=entry.CRC)
            if is_stored
            else None,
        )
        if fortran_order and len(shape) > 1:
            self.fortran_order.add(name)

    def inflate(self, entry: zipfile.ZipInfo, *, skip: int) -> TemporaryBytes:
        """The content of a deflated member after its first `skip` bytes, in a temporary file."""
        name = entry.filename.removesuffix(_SUFFIX)
        inflated = TemporaryBytes(self.path)
        with contextlib.ExitStack() as on_error:
            on_error.enter_context(contextlib.closing(inflated))
            with self._blaming(name), self._zip_lock, self._zip.open(entry) as stream:
                stream.read(skip)
                while data := stream.read(_INFLATE_BYTES):  # its end is where zipfile compares the checksum
                    _append(inflated, data, path=self.path)
            if inflated.size + skip != entry.file_size:
                raise damaged(self.path, name, f"{entry.file_size - skip - inflated.size} bytes are missing")
            on_error.pop_all()
        return inflated

    @contextlib.contextmanager
    def _blaming(self, name: str) -> Iterator[None]:
        try:
            with blaming(self.path, name):
                yield
        except _DAMAGE as error:
            raise damaged(self.path, name, error or type(error).__name__) from error


class _Inflated:
    """The data of a deflated member; one of a file is inflated at a time."""

    min_run = TemporaryBytes.min_run

    def __init__(self, reader: NpzReader, entry: zipfile.ZipInfo, header_bytes: int) -> None:
        self._reader = reader
        self._entry = entry
        self._header_bytes = header_bytes
        self._lock = threading.Lock()
        self._bytes: TemporaryBytes | None = None

    def read(self, offset: int, size: int) -> np.ndarray:
        with self._lock:
            if self._bytes is None:
                self._bytes = self._reader.inflate(self._entry, skip=self._header_bytes)
        return self._bytes.read(offset, size)

    def release(self) -> None:
        with self._lock:
            if self._bytes is not None:
                self._bytes.close()
                self._bytes = None


def _append(target: TemporaryBytes, data: bytes, *, path: object) -> None:
    try:
        target.append(data)
    except OSError as error:
        raise WeightsError(
            f"{path}: an array is compressed, and there is no room to inflate it ({error.strerror or error}). Name a "
            "folder with room in TMPDIR, or write the file again without compression (numpy.savez)."
        ) from error


def _open_zip(source: ByteSource) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(as_file(source))
    except OSError as error:
        raise WeightsError(f"{source.name}: cannot be read: {error.strerror or error}") from error
    except (*_DAMAGE, NotImplementedError) as error:
        first = source.read(0, min(64, source.size)).tobytes()
        what = next(text for magic, text in _FIRST_BYTES if first.startswith(magic))
        what = what if first else "it is empty: the download or copy went wrong"
        raise WeightsError(f"{source.name}: not a readable npz: {what}. ({error})") from error


def _read_npy_header(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether in Fortran order, dtype, and the bytes of the header."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        found = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        found = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"npy format {version} is for arrays with named fields")
    return (*found, stream.tell())


def _native_dtype(dtype: np.dtype) -> np.dtype | None:
    """The dtype of the numbers that `dtype` stores, None if it stores something else."""
    if dtype.names is None and dtype.subdtype is None:
        if dtype.kind == "V" and dtype.itemsize == 2:
            return BFLOAT16
        if dtype.kind in "fiub":
            return dtype.newbyteorder("=")
    return None
