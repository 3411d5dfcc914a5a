"""The two steps of decoding, reading prompts and reading a token, with weights whole or split over a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pgdist.decode.logits import Logits
from pgdist.mesh import AXES
from pgdist.models.attention import softcap
from pgdist.models.gemma import SplitMlp
from pgdist.models.paligemma import DecodingState, PaliGemma, normalize_image
from pgdist.parameters import map_named
from pgdist.train import vocabulary
from pgdist.train.collectives import sum_and_scatter
from pgdist.train.gathering import gather, split_axis, with_attention

PyTree = Any
FSDP = AXES[1]
_EMBEDDING = "llm/embedder/input_embedding"


class Steps(Protocol):
    """A model with its parameters, as a loop over tokens needs it."""

    def prefill(
        self, image: jax.Array, prompt: jax.Array, mask: jax.Array, *, max_new_tokens: int
    ) -> tuple[Logits, DecodingState]:
        """uint8[B, S, S, 3], int32[B, P], bool[B, P] -> logits of the first new token, and the state."""
        ...

    def extend(self, token: jax.Array, state: DecodingState) -> tuple[Logits, DecodingState]:
        """int32[B] -> logits of the next token, and the state."""
        ...

    def any(self, flags: jax.Array) -> jax.Array:
        """bool[B] -> bool[]: whether one of all rows, those of other devices too, is true."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeSteps:
    """`Steps` of a model whose parameters are whole wherever they are used."""

    model: PaliGemma
    params: PyTree

    def prefill(self, image, prompt, mask, *, max_new_tokens):
        image = normalize_image(image)
        return self._apply("prefill", image, prompt, mask, max_new_tokens=max_new_tokens)

    def extend(self, token, state):
        return self._apply("extend", token, state)

    def any(self, flags):
        return jnp.any(flags)

    def _apply(self, method: str, *arguments: Any, **more: Any) -> tuple[Logits, DecodingState]:
        logits, state = self.model.apply({"params": self.params}, *arguments, method=method, **more)
        return Logits(part=logits), state


class SplitSteps:
    """`Steps` inside `jax.shard_map`, of this device's rows and its shards of the parameters (`decode.placement`)."""

    def __init__(
        self, model: PaliGemma, params: PyTree, *, mesh: Mesh, shardings: Mapping[str, NamedSharding]
    ) -> None:
        """params: this device's shards."""
        self._config = model.config
        self._reading_config = with_attention(model.config, "auto", mesh)
        self._split = {name: split_axis(sharding.spec) for name, sharding in shardings.items()}
        self._shards = mesh.shape[FSDP]
        self._table = params["llm"]["embedder"]["input_embedding"]
        self._axis = None if self._split[_EMBEDDING] is None else FSDP
        self._dtype = {"img": model.config.image.dtype, "llm": model.config.text.dtype}
        self._params = map_named(self._prepare, params)

    def prefill(self, image, prompt, mask, *, max_new_tokens):
        # With hundreds of tokens a row, the rows are more than the weights: these come together, layer by layer.
        model = PaliGemma(
            self._reading_config,
            image_layer_params=self._gather_layer("img/Transformer/encoderblock/"),
            text_layer_params=self._gather_layer("llm/layers/"),
        )
        hidden, state = model.apply(
            {"params": self._params},
            normalize_image(image),
            self._embed(prompt),
            mask,
            max_new_tokens=max_new_tokens,
            method="prefill_embedded",
        )
        return self._logits(hidden), state

    def extend(self, token, state):
        text, split = self._config.text, None
        if self._split["llm/layers/mlp/linear"] is not None:
            text = dataclasses.replace(text, mlp_dim=text.mlp_dim // self._shards)
            split = SplitMlp(
                gather=lambda rows: jax.lax.all_gather(rows, FSDP, axis=0, tiled=True),
                scatter=lambda rows: sum_and_scatter(rows, FSDP, axis=0),
            )
        model = PaliGemma(dataclasses.replace(self._config, text=text), split_mlp=split)
        hidden, state = model.apply(
            {"params": self._params}, self._embed(token[:, None]), state, method="extend_embedded"
        )
        return self._logits(hidden), state

    def any(self, flags):
        return jax.lax.pmax(jnp.any(flags).astype(jnp.int32), AXES) > 0

    def _embed(self, tokens: jax.Array) -> jax.Array:
        return vocabulary.embed(self._table, tokens, dtype=self._dtype["llm"], axis=self._axis)

    def _logits(self, hidden: jax.Array) -> Logits:
        """Of [B, D]: each device scores the rows of all against its part of the vocabulary."""
        if self._axis is not None:
            hidden = jax.lax.all_gather(hidden, self._axis, axis=0, tiled=True)
        table = self._table.astype(hidden.dtype)
        logits = jnp.einsum("bd,vd->bv", hidden, table, preferred_element_type=jnp.float32)
        return Logits(part=softcap(logits, self._config.text.final_logits_softcap), axis=self._axis)

    def _prepare(self, name: str, shard: jax.Array) -> jax.Array:
        """A parameter as the model takes it; those of the image tower's layers stay split until their layer."""
        axis = self._split[name]
        if axis is None or not name.startswith("img/") or name.startswith("img/Transformer/encoderblock/"):
            return shard
        return gather(shard, axis, self._dtype["img"])

    def _gather_layer(self, prefix: str) -> Callable[[PyTree], PyTree]:
        def whole(name: str, shard: jax.Array) -> jax.Array:
            axis = self._split[prefix + name]
            return shard if axis is None else gather(shard, axis - 1, self._dtype[prefix[:3]])

        return lambda params: map_named(whole, params)


def map_over_mesh(
    function: Callable[..., PyTree], *, mesh: Mesh, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`jax.shard_map` of a function over this device's rows and shards."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


ROWS = PartitionSpec(AXES)
