"""The step as it is optimised, on meshes and with recomputation, against the objective written out in float32.

How far apart they may be follows from rounding. One rounding to a significand of p bits is off by 2^-(p+1) of the
number, in the mean square. From the image to the loss the small model rounds some 60 times in a row (ten times a
layer), and back to its first weights as often; a weight's gradient is a product of what went forth and what comes
back, which needs what went forth once more. Errors that point anywhere add up like the steps of a random walk: some
200 of them to sqrt(200) = 14, for which we allow 20, as shares of an array's norm. Products of matrices add in float32
whatever they multiply: in float32 alone those additions, some 100 for each number, count too, and a rounding there
stands for sqrt(100 / 2) = 7 of them, for which we allow 8.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgdist.mesh import batch_sharding, make_mesh, parameter_sharding, put_batch
from pgdist.models import PaliGemma, PaliGemmaConfig, attention
from pgdist.parameters import flatten, unflatten
from pgdist.train.gathering import ShardedModel
from tests.models.small import SMALL, flat_shapes, random_parameters, with_image, with_text
from tests.tiny_runs import host
from tests.train.plain_loss import plain_loss
from tests.train.small_training import BATCH, batch_of_step

CONFIG = with_text(SMALL["paligemma2"], final_logits_softcap=5.0)
OBJECTIVE = {"max_scored_positions": 4, "label_smoothing": 0.1}
EVERYTHING, ATTENTION = ".*", "llm/layers/attn/.*"
ONE_ROUNDING = {"float32": 8 * 2.0**-25, "bfloat16": 2.0**-9}
IN_A_ROW = 20


@functools.cache
def plain() -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of all parameters."""
    loss = functools.partial(plain_loss, CONFIG, **OBJECTIVE)
    found, gradients = jax.jit(jax.value_and_grad(loss))(random_parameters(CONFIG, seed=0), batch_of_step(0))
    return float(found), host(gradients)


def optimised(
    config: PaliGemmaConfig, *, data: int, fsdp: int, trained: str, how_attended: str = "auto"
) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of the parameters that match `trained`."""
    mesh = make_mesh(data=data, fsdp=fsdp)
    placement = {name: parameter_sharding(mesh, name, shape) for name, shape in flat_shapes(config).items()}
    model = ShardedModel(PaliGemma(config), mesh=mesh, parameters=placement, attention=how_attended)
    params = flatten(random_parameters(config, seed=0))
    trainable = {name: array for name, array in params.items() if re.fullmatch(trained, name)}
    frozen = {name: array for name, array in params.items() if name not in trainable}
    batch = put_batch(batch_of_step(0), sharding=batch_sharding(mesh), batch_size=BATCH)
    compute = jax.jit(functools.partial(model.loss_and_gradients, **OBJECTIVE))
    loss, _, gradients = compute(unflatten(trainable), unflatten(frozen), batch)
    return float(loss), host(gradients)


def assert_near(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], *, dtype: str) -> None:
    for name, gradient in found.items():
        assert gradient.dtype == np.float32, name
        # The image tower's key biases have no gradient but rounding: see test_meshes_agree.
        scale = np.linalg.norm(expected[name.replace("key/bias", "key/kernel")])
        error = np.linalg.norm(gradient - expected[name]) / scale
        assert error <= IN_A_ROW * ONE_ROUNDING[dtype], name


@pytest.mark.parametrize(
    ("mesh", "remat", "trained", "how_attended"),
    [
        ((1, 8), "none", EVERYTHING, "plain"),
        ((1, 8), "dots", ATTENTION, "plain"),
        ((1, 8), "full", EVERYTHING, "plain"),
        ((2, 4), "none", ATTENTION, "plain"),
        ((2, 4), "dots", EVERYTHING, "chunked"),
        ((2, 4), "full", EVERYTHING, "plain"),
    ],
    ids=str,
)
def test_float32_loss_and_gradients_are_the_plain_ones(monkeypatch, mesh, remat, trained, how_attended):
    monkeypatch.setattr(
        attention, "_LOGITS_AT_ONCE", 512
    )  # of 768 for an image, 3,600 for a row of all tokens
    config = with_image(with_text(CONFIG, remat=remat), remat=remat)

    loss, gradients = optimised(
        config, data=mesh[0], fsdp=mesh[1], trained=trained, how_attended=how_attended
    )

    expected_loss, expected = plain()
    assert loss == pytest.approx(expected_loss, rel=IN_A_ROW * ONE_ROUNDING["float32"])
    assert gradients.keys() == {name for name in expected if re.fullmatch(trained, name)}
    assert_near(gradients, expected, dtype="float32")


def test_bfloat16_loss_and_gradients_follow_the_plain_ones_as_near_as_its_rounding_allows():
    """The loss lies as near as logits do, which are of order 1 (see test_dtypes): sqrt(60) = 8 roundings."""
    config = with_image(with_text(CONFIG, dtype=jnp.bfloat16, remat="full"), dtype=jnp.bfloat16, remat="full")

    loss, gradients = optimised(config, data=2, fsdp=4, trained=EVERYTHING)

    expected_loss, expected = plain()
    assert loss == pytest.approx(expected_loss, rel=0, abs=8 * ONE_ROUNDING["bfloat16"])
    assert_near(gradients, expected, dtype="bfloat16")
    with pytest.raises(AssertionError):  # or it was float32 in disguise
        assert_near(gradients, expected, dtype="float32")
