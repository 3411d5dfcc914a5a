"""Greedy answers and beam search against transformers' `generate`: the same tokens and the same scores.

Small random models in float32, unequal prompts, answers that end early, and tokens that are banned.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs PyTorch: install pgdist[parity]")
pytest.importorskip("transformers", reason="needs transformers: install pgdist[parity]")

from pgdist.decode import Sampling  # noqa: E402
from pgdist.parameters import flatten  # noqa: E402
from tests.decode.model import NEVER, cut_at, decode_batch  # noqa: E402
from tests.models.small import EOS, PAD, random_parameters  # noqa: E402
from tests.parity.conversion import CONFIGS, build_transformers, reference_inputs  # noqa: E402
from tests.parity.test_transformers import make_batch  # noqa: E402

NEW_TOKENS = 20
BEAMS = 3

torch.set_num_threads(1)  # these models are too small to share: more threads only wait for each other

every_config = pytest.mark.parametrize("name", CONFIGS)
seeds = pytest.mark.parametrize("seed", [2, 3])


@functools.cache
def make_model(name: str, seed: int, eos_id: int) -> tuple[dict, torch.nn.Module]:
    """Our parameters, and transformers' model of them; if it is to end with EOS, that is often among the likeliest."""
    params = random_parameters(CONFIGS[name], seed=seed)
    if eos_id == EOS:
        params["llm"]["embedder"]["input_embedding"][EOS] *= 6
    return params, build_transformers(CONFIGS[name], flatten(params))


def generate_by_transformers(name: str, seed: int, *, eos_id: int, n: int = 1, **choice):
    """Its answer with int64[B, n, NEW_TOKENS] `tokens`, padded after eos_id."""
    config, (_, model) = CONFIGS[name], make_model(name, seed, eos_id)
    batch = make_batch(config, seed=seed)
    counts = (batch["mask_input"] * (1 - batch["mask_ar"])).sum(axis=1)
    # transformers continues prompts that end together, so its padding is left of the text, after the image.
    prompt = np.full((len(counts), counts.max()), PAD, np.int32)
    mask = np.zeros_like(prompt)
    for row, count in enumerate(counts):
        prompt[row, -count:], mask[row, -count:] = batch["text"][row, :count], 1
    inputs = reference_inputs(config, batch["image"], prompt, np.zeros_like(mask), mask)
    model.generation_config.eos_token_id = None if eos_id == NEVER else eos_id
    with torch.no_grad():
        answer = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_return_sequences=n,
            pad_token_id=PAD,
            output_logits=True,
            output_scores=True,
            return_dict_in_generate=True,
            **choice,
        )
    tokens = answer.sequences[:, inputs["input_ids"].shape[1] :].numpy()
    tokens = np.pad(tokens, ((0, 0), (0, NEW_TOKENS - tokens.shape[1])), constant_values=PAD)
    # Beams are padded with whatever id is at hand.
    answer.tokens = cut_at(tokens, eos_id, pad_id=PAD).reshape(len(counts), n, NEW_TOKENS)
    return answer


def decode(name: str, seed: int, *, eos_id: int, sampling: Sampling):
    """Our answers, and the number of steps."""
    config, (params, _) = CONFIGS[name], make_model(name, seed, eos_id)
    batch = make_batch(config, seed=seed)
    return decode_batch(config, params, batch, sampling=sampling, eos_id=eos_id, max_new_tokens=NEW_TOKENS)


@every_config
@seeds
def test_greedy_answers_are_those_of_transformers(name, seed):
    expected = generate_by_transformers(name, seed, eos_id=NEVER)
    best = torch.stack(expected.logits).topk(2, dim=-1).values
    # Else rounding decides which token is the best one, and another seed is needed.
    assert (best[..., 0] - best[..., 1]).min() > 1e-4
    # Nor does a row that repeats itself say much.
    assert min(len(set(row)) for row in expected.tokens[:, 0]) > 3
    found, steps = decode(name, seed, eos_id=NEVER, sampling=Sampling())
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert steps == NEW_TOKENS


@every_config
def test_rows_end_where_those_of_transformers_end(name):
    endless = generate_by_transformers(name, 2, eos_id=NEVER).tokens
    eos_id = int(endless[0, 0, 5])
    expected = generate_by_transformers(name, 2, eos_id=eos_id).tokens
    assert expected[0, 0, 5] in (eos_id, PAD) and not expected[0, 0, 6:].any()
    found, _ = decode(name, 2, eos_id=eos_id, sampling=Sampling())
    np.testing.assert_array_equal(found.tokens, expected)


@every_config
def test_greedy_answers_without_banned_tokens_are_those_of_transformers(name):
    endless = generate_by_transformers(name, 2, eos_id=NEVER).tokens
    banned = tuple(sorted({int(row[0, 1]) for row in endless}))  # which changes all rows
    expected = generate_by_transformers(name, 2, eos_id=NEVER, suppress_tokens=list(banned)).tokens
    assert not np.isin(expected, banned).any()
    found, _ = decode(name, 2, eos_id=NEVER, sampling=Sampling(banned=banned))
    np.testing.assert_array_equal(found.tokens, expected)


@every_config
@seeds
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_beams_and_their_scores_are_those_of_transformers(name, seed, length_penalty):
    expected = assert_beams_equal(name, seed, eos_id=EOS, length_penalty=length_penalty)
    assert (expected[..., -1] == PAD).any()  # some have ended early


@every_config
def test_beams_that_never_end_are_those_of_transformers(name):
    assert_beams_equal(name, 2, eos_id=NEVER)


@every_config
def test_beams_without_banned_tokens_are_those_of_transformers(name):
    firsts = beams_by_transformers(name, 2, eos_id=EOS).tokens[:, :, 0]
    banned = tuple(set(firsts.ravel().tolist()) - {EOS})
    expected = assert_beams_equal(name, 2, eos_id=EOS, banned=banned)
    assert banned and not np.isin(expected, banned).any()


def beams_by_transformers(name: str, seed: int, *, eos_id: int, **choice):
    return generate_by_transformers(
        name, seed, eos_id=eos_id, n=BEAMS, num_beams=BEAMS, early_stopping=False, **choice
    )


def assert_beams_equal(
    name: str, seed: int, *, eos_id: int, length_penalty: float = 1.0, banned: tuple[int, ...] = ()
) -> np.ndarray:
    """Returns transformers' tokens, int[B, BEAMS, NEW_TOKENS]."""
    expected = beams_by_transformers(
        name, seed, eos_id=eos_id, length_penalty=length_penalty, suppress_tokens=list(banned) or None
    )
    sampling = Sampling(method="beam", n=BEAMS, length_penalty=length_penalty, banned=banned)
    found, _ = decode(name, seed, eos_id=eos_id, sampling=sampling)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    scores = expected.sequences_scores.numpy().reshape(found.scores.shape)
    np.testing.assert_allclose(found.scores, scores, rtol=0, atol=1e-4)
    return expected.tokens
