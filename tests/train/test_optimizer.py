"""Schedules against their closed forms, and updates against a few lines of numpy."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from pgdist.config import default_config
from pgdist.errors import ConfigError
from pgdist.parameters import flatten, unflatten
from pgdist.train.optimizer import decayed_names, make_optimizer, make_schedule, relative_rate

TOTAL = 40


def closed_form(s: int, *, name: str, W: int, C: int, T: int = TOTAL, end: float = 0.0) -> float:
    """The published implementation's rate at step s, as a share of the base rate."""
    p = min(1.0, max(0.0, (s - W) / (T - W)))
    rate = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * p)),
        "linear": end + (1 - end) * (1 - p),
        "polynomial": end + (1 - end) * (1 - p) ** 3,
        "rsqrt": 1 / math.sqrt(1 + (s - W) / 10_000) if s >= W else 1.0,
    }[name]
    warmup = min(1.0, s / W) if W else 1.0
    cooldown = min(1.0, (T - s) / C) if C else 1.0
    return rate * warmup * cooldown


@pytest.mark.parametrize(("W", "C"), [(0, 0), (8, 0), (0, 5), (8, 5)])
@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("constant", 0.0),
        ("cosine", 0.0),
        ("linear", 0.0),
        ("linear", 0.2),
        ("polynomial", 0.1),
        ("rsqrt", 0.0),
    ],
)
def test_schedules_follow_their_closed_forms(name, end, W, C):
    steps = np.arange(TOTAL + 1)
    found = relative_rate(
        steps, name=name, total_steps=TOTAL, warmup_steps=W, cooldown_steps=C, end=end, power=3
    )
    expected = [closed_form(int(s), name=name, W=W, C=C, end=end) for s in steps]

    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-7)  # a few roundings of float32 below 1


def test_rsqrt_falls_with_the_published_timescale():
    found = relative_rate(np.array([100, 10_100, 30_100]), name="rsqrt", total_steps=10**6, warmup_steps=100)

    np.testing.assert_allclose(found, [1.0, 2**-0.5, 0.5], rtol=1e-6)


def test_rsqrt_is_shifted_and_scaled_as_published_and_flat_before_the_warm_up_ends():
    found = relative_rate(
        np.array([0, 10, 50]), name="rsqrt", total_steps=100, warmup_steps=10, shift=20, timescale=40
    )

    # The warm-up's own factor is 0 at step 0.
    np.testing.assert_allclose(found, [0.0, (1 + 20 / 40) ** -0.5, (1 + 60 / 40) ** -0.5], rtol=1e-6)


def test_the_tutorials_64_steps_have_its_rates():
    config = default_config()
    assert (config.steps, config.schedule.name, config.schedule.warmup) == (64, "cosine", 0.1)
    W, T = 6, 65  # 10 % of 65 steps, rounded
    schedule = make_schedule(config)

    found = [float(schedule(step)) for step in range(64)]

    assert found == pytest.approx(
        [closed_form(s, name="cosine", W=W, C=0, T=T) for s in range(1, 65)], abs=3e-7
    )
    assert found[0] == pytest.approx(1 / 6) and max(found) == found[5] == 1.0  # no update at rate 0
    assert 0 < found[-1] < 0.001


def test_shares_are_rounded_to_steps_and_never_to_none():
    config = default_config()
    config.steps, config.schedule.name = 9, "constant"
    config.schedule.warmup, config.schedule.cooldown = 0.01, 0.5

    found = [float(make_schedule(config)(step)) for step in range(9)]

    assert found == pytest.approx([1.0] * 5 + [4 / 5, 3 / 5, 2 / 5, 1 / 5])


def test_an_unknown_schedule_or_optimizer_is_an_error():
    config = default_config()
    config.optimizer.name = "adam"
    with pytest.raises(ConfigError, match="one of sgd, momentum, adamw, found 'adam'"):
        make_optimizer(config, scales={}, decayed=set())
    with pytest.raises(ConfigError, match="one of constant, cosine, linear, polynomial, rsqrt, found 'cos'"):
        relative_rate(0, name="cos", total_steps=1)


SHAPES = {"img/head/kernel": (3, 4), "img/head/bias": (4,), "llm/layers/attn/q_einsum/w": (2, 5)}
SCALES = {"img/head/kernel": 1.0, "img/head/bias": 0.1, "llm/layers/attn/q_einsum/w": 3.0}
RATES = [0.5, 1.0, 0.7, 0.0, 0.2]
LR = 0.03


def random_arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def train(decayed: set[str], **fields: object) -> dict[str, np.ndarray]:
    """The parameters after five steps with given gradients and rates, as the train step applies updates."""
    config = default_config()
    with config.unlocked():
        config.optimizer.update({"learning_rate": LR, **fields})
    optimizer = make_optimizer(config, scales=SCALES, decayed=decayed)
    params = random_arrays(100)
    state = optimizer.init(unflatten(params))
    for step, rate in enumerate(RATES):
        updates, state = optimizer.update(unflatten(random_arrays(step)), state, unflatten(params))
        params = {name: params[name] - rate * update for name, update in flatten(updates).items()}
    return params


def by_hand(
    direction, *, decay: Mapping[str, float] | None = None, clip: float = math.inf
) -> dict[str, np.ndarray]:
    """The same in float64; direction(step, name, gradients of that name so far) -> the step's direction."""
    params = {name: array.astype(np.float64) for name, array in random_arrays(100).items()}
    history: dict[str, list[np.ndarray]] = {name: [] for name in params}
    for step, rate in enumerate(RATES):
        gradients = {name: array.astype(np.float64) for name, array in random_arrays(step).items()}
        norm = math.sqrt(sum(np.sum(g**2) for g in gradients.values()))
        for name, gradient in gradients.items():
            history[name].append(gradient * min(1.0, clip / norm))
            update = LR * SCALES[name] * direction(history[name])
            params[name] = params[name] - rate * (update + (decay or {}).get(name, 0.0) * params[name])
    return params


def plain(gradients: list[np.ndarray]) -> np.ndarray:
    return gradients[-1]


def momentum(gradients: list[np.ndarray], decay: float = 0.8) -> np.ndarray:
    return sum(decay**age * gradient for age, gradient in enumerate(reversed(gradients)))


def adam(gradients: list[np.ndarray], b1: float = 0.9, b2: float = 0.99, eps: float = 1e-6) -> np.ndarray:
    ages = list(enumerate(reversed(gradients)))
    mean = sum((1 - b1) * b1**age * g for age, g in ages) / (1 - b1 ** len(gradients))
    square = sum((1 - b2) * b2**age * g**2 for age, g in ages) / (1 - b2 ** len(gradients))
    return mean / (np.sqrt(square) + eps)


ADAM = {"name": "adamw", "b1": 0.9, "b2": 0.99, "eps": 1e-6}
DECAYED = {"img/head/kernel": 0.01}


@pytest.mark.parametrize(
    ("fields", "decayed", "expected"),
    [
        pytest.param({"name": "sgd"}, {}, {"direction": plain}, id="sgd"),
        pytest.param({"name": "momentum", "momentum": 0.8}, {}, {"direction": momentum}, id="momentum"),
        pytest.param(ADAM, {}, {"direction": adam}, id="adamw"),
        pytest.param(
            {"name": "sgd", "clip_norm": 2.0}, {}, {"direction": plain, "clip": 2.0}, id="clipped sgd"
        ),
        pytest.param(
            {"name": "momentum", "momentum": 0.8, "clip_norm": 2.0},
            {},
            {"direction": momentum, "clip": 2.0},
            id="gradients are clipped before momentum",
        ),
        pytest.param(
            {"name": "sgd", "weight_decay": 0.01}, DECAYED, {"direction": plain, "decay": DECAYED}, id="decay"
        ),
        pytest.param(
            ADAM | {"weight_decay": 0.01}, DECAYED, {"direction": adam, "decay": DECAYED}, id="decayed adamw"
        ),
    ],
)
def test_updates_are_those_worked_out_by_hand(fields, decayed, expected):
    found, by_numpy = train(set(decayed), **fields), by_hand(**expected)

    for name in SHAPES:
        # Parameters of order 1, some twenty float32 operations.
        np.testing.assert_allclose(found[name], by_numpy[name], rtol=0, atol=2e-6, err_msg=name)


def test_gradients_within_the_norm_are_not_clipped():
    for name, array in train(set(), name="sgd", clip_norm=1e6).items():
        np.testing.assert_array_equal(array, train(set(), name="sgd")[name])


def test_weight_decay_does_not_depend_on_the_learning_rate():
    found = train({"img/head/kernel"}, name="sgd", learning_rate=0.0, weight_decay=0.01)

    shrunk = math.prod(1 - 0.01 * rate for rate in RATES)
    np.testing.assert_allclose(
        found["img/head/kernel"], random_arrays(100)["img/head/kernel"] * shrunk, rtol=1e-6
    )
    np.testing.assert_array_equal(found["img/head/bias"], random_arrays(100)["img/head/bias"])


def test_decay_is_by_rule_and_a_rule_that_decays_nothing_is_an_error():
    config = default_config()
    assert decayed_names(set(SHAPES), config) == set()  # no weight decay, no matter the rule
    config.optimizer.weight_decay = 1e-6
    assert decayed_names(set(SHAPES), config) == {"img/head/kernel"}

    config.optimizer.weight_decay_on = ".*/scale"
    with pytest.raises(
        ConfigError, match=r"weight_decay_on='\.\*/scale' matches no trainable parameter: img/head/bias"
    ):
        decayed_names(set(SHAPES), config)
