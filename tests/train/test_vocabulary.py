"""Embedding and loss against their closed forms in float64, whole and with the embedding's rows split over devices."""

from __future__ import annotations

import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pgdist.mesh import AXES, make_mesh
from pgdist.train import vocabulary
from pgdist.train.gathering import spread
from pgdist.train.vocabulary import Scoring, weighted_loss

ROWS, LENGTH, WIDTH, WORDS = 8, 10, 16, 40


def losses_in_float64(
    logits: np.ndarray, targets: np.ndarray, *, softcap: float = 0.0, smoothing: float = 0.0
) -> np.ndarray:
    """Cross-entropy of float64[B, S, V] with 1 - e at the target and e / (V - 1) elsewhere, float64[B, S]."""
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    log_probabilities = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    wanted = np.full(logits.shape, smoothing / (logits.shape[-1] - 1))
    np.put_along_axis(wanted, targets[..., None], 1 - smoothing, axis=-1)
    return -np.sum(wanted * log_probabilities, axis=-1)


def gradients_in_float64(hidden, table, targets, weights, *, softcap: float, smoothing: float):
    """Of sum(weights * loss) by hidden and table: d loss / d logit is its probability minus what is wanted."""
    raw = hidden @ table.T
    logits = softcap * np.tanh(raw / softcap) if softcap else raw
    probabilities = np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
    wanted = np.full(logits.shape, smoothing / (logits.shape[-1] - 1))
    np.put_along_axis(wanted, targets[..., None], 1 - smoothing, axis=-1)
    by_logit = (probabilities - wanted) * weights[..., None]
    if softcap:
        by_logit *= 1 - (logits / softcap) ** 2
    return by_logit @ table, np.einsum("bsv,bsd->vd", by_logit, hidden)


def inputs():
    rng = np.random.default_rng(0)
    hidden, table = rng.standard_normal((ROWS, LENGTH, WIDTH)), rng.standard_normal((WORDS, WIDTH))
    return hidden, table, rng.integers(0, WORDS, (ROWS, LENGTH)), rng.random((ROWS, LENGTH))


def scored(how: Scoring, mesh=None):
    """(loss, correct) and the gradients by hidden and table; on a mesh with rows of the table over `fsdp`."""

    def local(hidden, table, targets, weights):
        def loss(hidden, table):
            return weighted_loss(
                how, hidden, table if mesh is None else spread(table, "data"), targets, weights
            )

        (found, correct), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, table)
        return found if mesh is None else jax.lax.psum(found, AXES), correct, gradients

    if mesh is None:
        return jax.jit(local)
    rows, split = PartitionSpec(AXES), PartitionSpec("fsdp")
    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(rows, split, rows, rows),
            out_specs=(PartitionSpec(), rows, (rows, split)),
            check_vma=False,
        )
    )


@pytest.mark.parametrize("mesh_shape", [None, (1, 8), (2, 4)], ids=str)
@pytest.mark.parametrize("block", [1, 3, 10, 64])
@pytest.mark.parametrize(("softcap", "smoothing"), [(0.0, 0.0), (3.0, 0.0), (0.0, 0.2), (30.0, 0.4)])
def test_loss_and_gradients_follow_the_closed_form_in_any_blocks(mesh_shape, block, softcap, smoothing):
    mesh = None if mesh_shape is None else make_mesh(data=mesh_shape[0], fsdp=mesh_shape[1])
    how = Scoring(block=block, softcap=softcap, label_smoothing=smoothing, axis=mesh and "fsdp")
    hidden, table, targets, weights = inputs()

    floats = (np.float32(hidden), np.float32(table), targets, np.float32(weights))
    loss, correct, (by_hidden, by_table) = scored(how, mesh)(*floats)

    logits = hidden @ table.T
    expected = losses_in_float64(logits, targets, softcap=softcap, smoothing=smoothing)
    # Logits up to 20: float32 has 2e-6 there; 80 losses are added up.
    np.testing.assert_allclose(loss, np.sum(weights * expected), rtol=1e-5)
    np.testing.assert_array_equal(correct, np.argmax(logits, axis=-1) == targets)
    of_hidden, of_table = gradients_in_float64(
        hidden, table, targets, weights, softcap=softcap, smoothing=smoothing
    )
    np.testing.assert_allclose(by_hidden, of_hidden, rtol=0, atol=1e-5)
    np.testing.assert_allclose(by_table, of_table, rtol=0, atol=5e-5)


def test_smoothing_stays_exact_over_the_published_vocabulary():
    rng = np.random.default_rng(0)
    words = 257_152
    hidden = rng.standard_normal((1, 2, 8)).astype(np.float32)
    table = rng.standard_normal((words, 8)).astype(np.float32)
    targets = np.array([[7, words - 1]])

    loss, _ = weighted_loss(
        Scoring(block=1, label_smoothing=0.2), hidden, table, targets, np.ones((1, 2), np.float32)
    )

    logits = hidden.astype(np.float64) @ table.astype(np.float64).T
    np.testing.assert_allclose(loss, losses_in_float64(logits, targets, smoothing=0.2).sum(), rtol=1e-6)


def test_vocabulary_logits_exist_for_one_block_at_a_time_and_are_formed_once():
    rows, length, words, block = 2, 12, 1000, 3

    def loss(hidden, table):
        targets = jnp.zeros((rows, length), int)
        return weighted_loss(Scoring(block=block), hidden, table, targets, jnp.ones((rows, length)))[0]

    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(
        jnp.zeros((rows, length, 8)), jnp.zeros((words, 8))
    )

    outputs = [(equation.primitive.name, shape) for equation, shape in computed(program.jaxpr)]
    wide = [shape for _, shape in outputs if words in shape and 8 not in shape]
    assert max(math.prod(shape) for shape in wide) == rows * block * words
    assert [shape for name, shape in outputs if name == "dot_general"].count((rows, block, words)) == 1


def computed(jaxpr):
    """(equation, shape) of everything that a program computes, the programs inside it included."""
    for equation in jaxpr.eqns:
        yield from ((equation, variable.aval.shape) for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from computed(inner)


def test_a_frozen_embedding_gets_no_gradient_and_costs_none():
    how = Scoring(block=3, trains_table=False)
    hidden, table, targets, weights = inputs()
    loss = functools.partial(weighted_loss, how)
    program = jax.make_jaxpr(jax.grad(lambda h: loss(h, table, targets, weights)[0]))(np.float32(hidden))
    assert not [
        1
        for equation, shape in computed(program.jaxpr)
        if shape == (WORDS, WIDTH) and equation.primitive.name == "dot_general"
    ]


@pytest.mark.parametrize("mesh_shape", [None, (1, 8), (2, 4)], ids=str)
def test_tokens_are_embedded_exactly_wherever_their_rows_are(mesh_shape):
    _, table, tokens, _ = inputs()
    table = np.float32(table)
    embed = functools.partial(vocabulary.embed, dtype=jnp.float32)
    if mesh_shape is None:
        found = embed(table, tokens, axis=None)
    else:
        mesh = make_mesh(data=mesh_shape[0], fsdp=mesh_shape[1])
        specs = (PartitionSpec("fsdp"), PartitionSpec(AXES))
        embed = functools.partial(embed, axis="fsdp")
        found = jax.jit(jax.shard_map(embed, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(AXES)))(
            table, tokens
        )
    np.testing.assert_array_equal(found, table[tokens] * np.float32(WIDTH**0.5))
