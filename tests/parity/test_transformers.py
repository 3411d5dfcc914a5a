"""The whole model against transformers' PaliGemma: logits, loss and gradients.

The same random weights, float32, eager attention, unequal prefixes and suffixes, padding. transformers gets
what its processor would give: image tokens first, attention_mask 0 on padding, token_type_ids 1 on suffixes.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs PyTorch: install pgdist[parity]")
pytest.importorskip("transformers", reason="needs transformers: install pgdist[parity]")

from pgdist.models import PaliGemma, PaliGemmaConfig, normalize_image  # noqa: E402
from pgdist.parameters import flatten  # noqa: E402
from pgdist.train.objective import batch_loss  # noqa: E402
from tests.models.small import random_batch, random_parameters  # noqa: E402
from tests.parity.conversion import (  # noqa: E402
    CONFIGS,
    build_transformers,
    reference_inputs,
    to_transformers,
)

torch.set_num_threads(1)  # these models are too small to share: more threads only wait for each other

every_config = pytest.mark.parametrize("name", CONFIGS)
seeds = pytest.mark.parametrize("seed", [2, 3])


def make_batch(config: PaliGemmaConfig, *, seed: int) -> dict[str, np.ndarray]:
    """Unequal prefixes, suffixes and padding; one row has no padding, one suffix is EOS alone."""
    return random_batch(config, prefixes=[3, 9, 6, 12, 2], suffixes=[8, 5, 1, 12, 17], length=24, seed=seed)


def model_inputs(batch: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """What the model reads of a batch: image, text, mask_ar and mask_input without the last text position."""
    return batch["image"], *(batch[key][:, :-1] for key in ("text", "mask_ar", "mask_input"))


@functools.cache
def jitted_logits(name: str):
    model = PaliGemma(CONFIGS[name])
    return jax.jit(lambda p, image, *text: model.apply({"params": p}, normalize_image(image), *text))


@functools.cache
def jitted_loss_and_gradients(name: str):
    model = PaliGemma(CONFIGS[name])

    def mean_loss(params, batch):
        sums = batch_loss(model, params, batch)
        return sums.loss / sums.examples

    return jax.jit(jax.value_and_grad(mean_loss))


@every_config
@seeds
def test_logits_equal_those_of_transformers(name, seed):
    config = CONFIGS[name]
    params = random_parameters(config, seed=seed)
    inputs = model_inputs(make_batch(config, seed=seed))
    ours = np.asarray(jitted_logits(name)(params, *inputs))

    with torch.no_grad():
        reference = build_transformers(config, flatten(params))
        theirs = reference(**reference_inputs(config, *inputs)).logits[:, config.image.num_tokens :].numpy()

    real = inputs[-1].astype(bool)
    assert 0.5 < theirs[real].std() < 2.0  # a small difference of small numbers would say nothing
    np.testing.assert_allclose(ours[real], theirs[real], rtol=0, atol=2e-5)


@every_config
@seeds
def test_loss_and_every_gradient_equal_those_of_transformers(name, seed):
    config = CONFIGS[name]
    params = random_parameters(config, seed=seed)
    batch = make_batch(config, seed=seed)
    batch["weight"][1] = 0.0  # a masked row: it must not exist
    loss, gradients = jitted_loss_and_gradients(name)(params, batch)

    reference = build_transformers(config, flatten(params))
    inputs = reference_inputs(config, *model_inputs(batch))
    expected_loss = published_loss(reference(**inputs).logits[:, config.image.num_tokens :], batch)
    expected_loss.backward()

    np.testing.assert_allclose(loss, expected_loss.item(), rtol=1e-6)
    expected = {key: parameter.grad.numpy() for key, parameter in reference.named_parameters()}
    found = to_transformers({key: np.asarray(value) for key, value in flatten(gradients).items()})
    assert found.keys() == expected.keys()
    assert_gradients_equal(found, expected)


def published_loss(logits: torch.Tensor, batch: dict[str, np.ndarray]) -> torch.Tensor:
    """Mean over unmasked rows of the mean negative log-likelihood of the row's suffix tokens."""
    targets = torch.from_numpy(batch["text"][:, 1:]).long()
    scored = torch.from_numpy(batch["mask_loss"][:, 1:]).bool()
    rows = [
        torch.nn.functional.cross_entropy(logits[row, scored[row]], targets[row, scored[row]])
        for row in np.flatnonzero(batch["weight"])
    ]
    return torch.stack(rows).mean()


def assert_gradients_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Within 1e-5 of each array's largest gradient.

    A value passes some 100 rounded operations forward and back: as a random walk that is 10 * 2^-24 a side,
    1e-6 together; the largest of all is seen at 3e-6. A misplaced array or a wrong mask gives 1e-3 or more.
    """
    for key, reference in expected.items():
        scale = np.abs(reference).max()
        if key.endswith("k_proj.bias"):
            # Softmax does not see what is added to all keys: the true gradient is zero, the rest is rounding.
            scale = np.abs(expected[key.replace("bias", "weight")]).max()
            np.testing.assert_allclose(reference, 0, atol=1e-6 * scale, err_msg=key)
        assert scale > 1e-3, f"{key} has no gradient to compare"
        np.testing.assert_allclose(found[key], reference, rtol=0, atol=1e-5 * scale, err_msg=key)
