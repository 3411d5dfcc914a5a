"""The two ends of the decoder that are as wide as the vocabulary: embedding tokens, and the loss of predicting them.

Inside `jax.shard_map` each device holds some rows of the embedding (`axis="fsdp"`), and never gathers the others: at
257,152 x 2,048 they are a gigabyte, the hidden states of all devices some megabytes. So every device embeds what it
can of all devices' tokens, and scores all devices' hidden states against its rows. With `axis=None` the embedding is
whole.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pgdist.models.attention import softcap
from pgdist.train.collectives import sum_and_scatter


def embed(table: jax.Array, tokens: jax.Array, *, dtype: DTypeLike, axis: str | None) -> jax.Array:
    """int[B, T] -> dtype[B, T, D], multiplied by sqrt(D).  table: this device's rows [V / shards, D]."""
    index = _of_all_devices(tokens, axis) - _first_row(table, axis)
    is_here = (index >= 0) & (index < table.shape[0])
    rows = jnp.where(is_here[..., None], table[jnp.where(is_here, index, 0)], 0).astype(dtype)
    # One device alone has the row, the others zeros: adding them up is exact.
    return _sum_to_owners(rows, axis) * jnp.asarray(table.shape[1] ** 0.5, dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """How targets are scored.

    block: positions of each row whose logits exist at a time: memory is B*block*V, not B*S*V.  softcap: of the logits,
    0 for none.  label_smoothing: e, with which the target weighs 1-e and each other token e/(V-1).  axis: of the mesh,
    over which the embedding's rows are split.  trains_table: whether the embedding gets a gradient.
    """

    block: int
    softcap: float = 0.0
    label_smoothing: float = 0.0
    axis: str | None = None
    trains_table: bool = True


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_loss(
    how: Scoring, hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(sum of weights * negative log-likelihood of the targets in nats, float32[]; whether each target is the
    likeliest token, float32[B, S]).

    hidden: dtype[B, S, D], final-norm outputs.  table: this device's rows [V / shards, D] of the embedding.  targets:
    int[B, S].  weights: float32[B, S].  The loss is of this device's rows.

    The gradients are formed together with the loss, while the logits are there: those are never formed again.
    """
    loss, correct, _, _ = _score(how, hidden, table, targets, weights, with_gradients=False)
    return loss, correct


def _forward(how, hidden, table, targets, weights):
    loss, correct, d_hidden, d_table = _score(how, hidden, table, targets, weights, with_gradients=True)
    return (loss, correct), (d_hidden, d_table, jnp.zeros((), table.dtype))


def _backward(how, residuals, gradients):
    d_hidden, d_table, like = residuals
    scale, _ = gradients
    d_hidden = (d_hidden.astype(jnp.float32) * scale).astype(d_hidden.dtype)
    if d_table is not None:
        # The scale is one number in all devices: that of the mean over the global batch.
        d_table = (d_table * scale).astype(like.dtype)
    return d_hidden, d_table, None, None


weighted_loss.defvjp(_forward, _backward)


def _score(how, hidden, table, targets, weights, *, with_gradients):
    """Loss and correctness of this device's rows; gradients of hidden and table for a cotangent of one."""
    axis, rows = how.axis, hidden.shape[0]
    length = targets.shape[1]
    blocks = -(-length // how.block)
    padding = blocks * how.block - length

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(rows, blocks, how.block, *x.shape[2:]).swapaxes(0, 1)

    table_in_dtype = table.astype(hidden.dtype)
    first = _first_row(table, axis)
    vocabulary = table.shape[0] * _size(axis)
    trains_table = with_gradients and how.trains_table

    def score_block(d_table, xs):
        hidden, targets, weights = (_of_all_devices(x, axis) for x in xs)
        raw = jnp.einsum("bsd,vd->bsv", hidden, table_in_dtype, preferred_element_type=jnp.float32)
        logits = softcap(raw, how.softcap)
        largest = _max(jnp.max(logits, axis=-1), axis)
        exponentials = jnp.exp(logits - largest[..., None])
        total = _sum(jnp.sum(exponentials, axis=-1), axis)
        normalizer = largest + jnp.log(total)
        index = targets - first
        is_here = (index >= 0) & (index < table.shape[0])
        is_target = jax.nn.one_hot(jnp.where(is_here, index, -1), table.shape[0], dtype=jnp.bool_)
        target_logit = _sum(jnp.sum(jnp.where(is_target, logits, 0), axis=-1), axis)
        loss = normalizer - target_logit
        on_target, on_others = 1.0, 0.0
        if how.label_smoothing:
            on_others = how.label_smoothing / (vocabulary - 1)
            on_target = 1.0 - how.label_smoothing - on_others
            all_losses = vocabulary * normalizer - _sum(jnp.sum(logits, axis=-1), axis)
            loss = on_target * loss + on_others * all_losses
        correct = target_logit >= largest
        ours = _own_rows(jnp.sum(loss * weights, axis=-1), axis)
        found = (jnp.sum(ours), _own_rows(correct.astype(jnp.float32), axis))
        if not with_gradients:
            return d_table, (*found, None)
        share = (on_target + vocabulary * on_others) / total
        d_logits = exponentials * share[..., None] - jnp.where(is_target, on_target, 0.0) - on_others
        if how.softcap:
            d_logits = d_logits * (1.0 - jnp.square(logits / how.softcap))
        d_logits = (d_logits * weights[..., None]).astype(hidden.dtype)
        d_hidden = jnp.einsum("bsv,vd->bsd", d_logits, table_in_dtype, preferred_element_type=jnp.float32)
        d_hidden = _sum_to_owners(d_hidden, axis).astype(hidden.dtype)
        if trains_table:
            d_table += jnp.einsum("bsv,bsd->vd", d_logits, hidden, preferred_element_type=jnp.float32)
        return d_table, (*found, d_hidden)

    start = jnp.zeros(table.shape, jnp.float32) if trains_table else None
    d_table, (loss, correct, d_hidden) = jax.lax.scan(
        score_block, start, tuple(map(split, (hidden, targets, weights)))
    )

    def join(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(rows, -1, *x.shape[3:])[:, :length]

    return jnp.sum(loss), join(correct), None if d_hidden is None else join(d_hidden), d_table


def _first_row(table: jax.Array, axis: str | None) -> jax.Array | int:
    return 0 if axis is None else jax.lax.axis_index(axis) * table.shape[0]


def _size(axis: str | None) -> int:
    return 1 if axis is None else jax.lax.axis_size(axis)


def _of_all_devices(x: jax.Array, axis: str | None) -> jax.Array:
    return x if axis is None else jax.lax.all_gather(x, axis, axis=0, tiled=True)


def _own_rows(x: jax.Array, axis: str | None) -> jax.Array:
    """This device's rows of what all devices have computed alike."""
    if axis is None:
        return x
    rows = x.shape[0] // jax.lax.axis_size(axis)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * rows, rows)


def _sum_to_owners(x: jax.Array, axis: str | None) -> jax.Array:
    """The sum over devices of x, each device keeping the rows that it gave to `_of_all_devices`."""
    return x if axis is None else sum_and_scatter(x, axis, axis=0)


def _sum(x: jax.Array, axis: str | None) -> jax.Array:
    return x if axis is None else jax.lax.psum(x, axis)


def _max(x: jax.Array, axis: str | None) -> jax.Array:
    return x if axis is None else jax.lax.pmax(x, axis)
