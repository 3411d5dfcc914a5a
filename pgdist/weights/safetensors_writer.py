"""Writing safetensors files whose tensors come in any order and in parts, so that no more than a part is in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pgdist.weights.safetensors_reader import DTYPES, INDEX_SUFFIX, SUFFIX

_SHARD_BYTES = 5 * 10**9  # as published
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_WRITE = 2**30  # bytes; Linux takes at most 2 GiB at once
_ALIGNMENT = 8  # bytes, of the header's end


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    file: Path
    offset: int
    dtype: np.dtype


class SafetensorsWriter:
    """One `model.safetensors` in a folder, or shards of at most 5 GB with an index. A context manager.

    tensors: {name: (shape, dtype)} of all that will be written, in the order of the files. Raises OSError.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
        *,
        shard_bytes: int = _SHARD_BYTES,
    ) -> None:
        self._places: dict[str, _Place] = {}
        self._files: dict[Path, int] = {}
        self._open_files = contextlib.ExitStack()
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in tensors.items()}
        shards = _split(sizes, shard_bytes)
        with contextlib.ExitStack() as on_error:
            on_error.enter_context(self._open_files)
            for number, names in enumerate(shards, start=1):
                name = (
                    f"model{SUFFIX}"
                    if len(shards) == 1
                    else f"model-{number:05d}-of-{len(shards):05d}{SUFFIX}"
                )
                self._lay_out(folder / name, {name: tensors[name] for name in names})
            if len(shards) > 1:
                weight_map = {name: place.file.name for name, place in sorted(self._places.items())}
                index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
                (folder / f"model{INDEX_SUFFIX}").write_text(json.dumps(index, indent=2) + "\n")
            on_error.pop_all()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        with self._open_files:
            if error_type is None:
                for descriptor in self._files.values():
                    os.fsync(descriptor)

    def write(self, name: str, numbers: np.ndarray, *, first: int) -> None:
        """A part of a tensor, as many elements as there are from element `first` on, in C order."""
        place = self._places[name]
        if numbers.dtype != place.dtype:
            raise ValueError(f"{name}: expected {place.dtype}, found {numbers.dtype}")
        data = np.ascontiguousarray(numbers).reshape(-1).view(np.uint8).data
        _write(self._files[place.file], data, place.offset + first * place.dtype.itemsize)

    def _lay_out(self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (shape, dtype) in tensors.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        begin = 8 + len(text)
        self._files[path] = descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        self._open_files.callback(os.close, descriptor)
        _write(descriptor, memoryview(len(text).to_bytes(8, "little") + text), 0)
        # Room for all of it now: a full disk is an error before anything is read.
        if end and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, begin + end)
        for name, (_, dtype) in tensors.items():
            start = header[name]["data_offsets"][0]
            self._places[name] = _Place(file=path, offset=begin + start, dtype=dtype)


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data[:_LARGEST_WRITE], offset)
        data, offset = data[count:], offset + count


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names in order, in groups of at most `limit` bytes, or of one that is larger."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups
