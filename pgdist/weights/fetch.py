"""From devices to the host, one array at a time, without leaving copies behind.

JAX keeps the host copy of an array as long as the array lives, so that fetching a model array by array
would leave all of it in host memory; here each shard is read through a throw-away handle on the same device
buffer. An array spread over several processes is gathered slice by slice, so that no device holds all of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from pgdist.weights import boxes

_GATHER_BYTES = (
    256 * 2**20
)  # a slice, on every device; small beside a model, large beside a collective's latency

Array = jax.Array | np.ndarray


def is_spread(arrays: Iterable[Array]) -> bool:
    """Whether any of the arrays lives on devices of several processes, so that these must all take part."""
    return any(isinstance(array, jax.Array) and not array.is_fully_addressable for array in arrays)


def host_copies(groups: Mapping[str, Sequence[Array]]) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Each name with its arrays on the host, one group at a time; let go of one before asking for the next.

    For arrays spread over processes this is a collective: every process has to go through all of it.
    """
    for name, arrays in groups.items():
        yield name, [host_copy(array) for array in arrays]


def host_copy(array: Array) -> np.ndarray:
    """The whole array on the host of every process that holds a part of it."""
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    if array.size == 0:
        return np.empty(array.shape, array.dtype)
    if not array.is_fully_addressable and not array.is_fully_replicated:
        return _gathered(array)
    shards = {boxes.from_slices(shard.index, array.shape): shard for shard in array.addressable_shards}
    if len(shards) == 1:
        return _shard_copy(next(iter(shards.values())))
    result = np.empty(array.shape, array.dtype)
    for box, shard in shards.items():
        result[boxes.within(box, boxes.whole(array.shape))] = _shard_copy(shard)
    return result


def _shard_copy(shard: jax.Shard) -> np.ndarray:
    data = shard.data
    handle = jax.make_array_from_single_device_arrays(data.shape, data.sharding, [data])
    return np.asarray(handle)


def _gathered(array: jax.Array) -> np.ndarray:
    """Gathers slices along an axis that is not split, where cutting a slice moves nothing between devices."""
    shard_shape = array.sharding.shard_shape(array.shape)
    unsplit = [axis for axis, size in enumerate(array.shape) if shard_shape[axis] == size]
    axis = max(unsplit, key=lambda axis: array.shape[axis], default=None)
    if axis is None:
        return np.asarray(_replicated_slice(array, 0, axis=0, size=array.shape[0]))
    bytes_per_entry = array.dtype.itemsize * math.prod(array.shape) // array.shape[axis]
    size = min(array.shape[axis], max(1, _GATHER_BYTES // bytes_per_entry))
    result = np.empty(array.shape, array.dtype)
    for start in range(0, array.shape[axis], size):
        start = min(start, array.shape[axis] - size)  # the last slice overlaps: one program serves them all
        part = _replicated_slice(array, start, axis=axis, size=size)
        result[(slice(None),) * axis + (slice(start, start + size),)] = part.addressable_data(0)
    return result


def _replicated_slice(array: jax.Array, start: int, *, axis: int, size: int) -> jax.Array:
    return _slicer(array.sharding, axis, size)(array, start)


@functools.lru_cache(maxsize=64)  # one a kind of array; a model has about thirty
def _slicer(sharding: Sharding, axis: int, size: int):
    if not isinstance(sharding, NamedSharding):
        raise NotImplementedError(f"gathering from {type(sharding).__name__}; use a NamedSharding")
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=size, axis=axis)
    return jax.jit(cut, out_shardings=everywhere)
