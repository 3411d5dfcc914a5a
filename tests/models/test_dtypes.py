"""Each tower computes in its own dtype, whatever the dtype of the parameters."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgdist.models import PaliGemma, PaliGemmaConfig, normalize_image
from pgdist.models.paligemma import prefix_lm_visibility
from tests.models.small import SMALL, random_batch, random_parameters, with_image, with_text

# The tutorial's (a T4 has no bfloat16), a TPU's, and pairs that show which tower is which.
PAIRS = [("float16", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float16")]
# The unit roundoff of each dtype, 60 times in a row as a random walk.
RELATIVE_ERROR = {"float32": 8 * 2.0**-24, "bfloat16": 8 * 2.0**-9, "float16": 8 * 2.0**-11}

every_pair = pytest.mark.parametrize(("image_dtype", "text_dtype"), PAIRS)


def computing_in(*, image_dtype: str, text_dtype: str) -> PaliGemmaConfig:
    return with_image(with_text(SMALL["paligemma2"], dtype=text_dtype), dtype=image_dtype)


def inputs(config: PaliGemmaConfig) -> tuple[jax.Array, ...]:
    batch = random_batch(config, prefixes=[3, 6], suffixes=[5, 2], length=9, seed=0)
    return normalize_image(jnp.asarray(batch["image"])), *(
        jnp.asarray(batch[key]) for key in ("text", "mask_ar", "mask_input")
    )


@functools.partial(jax.jit, static_argnums=0)
def run(config: PaliGemmaConfig, params: dict, *args: jax.Array) -> jax.Array:
    return PaliGemma(config).apply({"params": params}, *args)


def equations(jaxpr) -> Iterator:
    """Every equation of a jaxpr, those of loops and inner functions included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "jaxpr"):
                    yield from equations(inner.jaxpr)
                elif hasattr(inner, "eqns"):
                    yield from equations(inner)


def dtypes_of(function, *args) -> dict[str, set[str]]:
    """Primitive name -> dtypes of its operands."""
    found: dict[str, set[str]] = {}
    for equation in equations(jax.make_jaxpr(function)(*args).jaxpr):
        found.setdefault(equation.primitive.name, set()).update(str(v.aval.dtype) for v in equation.invars)
    return found


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@every_pair
def test_each_tower_multiplies_in_its_own_dtype_and_normalizes_in_float32(
    image_dtype, text_dtype, param_dtype
):
    config = computing_in(image_dtype=image_dtype, text_dtype=text_dtype)
    model = PaliGemma(config)
    params = jax.tree.map(lambda x: x.astype(param_dtype), random_parameters(config, seed=0))
    image, *text = inputs(config)

    def image_tokens(params, image):
        return model.apply({"params": params}, image, method=lambda m, x: m.img(x))

    def decode(params, x, positions, visibility):
        def run(m, x):
            hidden, cache = m.llm(x, positions=positions, visibility=visibility)
            return m.llm.logits(hidden), hidden, cache

        return model.apply({"params": params}, x, method=run)

    x, positions = jnp.ones((1, 3, config.text.width), text_dtype), jnp.arange(3)[None]
    decoder_args = params, x, positions, prefix_lm_visibility(jnp.zeros((1, 3), int), jnp.ones((1, 3), bool))
    for found, dtype in (
        (dtypes_of(image_tokens, params, image), image_dtype),
        (dtypes_of(decode, *decoder_args), text_dtype),
    ):
        assert found["dot_general"] == {dtype}
        assert found["exp"] == found["rsqrt"] == {"float32"}  # softmax and norms

    assert jax.eval_shape(image_tokens, params, image).dtype == image_dtype
    logits, hidden, cache = jax.eval_shape(decode, *decoder_args)
    assert (logits.dtype, hidden.dtype) == (jnp.float32, text_dtype)
    assert cache.key.dtype == cache.value.dtype == text_dtype
    assert jax.eval_shape(model.apply, {"params": params}, image, *text).dtype == jnp.float32


@every_pair
def test_logits_are_as_near_to_float32_as_the_dtypes_allow(image_dtype, text_dtype):
    config = computing_in(image_dtype=image_dtype, text_dtype=text_dtype)
    params = random_parameters(config, seed=0)
    args = inputs(config)
    found, expected = (np.asarray(run(c, params, *args)) for c in (config, SMALL["paligemma2"]))
    real = np.asarray(args[-1]).astype(bool)
    error = np.sqrt(np.mean((found - expected)[real] ** 2) / np.mean(expected[real] ** 2))
    assert error <= max(RELATIVE_ERROR[image_dtype], RELATIVE_ERROR[text_dtype])


def test_bfloat16_parameters_computed_in_float32_are_their_float32_values():
    config = SMALL["paligemma2"]
    stored = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_parameters(config, seed=0))
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), stored)
    found, expected = (run(config, p, *inputs(config)) for p in (stored, widened))
    # Only the order of sums may differ: XLA compiles the cast into the products.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
