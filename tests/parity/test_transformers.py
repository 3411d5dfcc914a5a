"""The whole model against transformers' PaliGemma: logits, loss, gradients and greedy answers.

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

from pgdist.decode.greedy import greedy_decode  # noqa: E402
from pgdist.models import PaliGemma, PaliGemmaConfig, normalize_image  # noqa: E402
from pgdist.parameters import flatten  # noqa: E402
from pgdist.train.objective import batch_loss  # noqa: E402
from tests.models.small import PAD, SMALL, random_batch, random_parameters, with_text  # noqa: E402
from tests.parity.conversion import build_transformers, to_transformers  # noqa: E402

CONFIGS = SMALL | {"paligemma2-capped": with_text(SMALL["paligemma2"], final_logits_softcap=30.0)}
NEW_TOKENS = 20

torch.set_num_threads(1)  # these models are too small to share: more threads only wait for each other

every_config = pytest.mark.parametrize("name", CONFIGS)
seeds = pytest.mark.parametrize("seed", [2, 3])


def make_batch(config: PaliGemmaConfig, *, seed: int) -> dict[str, np.ndarray]:
    """Unequal prefixes, suffixes and padding; one row has no padding, one suffix is EOS alone."""
    return random_batch(config, prefixes=[3, 9, 6, 12, 2], suffixes=[8, 5, 1, 12, 17], length=24, seed=seed)


def reference_inputs(
    config: PaliGemmaConfig, image: np.ndarray, text: np.ndarray, mask_ar: np.ndarray, mask_input: np.ndarray
) -> dict[str, torch.Tensor]:
    """uint8[B, S, S, 3] and int32[B, T] of ours as transformers' arguments; padding may stand anywhere."""
    prefix = ((0, 0), (config.image.num_tokens, 0))
    arrays = {
        "input_ids": np.pad(text, prefix, constant_values=config.text.vocab_size),
        "attention_mask": np.pad(mask_input, prefix, constant_values=1),
        "token_type_ids": np.pad(mask_ar, prefix),
    }
    inputs = {key: torch.from_numpy(array).long() for key, array in arrays.items()}
    pixels = (image.astype(np.float32) / 127.5 - 1.0).transpose(0, 3, 1, 2)
    return inputs | {"pixel_values": torch.from_numpy(np.ascontiguousarray(pixels))}


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


def greedy_by_transformers(
    config: PaliGemmaConfig, params: dict, batch: dict[str, np.ndarray], *, eos_id: int | None
) -> tuple[np.ndarray, float]:
    """(int64[B, NEW_TOKENS], padded after eos_id; the smallest lead of a best token over the second best)."""
    counts = (batch["mask_input"] * (1 - batch["mask_ar"])).sum(axis=1)
    # transformers continues prompts that end together, so its padding is left of the text, after the image.
    prompt = np.full((len(counts), counts.max()), PAD, np.int32)
    mask = np.zeros_like(prompt)
    for row, count in enumerate(counts):
        prompt[row, -count:], mask[row, -count:] = batch["text"][row, :count], 1
    inputs = reference_inputs(config, batch["image"], prompt, np.zeros_like(mask), mask)
    model = build_transformers(config, flatten(params))
    model.generation_config.eos_token_id = eos_id
    with torch.no_grad():
        answer = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=PAD,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = answer.sequences[:, inputs["input_ids"].shape[1] :].numpy()
    best = torch.stack(answer.logits).topk(2, dim=-1).values
    tokens = np.pad(tokens, ((0, 0), (0, NEW_TOKENS - tokens.shape[1])), constant_values=PAD)
    return tokens, (best[..., 0] - best[..., 1]).min().item()


@functools.cache
def jitted_greedy(name: str, eos_id: int):
    model = PaliGemma(CONFIGS[name])
    decode = functools.partial(greedy_decode, model, max_new_tokens=NEW_TOKENS, eos_id=eos_id, pad_id=PAD)
    return jax.jit(decode)


@every_config
@seeds
def test_greedy_answers_equal_those_of_transformers(name, seed):
    config = CONFIGS[name]
    params = random_parameters(config, seed=seed)
    batch = make_batch(config, seed=seed)
    expected, lead = greedy_by_transformers(config, params, batch, eos_id=None)
    assert lead > 1e-4  # else rounding decides which token is the best one, and another seed is needed
    assert min(len(set(row)) for row in expected) > 3  # nor does a row that repeats itself say much
    found = jitted_greedy(name, -1)(params, batch)
    np.testing.assert_array_equal(found.tokens, expected)
    assert found.steps == NEW_TOKENS


@every_config
def test_rows_end_where_those_of_transformers_end(name):
    config = CONFIGS[name]
    params = random_parameters(config, seed=2)
    batch = make_batch(config, seed=2)
    endless, _ = greedy_by_transformers(config, params, batch, eos_id=None)
    eos_id = int(endless[0, 5])
    expected, _ = greedy_by_transformers(config, params, batch, eos_id=eos_id)
    assert expected[0, 5] in (eos_id, PAD) and not expected[0, 6:].any()
    np.testing.assert_array_equal(jitted_greedy(name, eos_id)(params, batch).tokens, expected)
