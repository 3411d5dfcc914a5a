"""The data/fsdp mesh: where every parameter and every row of a batch lives on it.

The batch is split over both axes, parameters over `fsdp` along a dimension that is written down here for
each of them. What that dimension cannot give (a vector, a size that the axis does not divide) stays whole on
every device, and the parameter table says so. `fsdp` stays within a slice, the devices that a fast network joins;
`data` goes over all slices. docs/placement.md tells when each of them moves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pgdist.errors import ConfigError

AXES = ("data", "fsdp")

# So many ways, and any power of two below, every large array of every published size is split evenly.
LARGEST_FSDP = 128

# The dimension that `fsdp` splits. It is the model width wherever a layer's array has one: widths (1152 = 2^7 * 9,
# 2048, 2304 = 2^8 * 9, 3584 = 2^9 * 7, 4608 = 2^9 * 9) divide by 128, while 4304 = 16 * 269 and head counts do not.
# The embedding is split along the vocabulary (257,152 = 128 * 2009): its rows stay where they are (see
# `pgdist.train.vocabulary`). Norms, biases and other vectors a layer are too small to be worth a gather.
# W: width of the image tower, D: of the decoder, L: layers, N, K: heads, H: head size, F: MLP width, V: vocabulary.
_SPLIT_DIMENSION = tuple(
    (re.compile(pattern), dimension)
    for pattern, dimension in (
        (r"img/embedding/kernel", 3),  # [P, P, 3, W]
        (r"img/pos_embedding", 2),  # [1, tokens, W]
        (r"img/.*/(query|key|value)/kernel", 1),  # [L, W, N, H]
        (r"img/.*/out/kernel", 3),  # [L, N, H, W]
        (r"img/.*/Dense_0/kernel", 1),  # [L, W, F]
        (r"img/.*/Dense_1/kernel", 2),  # [L, F, W]
        (r"img/head/kernel", 1),  # [W, D]
        (r"llm/embedder/input_embedding", 0),  # [V, D]
        (r"llm/layers/attn/q_einsum/w", 2),  # [L, N, D, H]
        (r"llm/layers/attn/kv_einsum/w", 3),  # [L, 2, K, D, H]
        (r"llm/layers/attn/attn_vec_einsum/w", 3),  # [L, N, H, D]
        (r"llm/layers/mlp/gating_einsum", 2),  # [L, 2, D, F]
        (r"llm/layers/mlp/linear", 2),  # [L, F, D]
    )
)


def make_mesh(*, data: int = -1, fsdp: int = -1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp) mesh over all devices; see `arrange_devices` for the sizes and what is raised."""
    devices = jax.devices() if devices is None else devices
    # Auto axes: with Explicit ones a scan over sharded layers is refused (DuplicateSpecError).
    return Mesh(arrange_devices(devices, data=data, fsdp=fsdp), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange_devices(devices: Sequence[jax.Device], *, data: int, fsdp: int) -> np.ndarray:
    """The devices as object[data, fsdp].

    One size may be -1, for all that the other leaves. With both -1, fsdp is as many devices of a slice as split every
    array, and data the rest. Slices come one after the other along `data`; within one, neighbours in the mesh are
    neighbours in its torus.

    Raises ConfigError when the sizes do not multiply to the number of devices, or if fsdp crosses TPU slices.
    """
    slices = _slices(devices)
    data, fsdp = _sizes(slices, data=data, fsdp=fsdp)
    if any(len(members) % fsdp for members in slices):
        _tell_of_crossing(slices, fsdp=fsdp)
        slices = [list(devices)]
    return np.concatenate(
        [
            mesh_utils.create_device_mesh(
                (len(members) // fsdp, fsdp), members, allow_split_physical_axes=True
            )
            for members in slices
        ]
    )


def _slices(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """The devices by the fast network that joins them, as JAX tells it: chips of a TPU slice by its links, GPUs of a
    node by NVLink (or of several, where NVLink joins those). CPUs are one slice, and so are GPUs that are alone in
    their nodes.
    """
    found: dict[int, list[jax.Device]] = {}
    for device in devices:
        found.setdefault(getattr(device, "slice_index", 0), []).append(device)
    if all(len(members) == 1 for members in found.values()):
        return [list(devices)]
    return [found[index] for index in sorted(found)]


def _sizes(slices: Sequence[Sequence[jax.Device]], *, data: int, fsdp: int) -> tuple[int, int]:
    """The two sizes of the mesh, -1 replaced."""
    count = sum(map(len, slices))
    sizes = {"data": data, "fsdp": fsdp}
    for name, size in sizes.items():
        if size == 0 or size < -1:
            raise ConfigError(
                f"config.mesh.{name}: expected a positive number or -1 (all that is left), found {size}."
            )
    if data == -1 and fsdp == -1:
        fsdp = math.gcd(LARGEST_FSDP, *map(len, slices))
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
    return data, fsdp


def _tell_of_crossing(slices: Sequence[Sequence[jax.Device]], *, fsdp: int) -> None:
    """A ConfigError on TPUs, whose networks differ by more than a factor of ten; a warning elsewhere."""
    sizes = sorted({len(members) for members in slices})
    message = (
        f"config.mesh: fsdp={fsdp} crosses the {len(slices)} slices of {' or '.join(map(str, sizes))} devices: the "
        "weights of every layer would go over the slow network between them. Within one they stay with "
        f"--config.mesh.fsdp={math.gcd(fsdp, *sizes)} --config.mesh.data=-1."
    )
    if slices[0][0].platform == "tpu":
        raise ConfigError(message)
    if jax.process_index() == 0:
        logging.warning("%s", message)


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


def check_batch_size(batch_size: int, *, devices: int, accumulation_steps: int = 1) -> None:
    """Raises ConfigError when the rows of a global batch do not divide by devices and microbatches."""
    parts = devices * accumulation_steps
    if batch_size % parts:
        each = ""
        if accumulation_steps > 1:
            each = f", with config.gradient_accumulation_steps={accumulation_steps} microbatches on each"
        lower = batch_size // parts * parts
        raise ConfigError(
            f"config.batch_size={batch_size} cannot be split evenly over the {devices} devices of the mesh{each}: "
            f"use a multiple of {parts}, such as {f'{lower} or ' if lower else ''}{lower + parts}."
        )


def host_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, int[rows], ascending.

    Raises ConfigError when the batch does not divide by the number of devices.
    """
    check_batch_size(batch_size, devices=sharding.mesh.size)
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
