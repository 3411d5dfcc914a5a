"""The arrays of safetensors files: one file, or the shards that an index names.

The format is a length (8 bytes, little-endian), a JSON header with dtype, shape and byte range of each tensor, and the
data. It has no checksums.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from pgdist import files
from pgdist.errors import WeightsError
from pgdist.weights.array_info import ArrayInfo
from pgdist.weights.byte_source import ByteSource, open_bytes
from pgdist.weights.stored import BFLOAT16, ByteRange, FileArray

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
# The format's names of numbers that a model can be made of.
DTYPES = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BFLOAT16,
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U8": np.dtype("u1"), "BOOL": np.dtype("?"),
}  # fmt: skip
_LARGEST_HEADER = 100 * 10**6  # bytes, the format's own limit
# What reading JSON of another form, or nested without end, raises.
_NOT_AS_IT_SHOULD_BE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


class SafetensorsReader:
    """An open file, or all shards of an index. Use as a context manager; WeightsError for what is wrong with it.

    arrays: by the file's own names, in the order of the data.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.arrays: dict[str, FileArray] = {}
        self._headers: list[tuple[str, int, str]] = []
        with contextlib.ExitStack() as stack:
            if self.path.endswith(INDEX_SUFFIX):
                self._open_shards(stack)
            else:
                self._open_file(self.path, stack)
            self._sources = stack.pop_all()

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._sources.close()

    def fingerprint(self) -> str:
        """Hex digest of the headers, and of a sample of the data: the format has no checksums to compare."""
        digest = hashlib.sha256(repr(self._headers).encode())
        for name in sorted(self.arrays):
            digest.update(self._sample(name))
        return digest.hexdigest()

    def _sample(self, name: str) -> bytes:
        """The first kilobyte of an array."""
        array = self.arrays[name]
        count = min(math.prod(array.info.shape), 1024 // array.info.dtype.itemsize)
        return array.read((math.prod(array.info.shape),), ((0, count),)).numbers.tobytes()

    def _open_shards(self, stack: contextlib.ExitStack) -> None:
        weight_map = _read_index(self.path)
        folder = self.path.rpartition("/")[0]
        shards = list(dict.fromkeys(weight_map.values()))
        if bad := [shard for shard in shards if os.path.basename(shard) != shard]:
            raise WeightsError(
                f"{self.path}: names a shard outside its folder: {bad[0]!r}. Use another file."
            )
        paths = {shard: os.path.join(folder, shard) for shard in shards}
        missing = [
            shard for shard, path in paths.items() if not files.is_url(path) and not os.path.exists(path)
        ]
        if missing:
            raise WeightsError(
                f"{self.path}: names {len(shards)} shards, of which {len(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not there: {', '.join(missing[:5])}. Download them again."
            )
        for path in paths.values():
            self._open_file(path, stack)
        if lost := [name for name in weight_map if name not in self.arrays]:
            raise WeightsError(
                f"{self.path}: array {lost[0]!r} is not in {weight_map[lost[0]]}, where the index says it is"
                f"{f', and {len(lost) - 1} more' if len(lost) > 1 else ''}. Download index and shards again."
            )

    def _open_file(self, path: str, stack: contextlib.ExitStack) -> None:
        source = stack.enter_context(contextlib.closing(open_bytes(path)))
        header, start = _read_header(source)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
            if name in self.arrays:
                raise WeightsError(
                    f"{path}: array {name!r} is in another shard too. Download the shards again."
                )
            begin = entry["data_offsets"][0]
            info = ArrayInfo(name=name, shape=tuple(entry["shape"]), dtype=DTYPES[entry["dtype"]])
            self.arrays[name] = FileArray(info, data=ByteRange(source=source, start=start + begin), path=path)
        self._headers.append((os.path.basename(path), source.size, json.dumps(header, sort_keys=True)))


def _read_index(path: str) -> Mapping[str, str]:
    with contextlib.closing(open_bytes(path)) as source:
        content = source.read(0, source.size).tobytes()
    try:
        weight_map = json.loads(content)["weight_map"]
        if not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError("its weight_map is empty, or names no files")
    except _NOT_AS_IT_SHOULD_BE as error:
        raise WeightsError(
            f"{path}: expected JSON with a weight_map from arrays to shards, found: {error}. Download it again."
        ) from error
    return weight_map


def _read_header(source: ByteSource) -> tuple[dict[str, dict[str, Any]], int]:
    """{name: its entry}, all of them checked, and where the data begins."""
    advice = "Download or copy the file again."
    start = source.read(0, min(8, source.size)).tobytes()
    size = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= size <= _LARGEST_HEADER:
        what = "it is empty" if not start else "it does not begin as one"
        what = "it is a Git LFS pointer" if start == b"version " else what
        raise WeightsError(f"{source.name}: not a safetensors file: {what}. {advice}")
    if 8 + size > source.size:
        raise WeightsError(f"{source.name}: is cut short, within its header. {advice}")
    try:
        header = json.loads(source.read(8, size).tobytes(), object_pairs_hook=_without_duplicates)
        header.pop("__metadata__", None)
        data_size = source.size - 8 - size
        for name, entry in header.items():
            _check_entry(name, entry)
    except _NOT_AS_IT_SHOULD_BE as error:
        found = f"no {error}" if isinstance(error, KeyError) else error
        raise WeightsError(f"{source.name}: its header is damaged: {found}. {advice}") from error
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end > data_size:
        raise WeightsError(f"{source.name}: is cut short: {end - data_size} bytes are missing. {advice}")
    for (name, entry), previous in _neighbours(header):
        if entry["data_offsets"][0] < previous:
            raise WeightsError(f"{source.name}: array {name!r} overlaps the one before it. {advice}")
    return header, 8 + size


def _neighbours(header: Mapping[str, dict[str, Any]]):
    """Each entry in the order of the data, with the end of the one before."""
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        yield (name, entry), end
        end = entry["data_offsets"][1]


def _check_entry(name: str, entry: Mapping[str, Any]) -> None:
    """Raises ValueError, KeyError or TypeError where it is not one."""
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"array {name!r} holds {dtype}, expected one of {', '.join(DTYPES)}")
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"array {name!r} has the shape {shape} and lies at {begin} to {end}")
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"array {name!r} is {dtype} {shape} and has {end - begin} bytes")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is in it twice")
    return found
