"""A batch in microbatches is the batch in one piece: the same sums and gradients, wherever masked rows lie."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgdist.errors import ConfigError
from pgdist.mesh import batch_sharding, check_batch_size, make_mesh, parameter_shardings, put_batch
from pgdist.models import PaliGemma
from pgdist.parameters import flatten, merge, unflatten
from pgdist.train.gathering import ShardedModel
from pgdist.train.objective import BatchLoss, batch_loss
from tests.models.small import SMALL, random_batch, random_parameters
from tests.tiny_runs import host, largest_difference
from tests.train.small_training import small_training

CONFIG = SMALL["paligemma"]
MODEL = PaliGemma(CONFIG)
DEVICES, ROWS = 8, 32  # four rows a device
ALL, ATTENTION = ".*", "llm/layers/attn/.*"
ADAM_RATE = 1e-3


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Texts of unequal lengths. Masked are the first of each device's four rows, all of the second device, and others:
    of four microbatches one has no row at all, and no two have as many.
    """
    rng = np.random.default_rng(seed)
    prefixes, suffixes = rng.integers(2, 7, ROWS).tolist(), rng.integers(1, 8, ROWS).tolist()
    found = random_batch(CONFIG, prefixes=prefixes, suffixes=suffixes, length=14, seed=seed)
    found["weight"][::4] = 0.0
    found["weight"][[5, 6, 7, 10, 14, 18, 31]] = 0.0
    return found


def split(trained: str) -> tuple[dict, dict]:
    """(trainable, frozen) nested trees of the small model's random parameters."""
    params = flatten(random_parameters(CONFIG, seed=0))
    chosen = {name for name in params if re.fullmatch(trained, name)}
    frozen = {name: array for name, array in params.items() if name not in chosen}
    return unflatten({name: params[name] for name in chosen}), unflatten(frozen)


@jax.jit
def plain(trainable: dict, frozen: dict, rows: dict) -> tuple[jax.Array, BatchLoss, dict]:
    """Loss, sums and gradients on one device, of the whole batch at once."""

    def loss(trainable: dict) -> tuple[jax.Array, BatchLoss]:
        sums = batch_loss(MODEL, merge(trainable, frozen), rows)
        return sums.loss / jnp.maximum(1.0, sums.examples), sums

    (found, sums), gradients = jax.value_and_grad(loss, has_aux=True)(trainable)
    return found, sums, gradients


@functools.cache
def expected(trained: str) -> tuple[jax.Array, BatchLoss, dict]:
    return plain(*split(trained), batch())


def in_microbatches(data: int, fsdp: int, *, steps: int, trained: str) -> tuple[jax.Array, BatchLoss, dict]:
    mesh = make_mesh(data=data, fsdp=fsdp)
    trainable, frozen = split(trained)
    shardings = parameter_shardings(mesh, flatten(merge(trainable, frozen)))
    sharded = ShardedModel(MODEL, mesh=mesh, parameters=shardings)
    rows = put_batch(batch(), sharding=batch_sharding(mesh), batch_size=ROWS)
    return jax.jit(functools.partial(sharded.loss_and_gradients, accumulation_steps=steps))(
        trainable, frozen, rows
    )


@pytest.mark.parametrize(
    ("mesh", "steps", "trained"),
    [
        ((1, 8), 2, ALL),
        ((2, 4), 4, ALL),
        ((1, 8), 4, ATTENTION),
        ((2, 4), 2, ATTENTION),
    ],
)
def test_sums_and_gradients_are_those_of_the_batch_in_one_piece(mesh, steps, trained):
    loss, sums, gradients = in_microbatches(*mesh, steps=steps, trained=trained)

    expected_loss, expected_sums, expected_gradients = expected(trained)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for name, value in vars(sums).items():
        np.testing.assert_allclose(value, getattr(expected_sums, name), rtol=1e-6, err_msg=name)
    found, wanted = host(gradients), host(expected_gradients)
    assert found.keys() == wanted.keys()
    largest = max(np.max(np.abs(array)) for array in wanted.values())
    # Some hundred float32 terms, of up to the largest gradient, added in another order.
    assert largest_difference(found, wanted) <= 1e-6 * largest


def test_a_mean_of_the_microbatches_means_would_be_another_number():
    losses = []
    for part in range(1, 4):  # the first of four has only masked rows, and no mean
        rows = {name: array[part::4] for name, array in batch().items()}
        losses.append(float(plain(*split(ATTENTION), rows)[0]))

    assert abs(np.mean(losses) - float(expected(ATTENTION)[0])) > 1e-3  # far above what is allowed above


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "rate", "tolerance"), [("sgd", 0.01, 1e-5), ("adamw", ADAM_RATE, ADAM_RATE / 10)]
)
def test_training_in_microbatches_follows_plain_training_on_one_device(optimizer, rate, tolerance):
    training = small_training(
        make_mesh(data=2), optimizer=optimizer, learning_rate=rate, accumulation_steps=4
    )
    state, (params, frozen) = training.start(), split(ALL)
    opt_state = training.optimizer.init(params)
    for seed in range(3):
        rows = batch(seed) | {"stop": np.zeros(ROWS, np.float32)}
        state, metrics = training.step(state, {}, training.place(rows))
        loss, sums, gradients = plain(params, frozen, batch(seed))
        updates, opt_state = training.optimizer.update(gradients, opt_state, params)
        params = jax.tree.map(lambda p, u: p - metrics["relative_rate"] * u, params, updates)  # noqa: B023
        assert metrics["examples"] == sums.examples
        assert float(metrics["loss"]) == pytest.approx(float(loss), abs=tolerance)

    found, wanted = host(state.trainable), host(params)
    # The image tower's key biases have no gradient but rounding, which Adam divides by itself: see test_meshes_agree.
    noise = [name for name in found if optimizer == "adamw" and name.endswith("/key/bias")]
    for name in found.keys() - noise:
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=tolerance, err_msg=name)
    assert largest_difference(found, flatten(random_parameters(CONFIG, seed=0))) > 10 * tolerance


@pytest.mark.parametrize(
    ("batch_size", "steps", "message"),
    [
        (
            24,
            2,
            r"=24 .*8 devices .*gradient_accumulation_steps=2 microbatches.*multiple of 16, such as 16 or 32",
        ),
        (8, 4, r"=8 .*gradient_accumulation_steps=4 microbatches.*multiple of 32, such as 32\.$"),
        (
            12,
            1,
            r"=12 cannot be split evenly over the 8 devices of the mesh: use a multiple of 8, such as 8 or 16",
        ),
    ],
)
def test_a_batch_that_microbatches_do_not_divide_is_an_error_with_numbers_that_fit(
    batch_size, steps, message
):
    with pytest.raises(ConfigError, match=f"config.batch_size{message}"):
        check_batch_size(batch_size, devices=DEVICES, accumulation_steps=steps)
