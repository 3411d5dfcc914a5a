"""Parameters split over the mesh: brought together where they are used, their gradients added up where they live.

Fully sharded data parallelism, said explicitly, for code inside `jax.shard_map`: a layer casts its shard to the dtype
it computes in, gathers it over `fsdp` just before it is used (and again in the backward pass, where the layer is
recomputed), and its gradient, each device's share of it in float32, is reduced and scattered back to the shards.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from pgdist.errors import ConfigError
from pgdist.mesh import AXES
from pgdist.models.attention import choose, why_not
from pgdist.models.paligemma import PaliGemma, PaliGemmaConfig
from pgdist.parameters import flatten, map_named, merge
from pgdist.train.accumulation import sum_over_microbatches
from pgdist.train.collectives import sum_and_scatter
from pgdist.train.objective import BatchLoss, batch_loss

PyTree = Any
DATA, FSDP = AXES
_EMBEDDING = "llm/embedder/input_embedding"
_LAYERS = {
    "img": "img/Transformer/encoderblock/",
    "llm": "llm/layers/",
}  # by tower, where its scanned layers are


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(shard: jax.Array, axis: int, dtype: DTypeLike) -> jax.Array:
    """The whole array in `dtype`, of shards that `fsdp` splits along `axis`; differentiable in the shard.

    The gradient is float32 in between: cast before it is added up over devices, reduced and scattered along `axis`.
    """
    return jax.lax.all_gather(shard.astype(dtype), FSDP, axis=axis, tiled=True)


def _gather_forward(shard: jax.Array, axis: int, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    return gather(shard, axis, dtype), jnp.zeros((), shard.dtype)


def _gather_backward(axis: int, dtype: DTypeLike, like: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    total = sum_and_scatter(gradient.astype(jnp.float32), FSDP, axis=axis)
    return (jax.lax.psum(total, DATA).astype(like.dtype),)


gather.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def spread(param: jax.Array, axes: str | tuple[str, ...] = AXES) -> jax.Array:
    """A parameter that all devices along `axes` have alike, for each to use by itself; its gradients are added up over
    them in float32.
    """
    return param


def _spread_forward(param: jax.Array, axes: str | tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    return param, jnp.zeros((), param.dtype)


def _spread_backward(axes: str | tuple[str, ...], like: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.psum(gradient.astype(jnp.float32), axes).astype(like.dtype),)


spread.defvjp(_spread_forward, _spread_backward)


class ShardedModel:
    """A model's loss on a mesh, each device computing that of its rows with parameters that come and go by layer."""

    def __init__(
        self,
        model: PaliGemma,
        *,
        mesh: Mesh,
        parameters: Mapping[str, NamedSharding],
        attention: str = "auto",
    ) -> None:
        """parameters: where each parameter lives, by name.  attention: how it is computed (see `models.attention`)."""
        self._mesh = mesh
        self._specs = {name: sharding.spec for name, sharding in parameters.items()}
        self._split = {name: split_axis(spec) for name, spec in self._specs.items()}
        self._dtypes = {"img": model.config.image.dtype, "llm": model.config.text.dtype}
        config = with_attention(model.config, attention, mesh)
        self._model = PaliGemma(config, self._layer_params("img"), self._layer_params("llm"))

    def loss(self, params: PyTree, batch: Mapping[str, jax.Array], **how: Any) -> BatchLoss:
        """Sums over the global batch; see `objective.batch_loss` for `how`."""

        def local(params: PyTree, batch: Mapping[str, jax.Array]) -> BatchLoss:
            return jax.lax.psum(self._local_loss(params, batch, trains_table=False, **how), AXES)

        return self._map(local, (self._specs_of(params), PartitionSpec(AXES)), PartitionSpec())(params, batch)

    def loss_and_gradients(
        self,
        trainable: PyTree,
        frozen: PyTree,
        batch: Mapping[str, jax.Array],
        *,
        accumulation_steps: int = 1,
        **how: Any,
    ) -> tuple[jax.Array, BatchLoss, PyTree]:
        """(mean loss over the unmasked examples of the global batch, its sums, gradients of `trainable`), each
        gradient where its parameter lives.

        accumulation_steps: microbatches that each device computes its rows in. Each gathers every layer's weights and
        reduces and scatters its gradients, so that never more than one layer is whole.
        """
        specs = self._specs_of(trainable)
        trains_table = _EMBEDDING in flatten(trainable)

        def local(
            trainable: PyTree, frozen: PyTree, batch: Mapping[str, jax.Array]
        ) -> tuple[jax.Array, BatchLoss, PyTree]:
            examples = jnp.maximum(1.0, jax.lax.psum(jnp.sum(batch["weight"]), AXES))

            def share_of_loss(
                trainable: PyTree, rows: Mapping[str, jax.Array]
            ) -> tuple[jax.Array, BatchLoss]:
                params = merge(trainable, frozen)
                sums = self._local_loss(params, rows, trains_table=trains_table, **how)
                return sums.loss / examples, sums

            value_and_gradients = jax.value_and_grad(share_of_loss, has_aux=True)
            (loss, sums), gradients = sum_over_microbatches(
                value_and_gradients, trainable, batch, steps=accumulation_steps
            )
            return *jax.lax.psum((loss, sums), AXES), gradients

        in_specs = (specs, self._specs_of(frozen), PartitionSpec(AXES))
        out_specs = (PartitionSpec(), PartitionSpec(), specs)
        return self._map(local, in_specs, out_specs)(trainable, frozen, batch)

    def _map(self, local: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        # Kernels do not say over which axes their results vary, so that JAX cannot check it.
        return jax.shard_map(local, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def _specs_of(self, params: PyTree) -> PyTree:
        return map_named(lambda name, _: self._specs[name], params)

    def _local_loss(self, params: PyTree, batch: Mapping[str, jax.Array], **how: Any) -> BatchLoss:
        axis = None if self._split[_EMBEDDING] is None else FSDP
        return batch_loss(self._model, map_named(self._prepare, params), batch, axis=axis, **how)

    def _prepare(self, name: str, shard: jax.Array) -> jax.Array:
        """A parameter as the model takes it; those of layers stay split until their layer is computed."""
        if name == _EMBEDDING and self._split[name] is not None:
            return spread(shard, DATA)
        if self._split[name] is None:
            return spread(shard)
        if name.startswith(tuple(_LAYERS.values())):
            return shard
        return gather(shard, self._split[name], self._dtypes[name.partition("/")[0]])

    def _layer_params(self, tower: str) -> Callable[[PyTree], PyTree]:
        def bring_together(name: str, shard: jax.Array) -> jax.Array:
            axis = self._split[_LAYERS[tower] + name]
            if axis is None:
                return shard
            return gather(shard, axis - 1, self._dtypes[tower])  # one less: a layer has no layers' axis

        return lambda params: map_named(bring_together, params)


def with_attention(config: PaliGemmaConfig, attention: str, mesh: Mesh) -> PaliGemmaConfig:
    """The config with each tower's attention chosen, for code inside `jax.shard_map` over the mesh.  Raises ConfigError
    for one that the devices cannot do.
    """
    device = mesh.devices.flat[0]

    def of_tower(tower: Any, head_dim: int, logits_softcap: float) -> Any:
        task = {"head_dim": head_dim, "dtype": tower.dtype, "logits_softcap": logits_softcap}
        if attention == "auto":  # text is short beside the image
            return dataclasses.replace(
                tower, attention=choose(device, length=config.image.num_tokens, **task)
            )
        if reason := why_not(attention, device, **task):
            raise ConfigError(f"config.model.attention={attention}: {reason}; leave it at auto.")
        return dataclasses.replace(tower, attention=attention)

    image, text = config.image, config.text
    return PaliGemmaConfig(
        image=of_tower(image, image.width // image.num_heads, 0.0),
        text=of_tower(text, text.head_dim, text.attn_logits_softcap),
    )


def split_axis(spec: PartitionSpec) -> int | None:
    """The axis that `fsdp` splits, None for an array that is whole."""
    return list(spec).index(FSDP) if FSDP in spec else None
