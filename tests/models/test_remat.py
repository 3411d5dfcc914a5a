"""Rematerialization changes what is kept for the backward pass, and no number."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgdist.models import PaliGemma, normalize_image
from pgdist.models.remat import REMAT_POLICIES
from pgdist.parameters import flatten
from tests.models.small import SMALL, random_batch, random_parameters, with_image, with_text


def make_loss(policy: str):
    """params -> float32[], a smooth function of all logits of a small batch."""
    config = with_image(with_text(SMALL["paligemma2"], remat=policy), remat=policy)
    batch = random_batch(config, prefixes=[3, 6], suffixes=[5, 2], length=9, seed=0)
    image = normalize_image(jnp.asarray(batch["image"]))
    text = batch["text"], batch["mask_ar"], batch["mask_input"]
    return lambda params: jnp.mean(PaliGemma(config).apply({"params": params}, image, *text) ** 2)


@functools.cache
def gradients(policy: str) -> dict[str, np.ndarray]:
    params = random_parameters(SMALL["paligemma2"], seed=0)
    return jax.tree.map(np.asarray, flatten(jax.jit(jax.grad(make_loss(policy)))(params)))


def kept_bytes(policy: str) -> int:
    """Bytes of what the forward pass hands to the backward pass."""
    params = random_parameters(SMALL["paligemma2"], seed=0)
    backward = jax.eval_shape(lambda p: jax.vjp(make_loss(policy), p)[1], params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))


@pytest.mark.parametrize("policy", [policy for policy in REMAT_POLICIES if policy != "none"])
def test_gradients_are_those_without_rematerialization(policy):
    expected = gradients("none")
    assert expected.keys() == gradients(policy).keys()
    for name, gradient in gradients(policy).items():
        # Recomputed values are fused, and so rounded, differently.
        scale = np.abs(expected[name.replace("key/bias", "key/kernel")]).max()
        np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=1e-5 * scale, err_msg=name)


def test_each_policy_keeps_less_than_the_one_before():
    kept = [kept_bytes(policy) for policy in ("none", "dots", "full")]
    assert kept[0] > kept[1] > kept[2]


@pytest.mark.parametrize("change", [with_text, with_image])
def test_unknown_policy_is_a_key_error(change):
    config = change(SMALL["paligemma"], remat="half")
    with pytest.raises(KeyError):
        jax.eval_shape(
            PaliGemma(config).init,
            jax.random.key(0),
            jnp.zeros((1, 56, 56, 3)),
            jnp.zeros((1, 2), jnp.int32),
            jnp.zeros((1, 2), jnp.int32),
        )
