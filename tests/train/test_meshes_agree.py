"""Training on one device and on any mesh of eight: equal up to rounding, and bitwise from run to run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from pgdist.finetune import finetune
from pgdist.mesh import make_mesh
from tests.models.small import random_parameters
from tests.tiny_runs import assert_same_bits, host, largest_difference, losses, tiny_config, write_inputs
from tests.train.small_training import CONFIG, STEPS, Training, batch_of_step, small_training

MESHES = {"8x1": (8, 1), "1x8": (1, 8), "2x4": (2, 4)}
# Sums over a mesh are added in another order: float32 rounds parameters of order 1 by 6e-8 a step.
TOLERANCE = 1e-5
ADAM_RATE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    losses: np.ndarray
    params: dict[str, np.ndarray]


def train(training: Training) -> Trained:
    state, found = training.start(), []
    for step in range(STEPS):
        state, metrics = training.step(state, {}, training.place(batch_of_step(step)))
        found.append(float(metrics["loss"]))
    return Trained(losses=np.array(found), params=host(state.trainable))


def mesh_of(name: str) -> Mesh:
    if name == "one device":
        return make_mesh(devices=jax.devices()[:1])
    data, fsdp = MESHES[name]
    return make_mesh(data=data, fsdp=fsdp)


@pytest.fixture(scope="module")
def on_one_device() -> Trained:
    return train(small_training(mesh_of("one device")))


@pytest.mark.parametrize("name", MESHES)
def test_sgd_agrees_with_one_device_and_repeats_itself_to_the_bit(on_one_device, name):
    training = small_training(mesh_of(name))
    found, again = train(training), train(training)

    np.testing.assert_allclose(found.losses, on_one_device.losses, rtol=0, atol=TOLERANCE)
    assert largest_difference(found.params, on_one_device.params) <= TOLERANCE
    moved = largest_difference(found.params, host(random_parameters(CONFIG, seed=0)))
    assert moved > 1000 * TOLERANCE  # or agreement says nothing
    assert found.losses.tolist() == again.losses.tolist()
    assert_same_bits(again.params, found.params)


def test_adamw_stays_within_its_bounds_of_one_device():
    """Adam divides a gradient by its own size. The attention's key biases have no gradient but rounding: they
    add the same to all logits of a query, which changes no softmax. So each of their steps may go either way,
    by at most the learning rate. Anything else has a gradient far above its rounding, and differs by less
    than a tenth of one step.
    """
    one, other = (
        train(small_training(mesh_of(name), optimizer="adamw", learning_rate=ADAM_RATE))
        for name in ("one device", "2x4")
    )

    np.testing.assert_allclose(other.losses, one.losses, rtol=0, atol=TOLERANCE)
    noise = [name for name in one.params if name.endswith("/key/bias")]
    assert noise
    for name in one.params:
        bound = 2 * STEPS * ADAM_RATE if name in noise else ADAM_RATE / 10
        assert np.max(np.abs(one.params[name] - other.params[name])) <= bound, name


def test_whole_runs_on_one_device_and_on_eight_agree(tmp_path: Path):
    inputs = write_inputs(tmp_path / "inputs")
    eight = finetune(tiny_config(inputs, **{"mesh.data": 8}), workdir=tmp_path / "8x1")
    one = finetune(tiny_config(inputs), workdir=tmp_path / "one", devices=jax.devices()[:1])

    assert losses(tmp_path / "8x1").keys() == set(range(1, 21))
    assert losses(tmp_path / "8x1") == pytest.approx(losses(tmp_path / "one"), rel=0, abs=TOLERANCE)
    assert largest_difference(host(eight.params), host(one.params)) <= TOLERANCE
