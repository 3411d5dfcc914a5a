"""From blocks that stream by to a sharded jax.Array, with host memory for this process's shards alone."""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from pgdist.weights import boxes
from pgdist.weights.boxes import Box

_ALIGNMENT = 64  # bytes: a CPU device takes a host buffer that is so aligned as its own, without a copy


class ShardBuffers:
    """Host buffers for the shards of one array that this process's devices hold; replicas share a buffer."""

    def __init__(self, shape: tuple[int, ...], *, dtype: np.dtype, sharding: Sharding | None):
        self._shape = shape
        self._dtype = dtype
        self._sharding = sharding
        self._box_of_device = _local_boxes(shape, sharding)
        self._buffers = {
            box: _empty(boxes.shape_of(box), dtype) for box in dict.fromkeys(self._box_of_device.values())
        }

    def write(self, box: Box, numbers: np.ndarray) -> None:
        """Copies (and casts) what the shards need of `numbers`, which are `box` of the array."""
        with np.errstate(over="ignore", invalid="ignore"):
            for shard, buffer in self._buffers.items():
                shared = boxes.intersect(box, shard)
                if shared is not None:
                    buffer[boxes.within(shared, shard)] = numbers[boxes.within(shared, box)]

    def to_devices(self) -> jax.Array:
        """The array on its sharding (on the default device if there is none); the host buffers are let go."""
        shards, self._buffers = self._buffers, {}
        if self._sharding is None:
            return jax.block_until_ready(jax.device_put(shards[boxes.whole(self._shape)]))
        kind = self._sharding.memory_kind
        on_devices = [
            jax.device_put(shards[box], SingleDeviceSharding(device, memory_kind=kind))
            for device, box in self._box_of_device.items()
        ]
        array = jax.make_array_from_single_device_arrays(
            self._shape, self._sharding, on_devices, dtype=self._dtype
        )
        return jax.block_until_ready(array)  # the next array's buffers are not to stand beside this one's


def needed_boxes(shape: tuple[int, ...], sharding: Sharding | None) -> list[Box]:
    """The different boxes of an array that this process's devices hold."""
    return list(dict.fromkeys(_local_boxes(shape, sharding).values()))


def _local_boxes(shape: tuple[int, ...], sharding: Sharding | None) -> dict[jax.Device | None, Box]:
    if sharding is None:
        return {None: boxes.whole(shape)}
    slices = sharding.addressable_devices_indices_map(shape)
    return {device: boxes.from_slices(s, shape) for device, s in slices.items()}


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An aligned array of any numbers."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
