"""The objective against its closed form in float64, and what may not change it: masked rows and blocks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgdist.models import PaliGemma
from pgdist.models.paligemma import normalize_image
from pgdist.train import objective
from pgdist.train.objective import BatchLoss, batch_loss
from tests.models.small import SMALL, random_batch, random_parameters
from tests.train.test_vocabulary import losses_in_float64

CONFIG = SMALL["paligemma"]
MODEL = PaliGemma(CONFIG)
PARAMS = random_parameters(CONFIG, seed=0)
PREFIXES, SUFFIXES, LENGTH = (5, 3, 6, 4), (6, 1, 3, 7), 14
ROWS = len(PREFIXES)


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    return random_batch(CONFIG, prefixes=PREFIXES, suffixes=SUFFIXES, length=LENGTH, seed=seed)


@pytest.mark.parametrize("rows", [3, 8, 24])
def test_the_block_keeps_logits_within_what_a_device_may_hold(rows):
    vocabulary, limit = 257_152, objective._LOGITS_PER_DEVICE

    block = objective._block_size((rows, 127), vocabulary)

    assert block * rows * vocabulary <= limit < (block + 1) * rows * vocabulary
    assert objective._block_size((1, 5), 320) == 5  # a small model has all at once
    assert objective._block_size((10**6, 127), vocabulary) == 1


@functools.partial(jax.jit, static_argnames="max_scored_positions")
def sums(params, batch, max_scored_positions: int = 0) -> BatchLoss:
    return batch_loss(MODEL, params, batch, max_scored_positions=max_scored_positions)


def score(batch: dict[str, np.ndarray], *, at_most: int = 0) -> BatchLoss:
    return jax.tree.map(float, sums(PARAMS, batch, at_most))


@jax.jit
@jax.grad
def gradients(params, batch):
    """Of the mean loss over the batch's real examples, by all parameters."""
    found = sums(params, batch)
    return found.loss / jnp.maximum(1.0, found.examples)


@pytest.fixture(scope="module")
def expected_losses() -> np.ndarray:
    """Of each token of `batch()`, float64[B, T - 1], from the model's logits."""
    rows = batch()
    logits = jax.jit(MODEL.apply)(
        {"params": PARAMS},
        normalize_image(rows["image"]),
        rows["text"][:, :-1],
        rows["mask_ar"][:, :-1],
        rows["mask_input"][:, :-1],
    )
    return losses_in_float64(np.asarray(logits, np.float64), rows["text"][:, 1:])


def example_losses(token_losses: np.ndarray, *, at_most: int = LENGTH) -> np.ndarray:
    """The mean over each example's suffix tokens, of which the first `at_most` count, float64[B]."""
    starts = np.array(PREFIXES) - 1  # the target at t is the token at t + 1
    counts = np.minimum(SUFFIXES, at_most)
    return np.array(
        [
            token_losses[row, start : start + n].mean()
            for row, (start, n) in enumerate(zip(starts, counts, strict=True))
        ]
    )


def test_the_loss_is_a_mean_over_examples_of_means_over_tokens(expected_losses):
    found = score(batch())

    assert found.examples == ROWS and found.tokens == sum(SUFFIXES)
    assert found.loss == pytest.approx(example_losses(expected_losses).sum(), rel=1e-5)
    over_tokens = sum(
        n * loss for n, loss in zip(SUFFIXES, example_losses(expected_losses), strict=True)
    ) / sum(SUFFIXES)
    assert abs(found.loss / ROWS - over_tokens) > 0.01  # another number here, or the test says nothing


def test_at_most_so_many_suffix_tokens_are_scored(expected_losses):
    three = score(batch(), at_most=3)
    assert three.tokens == sum(min(3, n) for n in SUFFIXES)
    assert three.loss == pytest.approx(example_losses(expected_losses, at_most=3).sum(), rel=1e-5)
    longest = score(batch(), at_most=max(SUFFIXES))
    assert longest.loss == pytest.approx(score(batch()).loss, rel=1e-6)
    assert longest.tokens == sum(SUFFIXES)
    assert longest.correct_tokens == score(batch()).correct_tokens


def with_masked_row(content: dict[str, np.ndarray], *, row: int) -> dict[str, np.ndarray]:
    """`batch()` with one row of weight 0 that has the content of that row of another batch."""
    masked = {name: array.copy() for name, array in batch().items()}
    for name, array in content.items():
        masked[name][row] = array[row]
    masked["weight"][row] = 0.0
    return masked


def test_a_masked_row_changes_nothing_whatever_it_holds(expected_losses):
    blank = {name: np.zeros_like(array) for name, array in batch().items()}
    unmasked = batch(seed=9)
    for row in (0, ROWS - 1):
        variants = [with_masked_row(content, row=row) for content in (batch(), unmasked, blank)]

        of_the_others = np.delete(example_losses(expected_losses), row).sum()
        for variant in variants:
            found = score(variant)
            assert found.examples == ROWS - 1
            assert found.tokens == sum(SUFFIXES) - SUFFIXES[row]
            assert found.loss == pytest.approx(of_the_others, rel=1e-5)
        first, *others = [jax.tree.leaves(gradients(PARAMS, variant)) for variant in variants]
        for other in others:
            assert all(same_bits(one, another) for one, another in zip(first, other, strict=True))
        assert any(np.any(leaf) for leaf in first)


def same_bits(one: jax.Array, other: jax.Array) -> bool:
    return np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_batch_of_masked_rows_alone_has_no_loss_and_no_gradient():
    masked = batch() | {"weight": np.zeros(ROWS, np.float32)}

    assert score(masked).loss == score(masked).examples == score(masked).tokens == 0.0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients(PARAMS, masked)))


def test_an_image_that_goes_to_another_text_changes_the_loss():
    permuted = batch() | {"image": np.roll(batch()["image"], 1, axis=0)}

    assert abs(score(permuted).loss - score(batch()).loss) > 0.01
    together = {name: np.roll(array, 1, axis=0) for name, array in batch().items()}
    assert score(together).loss == pytest.approx(score(batch()).loss, rel=1e-6)
