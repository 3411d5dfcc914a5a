"""From blocks that stream by to a sharded jax.Array, with host memory for this process's shards alone."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from pgdist.weights import boxes
from pgdist.weights.boxes import Box
from pgdist.weights.layout import Part


class ShardBuffers:
    """Host buffers for the shards of one array that this process's devices hold; replicas share a buffer."""

    def __init__(self, part: Part, *, dtype: np.dtype, sharding: Sharding | None):
        self._shape = part.info.shape
        self._dtype = dtype
        self._sharding = sharding
        whole = boxes.whole(self._shape)
        if sharding is None:
            self._box_of_device = {None: whole}
        else:
            slices = sharding.addressable_devices_indices_map(self._shape)
            self._box_of_device = {device: boxes.from_slices(s, self._shape) for device, s in slices.items()}
        self._stored_box = {box: part.stored_box(box) for box in self._box_of_device.values()}
        self._buffers = {
            box: np.empty(boxes.shape_of(stored), dtype) for box, stored in self._stored_box.items()
        }

    def write(self, box: Box, block: np.ndarray) -> None:
        """Copies (and casts) what the shards need of `block`, which is `box` of the stored array."""
        for shard, stored in self._stored_box.items():
            shared = boxes.intersect(box, stored)
            if shared is not None:
                self._buffers[shard][boxes.within(shared, stored)] = block[boxes.within(shared, box)]

    def to_devices(self) -> jax.Array:
        """The array on its sharding (on the default device if there is none); the host buffers are let go."""
        shards = {box: buffer.reshape(boxes.shape_of(box)) for box, buffer in self._buffers.items()}
        self._buffers = {}
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
