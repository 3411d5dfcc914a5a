"""A collective that is wrong on one backend, and its stand-in there."""

from __future__ import annotations

import jax


def sum_and_scatter(x: jax.Array, axis_name: str, *, axis: int) -> jax.Array:
    """The sum of x over the devices of a mesh axis, each keeping its part along `axis`; inside `jax.shard_map`.

    This is `jax.lax.psum_scatter`, which on TPUs and GPUs moves the least. Between CPU processes it is wrong up to
    jaxlib 0.12 at least: Gloo's reduce-scatter writes its result over what it has not sent yet, so that now and then
    the end of the first device's part is garbage when parts are larger than some 60 KiB
    (https://github.com/jax-ml/jax/issues/40830). There everything is added up everywhere, which moves twice as much.
    """
    if not _goes_through_gloo():
        return jax.lax.psum_scatter(x, axis_name, scatter_dimension=axis, tiled=True)
    size = x.shape[axis] // jax.lax.axis_size(axis_name)
    total = jax.lax.psum(x, axis_name)
    return jax.lax.dynamic_slice_in_dim(total, jax.lax.axis_index(axis_name) * size, size, axis)


def _goes_through_gloo() -> bool:
    """Whether this process computes on CPUs together with others: then even its own devices speak through Gloo."""
    return jax.distributed.is_initialized() and jax.default_backend() == "cpu"
