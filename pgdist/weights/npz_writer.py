"""Writing an npz array by array into a temporary file that takes its name when it is complete."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pgdist.errors import WeightsError
from pgdist.weights import boxes, layout
from pgdist.weights.casting import cast, check_range
from pgdist.weights.local_path import local_path

_BLOCK_SIZE = 4 * 2**20  # elements
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_STORED_BFLOAT16 = np.dtype("V2")  # as published: numpy has no name for bfloat16


class NpzWriter:
    """A new npz at `path`: after the context it is on disk and in place, or after an error not there."""

    def __init__(self, path: str | os.PathLike[str], *, dtype: np.dtype | None = None):
        # A link keeps pointing where it points; the file behind it is the one that is replaced.
        self.path = Path(os.path.realpath(local_path(path)))
        self._dtype = None if dtype is None else np.dtype(dtype)
        self._partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.partial")

    def __enter__(self) -> NpzWriter:
        with self._blaming():
            if self.path.is_dir():
                raise IsADirectoryError(0, "it is a folder; name the file itself")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("xb")
            self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        try:
            with self._blaming() if error_type is None else contextlib.suppress(Exception), self._file:
                self._zip.close()
                self._file.flush()
                os.fsync(self._file.fileno())
            if error_type is None:
                with self._blaming():
                    os.replace(self._partial, self.path)
                    _sync_folder(self.path.parent)
        finally:
            self._partial.unlink(missing_ok=True)

    def write(self, name: str, array: np.ndarray, key_value: np.ndarray | None = None) -> None:
        """Appends one array; with `key_value` it is a query array, and both are stored as one fused array."""
        if key_value is None:
            self.write_parts(name, shape=array.shape, dtype=array.dtype, parts=[array])
        else:
            self._write_fused(name, array, key_value)

    def _write_fused(self, name: str, query: np.ndarray, key_value: np.ndarray) -> None:
        """[..., 3, N, D, H] from query [..., N, D, H] and key_value [..., 2, N, D, H], layer by layer."""
        shape = layout.fused_shape(query.shape, key_value.shape)
        if shape is None:
            raise ValueError(f"{name}: cannot fuse {query.shape} and {key_value.shape}")
        lead = itertools.product(*(range(size) for size in shape[:-4]))
        pieces = (piece for i in lead for piece in (query[i], key_value[i]))
        dtype = np.promote_types(query.dtype, key_value.dtype)
        self.write_parts(name, shape=shape, dtype=dtype, parts=pieces)

    def write_parts(
        self, name: str, *, shape: tuple[int, ...], dtype: np.dtype, parts: Iterable[np.ndarray]
    ) -> None:
        """Appends one array whose data comes in parts, in C order."""
        if self._dtype is not None and jnp.issubdtype(dtype, jnp.floating):
            dtype = self._dtype
        stored = _STORED_BFLOAT16 if dtype == _BFLOAT16 else dtype
        # zipfile's own date for entries made by hand, 1980: the same arrays give the same bytes.
        entry = zipfile.ZipInfo(name + ".npy")
        with self._blaming(), self._zip.open(entry, "w", force_zip64=True) as stream:
            _write_npy_header(stream, shape=shape, dtype=stored)
            for part in parts:
                for box in boxes.split(part.shape, max_size=_BLOCK_SIZE):
                    block = part[boxes.within(box, boxes.whole(part.shape))]
                    numbers = cast(block, dtype)
                    check_range(numbers, source=block, name=name, path=self.path)
                    stream.write(numbers.tobytes())

    @contextlib.contextmanager
    def _blaming(self):
        try:
            yield
        except OSError as error:
            raise WeightsError(
                f"{self.path}: cannot write the weights: {error.strerror or error}. "
                "Nothing that was there has changed; name another place or make room."
            ) from error


def _write_npy_header(stream: IO[bytes], *, shape: tuple[int, ...], dtype: np.dtype) -> None:
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})


def _sync_folder(folder: Path) -> None:
    """Makes the new name durable; file systems that cannot do this are left alone."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
