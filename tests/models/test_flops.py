"""The closed form of model FLOPs, against published figures and against the products that JAX would compute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend
import numpy as np
import pytest

from pgdist.models import PRESETS, PaliGemma
from pgdist.models.flops import training_flops
from pgdist.parameters import flatten, merge, unflatten
from pgdist.train.objective import batch_loss
from tests.models.small import SMALL, flat_shapes, random_batch, random_parameters

LENGTH = 12
TRAINED = {
    "all": "",
    "attention of the decoder": "llm/layers/attn/",
    "feed-forward of the decoder": "llm/layers/mlp/",
    "final norm": "llm/final_norm/",
    "embedding": "llm/embedder/",
    "connector": "img/head/",
    "norms of the image tower": "img/Transformer/encoderblock/LayerNorm_0/",
    "position embedding": "img/pos_embedding",
}


@pytest.mark.parametrize(
    ("size", "attention", "everything"), [(224, 3.72, 5.68), (448, 11.35, 17.6), (896, 48.5, 74.9)]
)
def test_the_published_3b_costs_what_was_counted_by_hand(size, attention, everything):
    config = PRESETS[f"paligemma-3b-{size}"]
    names = list(flat_shapes(config))

    def teraflops(trainable: list[str]) -> float:
        return training_flops(config, text_length=128, trainable=trainable) / 1e12

    assert teraflops([name for name in names if "/attn/" in name]) == pytest.approx(attention, rel=2e-3)
    assert teraflops(names) == pytest.approx(everything, rel=2e-3)


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("generation", SMALL)
def test_the_closed_form_counts_the_products_of_the_gradients_program(generation, trained):
    config = SMALL[generation]
    trainable = [name for name in flat_shapes(config) if name.startswith(TRAINED[trained])]

    expected = training_flops(config, text_length=LENGTH, trainable=trainable)

    assert _flops_of_program(generation, trainable) == expected


def test_only_scored_positions_have_logits():
    config = SMALL["paligemma"]
    names = list(flat_shapes(config))
    few = training_flops(config, text_length=LENGTH, max_scored_positions=5, trainable=names)

    assert _flops_of_program("paligemma", names, max_scored_positions=5) == few
    assert few < training_flops(config, text_length=LENGTH, max_scored_positions=0, trainable=names)
    assert training_flops(
        config, text_length=LENGTH, max_scored_positions=99, trainable=names
    ) == training_flops(config, text_length=LENGTH, trainable=names)


def _flops_of_program(generation: str, trainable: list[str], *, max_scored_positions: int = 0) -> float:
    """An example's share of the matrix products in the program of loss and gradients, loops weighted by length."""
    config = SMALL[generation]
    rows = 2
    batch = random_batch(config, prefixes=[3, 4], suffixes=[4, 5], length=LENGTH, seed=0)
    params = flatten(random_parameters(config, seed=0))
    trained = unflatten({name: array for name, array in params.items() if name in trainable})
    frozen = unflatten({name: array for name, array in params.items() if name not in trainable})

    def loss(trained: Any, frozen: Any, batch: Any) -> jax.Array:
        return batch_loss(
            PaliGemma(config),
            merge(trained, frozen),
            batch,
            max_scored_positions=max_scored_positions,
            trains_table="llm/embedder/input_embedding" in trainable,
        ).loss

    return _flops(jax.make_jaxpr(jax.grad(loss))(trained, frozen, batch).jaxpr) / rows


def _flops(jaxpr: jax.extend.core.Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        assert equation.primitive.name != "while"  # of unknown length
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            factor = np.array(equation.invars[0].aval.shape)[list(contracted)]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * float(np.prod(factor))
        passes = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += passes * sum(map(_flops, _inner(equation)))
    return total


def _inner(equation: Any) -> Iterator[jax.extend.core.Jaxpr]:
    """The programs that an equation calls."""
    for found in equation.params.values():
        if isinstance(found, jax.extend.core.ClosedJaxpr):
            yield found.jaxpr
        elif isinstance(found, jax.extend.core.Jaxpr):
            yield found
