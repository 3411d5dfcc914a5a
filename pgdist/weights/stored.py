"""An array in a file: where its bytes are, reading a contiguous box of them, and its checksum."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import ml_dtypes
import numpy as np

from pgdist.errors import WeightsError
from pgdist.weights import boxes
from pgdist.weights.array_info import ArrayInfo
from pgdist.weights.boxes import Box
from pgdist.weights.byte_source import ByteSource
from pgdist.weights.crc import combine

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Numbers that were read: the box of the view that they are, and which bytes of the stored array.

    numbers: None once they have been used.  crc: CRC-32 of these bytes; None where the file has none to compare with.
    """

    box: Box
    numbers: np.ndarray | None
    offset: int
    size: int
    crc: int | None

    def without_numbers(self) -> Block:
        """What is needed of it when the numbers have been used."""
        return dataclasses.replace(self, numbers=None)


class StoredArray(Protocol):
    """An array that can be read box by box, from several threads at once.

    info: under the file's own name.  nbytes: as stored.  min_run: elements below which reading so many costs the same.
    """

    info: ArrayInfo
    nbytes: int
    min_run: int

    def read(self, view: Sequence[int], box: Box) -> Block:
        """A box that is contiguous in the array, seen under the shape `view`; WeightsError where it is damaged."""
        ...

    def check(self, blocks: Iterable[Block]) -> None:
        """Raises WeightsError if the blocks are the whole array and their checksum is not the file's."""
        ...

    def release(self) -> None:
        """Lets go of what reading has left in memory or on disk; may be read again."""
        ...


class Data(Protocol):
    """The bytes of an array in its file."""

    min_run: int

    def read(self, offset: int, size: int) -> np.ndarray:
        """uint8[size]; EOFError or OSError as a ByteSource."""
        ...

    def release(self) -> None:
        """As StoredArray."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteRange:
    """Bytes of a source from `start` on."""

    source: ByteSource
    start: int

    @property
    def min_run(self) -> int:
        """Bytes."""
        return self.source.min_run

    def read(self, offset: int, size: int) -> np.ndarray:
        """See Data."""
        return self.source.read(self.start + offset, size)

    def release(self) -> None:
        """Nothing is held."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checksum:
    """CRC-32 of a header, whose own is known, and the data that follows it."""

    header: int
    total: int


class FileArray:
    """A StoredArray in a file: numbers in C order, of any byte order."""

    def __init__(
        self,
        info: ArrayInfo,
        *,
        data: Data,
        path: object,
        stored_dtype: np.dtype | None = None,
        checksum: Checksum | None = None,
    ) -> None:
        """stored_dtype: of the bytes in the file; by default that of `info`."""
        self.info = info
        self._data = data
        self._path = path
        self._dtype = info.dtype if stored_dtype is None else stored_dtype
        self._checksum = checksum
        self.nbytes = math.prod(info.shape) * self._dtype.itemsize
        self.min_run = max(1, data.min_run // self._dtype.itemsize)

    def read(self, view: Sequence[int], box: Box) -> Block:
        """See StoredArray."""
        shape = boxes.shape_of(box)
        offset = boxes.offset_of(box, view) * self._dtype.itemsize
        size = math.prod(shape) * self._dtype.itemsize
        with blaming(self._path, self.info.name):
            raw = self._data.read(offset, size)
        crc = None if self._checksum is None else zlib.crc32(raw)
        numbers = raw.view(self.info.dtype if self.info.dtype == BFLOAT16 else self._dtype)
        return Block(box=box, numbers=numbers.reshape(shape), offset=offset, size=size, crc=crc)

    def check(self, blocks: Iterable[Block]) -> None:
        """See StoredArray."""
        if self._checksum is None:
            return
        crc, end = self._checksum.header, 0
        for block in sorted(blocks, key=lambda block: (block.offset, -block.size)):
            if block.offset > end:
                return
            if block.offset < end:  # read twice: for another array that shares the stored one
                continue
            crc, end = combine(crc, block.crc, block.size), end + block.size
        if end == self.nbytes and crc != self._checksum.total:
            raise damaged(self._path, self.info.name, "its CRC-32 is not the file's")

    def release(self) -> None:
        """See StoredArray."""
        self._data.release()


def damaged(path: object, name: str, found: object) -> WeightsError:
    """The error for an array whose bytes are not what the file says."""
    return WeightsError(f"{path}: array {name!r} is damaged ({found}). Download or copy the file again.")


@contextlib.contextmanager
def blaming(path: object, name: str) -> Iterator[None]:
    """What goes wrong while an array is read, with its name."""
    try:
        yield
    except EOFError as error:
        raise damaged(path, name, error) from error
    except OSError as error:
        raise WeightsError(f"{path}: cannot read array {name!r}: {error.strerror or error}") from error
