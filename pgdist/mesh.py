"""The data/fsdp mesh: where every parameter and every row of a batch lives on it.

The batch is split over both axes, parameters over `fsdp` along a dimension that is written down here for
each of them. What that dimension cannot give (a vector, a size that the axis does not divide) stays whole on
every device, and the parameter table says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pgdist.errors import ConfigError

AXES = ("data", "fsdp")

# The dimension that `fsdp` splits. It is the model width wherever a layer's array has one: widths (1152 = 2^7 * 9,
# 2048, 2304 = 2^8 * 9, 3584 = 2^9 * 7, 4608 = 2^9 * 9) divide by 128, while 4304 = 16 * 269 and head counts do not.
# The embedding is split along the vocabulary (257,152 = 128 * 2009): its rows stay where they are (see
# `pgdist.train.vocabulary`). Norms, biases and other vectors a layer are too small to be worth a gather.
_SPLIT_DIMENSION = tuple(
    (re.compile(pattern), dimension)
    for pattern, dimension in (
        (r"img/embedding/kernel", 3),
        (r"img/pos_embedding", 2),
        (r"img/.*/(query|key|value)/kernel", 1),
        (r"img/.*/out/kernel", 3),
        (r"img/.*/Dense_0/kernel", 1),
        (r"img/.*/Dense_1/kernel", 2),
        (r"img/head/kernel", 1),
        (r"llm/embedder/input_embedding", 0),
        (r"llm/layers/attn/q_einsum/w", 2),
        (r"llm/layers/attn/kv_einsum/w", 3),
        (r"llm/layers/attn/attn_vec_einsum/w", 3),
        (r"llm/layers/mlp/gating_einsum", 2),
        (r"llm/layers/mlp/linear", 2),
    )
)


def make_mesh(*, data: int = 1, fsdp: int = -1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp) mesh over all devices; one of the two may be -1, for all that the other leaves.

    Raises ConfigError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    sizes = {"data": data, "fsdp": fsdp}
    for name, size in sizes.items():
        if size == 0 or size < -1:
            raise ConfigError(
                f"config.mesh.{name}: expected a positive number or -1 (all that is left), found {size}."
            )
    if data == -1 and fsdp == -1:
        raise ConfigError(
            "config.mesh: data and fsdp are both -1 (all that is left): give one of them a number, such as 1."
        )
    if data == -1:
        data = count // fsdp
    if fsdp == -1:
        fsdp = count // data
    if data * fsdp != count or not data:
        raise ConfigError(
            f"config.mesh: data={sizes['data']} x fsdp={sizes['fsdp']} does not fit {count} device(s): "
            f"their product must be {count}. Set one of them to -1, or simulate devices on a CPU with "
            "--fake_devices=N."
        )
    # Auto axes: with Explicit ones a scan over sharded layers is refused (DuplicateSpecError).
    return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def parameter_sharding(mesh: Mesh, name: str, shape: Sequence[int]) -> NamedSharding:
    """Where the parameter lives: split over `fsdp` along its written dimension, or whole."""
    for pattern, dimension in _SPLIT_DIMENSION:
        if pattern.fullmatch(name):
            if shape[dimension] % mesh.shape["fsdp"] == 0:
                return NamedSharding(mesh, PartitionSpec(*[None] * dimension, "fsdp"))
            break
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(mesh: Mesh, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, NamedSharding]:
    """`parameter_sharding` of each parameter by its name."""
    return {name: parameter_sharding(mesh, name, leaf.shape) for name, leaf in shapes.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises ConfigError when the batch does not divide by the number of devices."""
    if batch_size % mesh.size:
        raise ConfigError(
            f"config.batch_size={batch_size} cannot be split evenly over the {mesh.size} devices of the mesh: "
            f"use a multiple of {mesh.size}."
        )


def host_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, int[rows], ascending; see `check_batch_size`."""
    check_batch_size(batch_size, sharding.mesh)
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows = [np.arange(batch_size)[index] for (index,) in indices]
    return np.unique(np.concatenate(rows))


def put_batch(
    arrays: Mapping[str, np.ndarray], *, sharding: NamedSharding, batch_size: int
) -> dict[str, jax.Array]:
    """Global arrays [B, ...] of this process's rows [rows, ...], which are those of `host_rows`, in that
    order.
    """
    rows = host_rows(sharding, batch_size)

    def put(local: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = np.searchsorted(rows, start)
            return local[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, shard)

    return {name: put(local) for name, local in arrays.items()}
