"""Reading an npz member by member: the headers first, then the data of one array in blocks.

A reader offers `arrays` (what there is) and `blocks(name)` (the data of one, piece by piece), which is all
that loading needs: a reader of another format or from another place has the same two.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import lzma
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import ml_dtypes
import numpy as np

from pgdist.errors import WeightsError
from pgdist.weights import boxes
from pgdist.weights.array_info import ArrayInfo
from pgdist.weights.boxes import Box
from pgdist.weights.local_path import local_path

_BLOCK_BYTES = 16 * 2**20
_SUFFIX = ".npy"
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# What zipfile and the header parser raise on damaged bytes; all of it means the same to the user.
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, struct.error, UnicodeError, ValueError,
    TypeError, OverflowError, SyntaxError, RuntimeError,
)  # fmt: skip
_FIRST_BYTES = (
    (b"PK", "it starts as an npz but its end is missing: it is cut short. Download or copy it again"),
    (b"\x1f\x8b", "it is a gzip archive: unpack it and name the .npz in it"),
    (b"\x93NUMPY", "it is a single array (.npy): a checkpoint is an .npz"),
    (b"version https://git-lfs", "it is a Git LFS pointer: fetch the file itself (git lfs pull)"),
    (b"<", "it looks like a web page: the download went wrong"),
    (b"", "a checkpoint is an .npz, a zip archive of .npy members"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Member:
    """Where an array is (its zip entry, the bytes of header before its data) and how it is stored."""

    entry: zipfile.ZipInfo
    header_bytes: int
    info: ArrayInfo
    stored_dtype: np.dtype
    fortran_order: bool


class NpzReader:
    """An open npz. Use as a context manager; raises WeightsError for whatever is wrong with the file.

    arrays: what the file holds, under the file's own names, in its order.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = local_path(path)
        self._members: dict[str, _Member] = {}
        with contextlib.ExitStack() as on_error:
            self._zip = on_error.enter_context(_open(self.path))
            for entry in self._zip.infolist():
                if not entry.is_dir():
                    self._add(entry)
            on_error.pop_all()
        self.arrays = [member.info for member in self._members.values()]

    def __enter__(self) -> NpzReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def blocks(self, name: str) -> Iterator[tuple[Box, np.ndarray]]:
        """The data of one array as (box, the numbers in it), in the order of the file; read it to its end.

        The end is where the checksum is compared: until then the numbers may be wrong.
        """
        member = self._members[name]
        shape = member.info.shape[::-1] if member.fortran_order else member.info.shape
        with self._blaming(name), self._zip.open(member.entry) as stream:
            _read_exactly(stream, member.header_bytes)
            for box in boxes.split(shape, max_size=max(1, _BLOCK_BYTES // member.stored_dtype.itemsize)):
                box_shape = boxes.shape_of(box)
                data = _read_exactly(stream, math.prod(box_shape) * member.stored_dtype.itemsize)
                block = np.frombuffer(data, member.stored_dtype).reshape(box_shape)
                if member.info.dtype == _BFLOAT16:
                    block = block.view(_BFLOAT16)
                yield (box[::-1], block.T) if member.fortran_order else (box, block)
            stream.read(1)  # zipfile compares the checksum when it meets the end

    def fingerprint(self) -> str:
        """Hex digest of the members' names, sizes and CRCs."""
        entries = sorted((e.filename, e.file_size, e.CRC) for e in self._zip.infolist() if not e.is_dir())
        return hashlib.sha256(repr(entries).encode()).hexdigest()

    def _add(self, entry: zipfile.ZipInfo) -> None:
        name = entry.filename.removesuffix(_SUFFIX)
        if name == entry.filename:
            raise WeightsError(
                f"{self.path}: member {entry.filename!r} is not an array (.npy). "
                "Use an .npz as numpy.savez writes it."
            )
        if name in self._members:
            raise WeightsError(
                f"{self.path}: array {name!r} is in it twice. Write it again with one of them."
            )
        with self._blaming(name), self._zip.open(entry) as stream:
            shape, fortran_order, dtype = _read_npy_header(stream)
            offset = stream.tell()
        native = _native_dtype(dtype)
        if native is None:
            what = "Python objects, which are never unpickled" if dtype.hasobject else f"{dtype}, not numbers"
            raise WeightsError(
                f"{self.path}: array {name!r} holds {what}. Write the file again from arrays of numbers "
                "(float32, float16, bfloat16)."
            )
        size = offset + math.prod(shape) * dtype.itemsize
        if size != entry.file_size or any(n < 0 for n in shape):
            raise WeightsError(
                f"{self.path}: array {name!r} says that it is {dtype} {shape}, {size} bytes with its header, "
                f"but has {entry.file_size}. The file is damaged: download or copy it again."
            )
        info = ArrayInfo(name=name, shape=shape, dtype=native)
        self._members[name] = _Member(
            entry=entry, header_bytes=offset, info=info, stored_dtype=dtype, fortran_order=fortran_order
        )

    @contextlib.contextmanager
    def _blaming(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WeightsError(f"{self.path}: cannot read array {name!r}: {error}") from error
        except _DAMAGE as error:
            raise WeightsError(
                f"{self.path}: array {name!r} is damaged ({error or type(error).__name__}). "
                "Download or copy the file again."
            ) from error


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such file. Every host of a job needs it at this path.") from error
    except IsADirectoryError as error:
        inside = sorted(file.name for file in path.glob("*.npz"))[:5]
        there = f" It holds {', '.join(inside)}." if inside else ""
        raise WeightsError(f"{path}: is a folder; name the .npz file itself.{there}") from error
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (*_DAMAGE, NotImplementedError) as error:
        with path.open("rb") as file:
            first = file.read(64)
        what = next(text for magic, text in _FIRST_BYTES if first.startswith(magic))
        what = what if first else "it is empty: the download or copy went wrong"
        raise WeightsError(f"{path}: not a readable npz: {what}. ({error})") from error


def _read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"npy format {version} is for arrays with named fields")


def _native_dtype(dtype: np.dtype) -> np.dtype | None:
    """The dtype of the numbers that `dtype` stores, None if it stores something else."""
    if dtype.names is None and dtype.subdtype is None:
        if dtype.kind == "V" and dtype.itemsize == 2:
            return _BFLOAT16
        if dtype.kind in "fiub":
            return dtype.newbyteorder("=")
    return None


def _read_exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise EOFError(f"{count - len(data)} bytes are missing")
    return data
