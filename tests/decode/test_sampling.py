"""Draws against probabilities that are computed here, in float64, and what a sampler may be asked for.

The chi-square tests have fixed seeds; for a right sampler one in a million seeds would fail.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from pgdist.decode import Sampling
from pgdist.decode.logits import Logits
from pgdist.decode.sampling import Sampler
from pgdist.errors import ConfigError
from tests.decode.table import EOS, PAD, decode_table, random_table, table_logprobs

VOCABULARY = 12
ONE_IN_A_MILLION = 1e-6
LOGITS = random_table(vocabulary=VOCABULARY, seed=0)[0]
PROMPTS = np.arange(2, VOCABULARY)


EXAMPLES, CANDIDATES = 4000, 8


@functools.cache
def sampler(how: Sampling):
    """(step, seed) -> int32[examples, candidates], tokens that are all drawn from what LOGITS stand for."""
    kind = Sampler(how=dataclasses.replace(how, n=CANDIDATES), max_new_tokens=4, eos_id=EOS, pad_id=PAD)

    def draw(step, seed):
        samples = kind.start(jnp.arange(EXAMPLES), jnp.ones(EXAMPLES, bool), seed)
        logits = Logits(part=jnp.broadcast_to(LOGITS, (EXAMPLES * CANDIDATES, VOCABULARY)))
        return kind.choose(step, logits, samples)[0]

    return jax.jit(draw)


def draws(how: Sampling, *, step: int = 0) -> np.ndarray:
    return np.asarray(sampler(dataclasses.replace(how, seed=0))(np.int32(step), np.uint32(how.seed)))


def probabilities(how: Sampling) -> np.ndarray:
    """What is left of LOGITS, float64[V]: by temperature, then the top k, then the top p of those."""
    stays = np.ones(VOCABULARY, bool)
    if how.allowed:
        stays = np.isin(np.arange(VOCABULARY), (*how.allowed, EOS))
    stays[list(how.banned)] = False
    weight = np.where(stays, np.exp(LOGITS.astype(np.float64) / how.temperature), 0.0)
    likeliest = np.argsort(-weight)
    if how.top_k:
        weight[likeliest[how.top_k :]] = 0.0
    weight /= weight.sum()
    count = 1 + np.searchsorted(np.cumsum(weight[likeliest]), how.top_p)
    weight[likeliest[count:]] = 0.0
    return weight / weight.sum()


def p_value(tokens: np.ndarray, expected: np.ndarray) -> float:
    """Of the chi-square test that the tokens are draws by these probabilities."""
    count = np.bincount(tokens.ravel(), minlength=len(expected))
    possible = expected > 0
    if count[~possible].any():
        return 0.0
    return scipy.stats.chisquare(count[possible], tokens.size * expected[possible]).pvalue


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 4},
        {"top_p": 0.7},
        {"temperature": 0.8, "top_k": 6, "top_p": 0.9},
        {"temperature": 1.5, "top_k": 7, "top_p": 0.95, "banned": (3, 8)},
        {"allowed": (2, 4, 5, 7, 9)},
        {"allowed": (2, 4, 5, 7, 9), "banned": (EOS, 4), "top_p": 0.8},
    ],
    ids=str,
)
def test_draws_follow_the_exact_probabilities(choice, step):
    how = Sampling(method="sample", seed=1, **choice)
    expected = probabilities(how)
    assert np.sum(expected > 0) > 1
    tokens = draws(how, step=step)
    assert expected[tokens].all()
    assert p_value(tokens, expected) > ONE_IN_A_MILLION


@pytest.mark.parametrize(
    ("drawn", "other"),
    [({}, {"temperature": 1.05}), ({"top_k": 7}, {"top_k": 8}), ({"top_p": 0.7}, {"top_p": 0.9})],
    ids=str,
)
def test_these_tests_would_see_a_distribution_that_is_nearly_right(drawn, other):
    how = Sampling(method="sample", seed=1, **drawn)
    assert p_value(draws(how), probabilities(dataclasses.replace(how, **other))) < ONE_IN_A_MILLION


def test_draws_know_nothing_of_those_of_other_examples_candidates_positions_and_seeds():
    how = Sampling(method="sample", temperature=2.0, seed=1)
    tokens = draws(how)
    others = {
        "the next example's": np.roll(tokens, 1, axis=0),
        "the next candidate's": np.roll(tokens, 1, axis=1),
        "the next position's": draws(how, step=1),
        "the next seed's": draws(dataclasses.replace(how, seed=2)),
        # Where keys that are sums of their parts would meet.
        "the next position's, of the example before": np.roll(draws(how, step=1), 1, axis=0),
        "the next position's, of the candidate before": np.roll(draws(how, step=1), 1, axis=1),
    }
    for name, other in others.items():
        table = np.zeros((VOCABULARY, VOCABULARY))
        np.add.at(table, (tokens.ravel(), other.ravel()), 1)
        assert scipy.stats.chi2_contingency(table).pvalue > ONE_IN_A_MILLION, name


@pytest.mark.parametrize("choice", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}], ids=str)
def test_the_likeliest_token_always_stays(choice):
    assert (draws(Sampling(method="sample", **choice)) == np.argmax(LOGITS)).all()


def test_more_top_tokens_than_there_are_leave_all():
    how = Sampling(method="sample", seed=1)
    np.testing.assert_array_equal(draws(dataclasses.replace(how, top_k=VOCABULARY + 1)), draws(how))


def sampled(*, seed: int = 3, **choice) -> Sampling:
    return Sampling(method="sample", seed=seed, **choice)


def test_the_seed_decides_all_that_is_random():
    table = random_table(vocabulary=VOCABULARY, seed=1)
    first, same, other = (
        decode_table(table, PROMPTS, sampled(seed=seed), max_new_tokens=6)[0].tokens for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, same)
    assert (first != other).any(axis=(1, 2)).all()


def test_an_answer_does_not_depend_on_what_is_decoded_beside_it():
    table = random_table(vocabulary=VOCABULARY, seed=1)
    all_tokens = decode_table(table, PROMPTS, sampled(n=5), max_new_tokens=6)[0].tokens
    fewer = decode_table(table, PROMPTS[:3], sampled(n=2), max_new_tokens=6)[0].tokens
    longer = decode_table(table, PROMPTS, sampled(n=5), max_new_tokens=9)[0].tokens
    for row in range(3):
        assert set(map(tuple, fewer[row])) <= set(map(tuple, all_tokens[row]))
    for row in range(len(PROMPTS)):
        assert set(map(tuple, longer[row, :, :6])) == set(map(tuple, all_tokens[row]))


def test_logprobs_are_those_of_the_model_whatever_the_sampler_makes_of_it():
    table = random_table(vocabulary=VOCABULARY, seed=1)
    how = sampled(n=4, temperature=2.0, top_k=8, top_p=0.95, banned=(5,))
    found, _ = decode_table(table, PROMPTS, how, max_new_tokens=6)
    expected = table_logprobs(table, PROMPTS, found.tokens)
    np.testing.assert_allclose(found.logprobs, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.scores, expected.sum(axis=-1), rtol=0, atol=1e-5)


def test_sequences_emit_padding_behind_their_end():
    table = random_table(vocabulary=VOCABULARY, seed=1)
    found, _ = decode_table(table, PROMPTS, sampled(n=4), max_new_tokens=8)
    is_end = found.tokens == EOS
    behind = np.cumsum(is_end, axis=-1) - is_end > 0
    assert behind.any() and not is_end.any(axis=-1).all()
    assert (found.tokens[behind] == PAD).all() and (found.logprobs[behind] == 0).all()


def test_the_best_of_n_are_the_likeliest_of_all_candidates():
    table = random_table(vocabulary=VOCABULARY, seed=1)
    candidates, _ = decode_table(table, PROMPTS, sampled(n=8), max_new_tokens=5)
    best, _ = decode_table(table, PROMPTS, sampled(n=3, candidates=8), max_new_tokens=5)
    logprob = table_logprobs(table, PROMPTS, candidates.tokens).sum(axis=-1)
    assert (np.diff(np.sort(logprob, axis=1), axis=1) > 1e-4).mean() > 0.5  # few are the same twice
    assert (np.diff(best.scores, axis=1) <= 0).all()
    np.testing.assert_allclose(best.scores, -np.sort(-logprob, axis=1)[:, :3], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(best.tokens, candidates.tokens[:, :3])


@pytest.mark.parametrize("method", ["greedy", "sample", "beam"])
def test_tokens_are_allowed_and_not_banned(method):
    table = random_table(vocabulary=VOCABULARY, seed=1)
    n = 1 if method == "greedy" else 4
    allowed, banned = (3, 4, 6, 9, 10), (4, 5)
    choose = functools.partial(Sampling, method=method, n=n)
    found = {
        name: set(decode_table(table, PROMPTS, how, max_new_tokens=8)[0].tokens.ravel().tolist()) - {PAD}
        for name, how in {
            "all": choose(),
            "allowed": choose(allowed=allowed),
            "not banned": choose(banned=banned),
            "both": choose(allowed=allowed, banned=(4, EOS)),
        }.items()
    }
    assert found["all"] & set(banned) and found["all"] - {*allowed, EOS}
    assert len(found["allowed"]) > 2 and found["allowed"] <= {*allowed, EOS}
    assert len(found["not banned"]) > 2 and not found["not banned"] & set(banned)
    assert len(found["both"]) > 2 and found["both"] <= {3, 6, 9, 10}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"method": "best"}, "sampler 'best': expected one of greedy, sample, beam"),
        ({"n": 0}, "n=0: expected at least one answer"),
        ({"method": "sample", "n": 3, "candidates": 2}, "2 candidates for n=3 answers: expected at least as"),
        ({"n": 2}, "2 answers of the greedy sampler would all be the same: choose sample or beam"),
        ({"candidates": 4}, "4 answers of the greedy sampler would all be the same"),
        (
            {"method": "sample", "temperature": 0.0},
            "temperature=0.0: expected more than 0, and finite; for 0,",
        ),
        ({"method": "sample", "temperature": float("nan")}, "temperature=nan: expected more than 0"),
        ({"method": "sample", "temperature": float("inf")}, "temperature=inf: .* and finite"),
        ({"method": "sample", "top_p": 0.0}, "top_p=0.0: expected a probability above 0 and at most 1"),
        ({"method": "sample", "top_p": 1.5}, "top_p=1.5: expected a probability"),
        ({"method": "sample", "top_k": -1}, "top_k=-1: expected a number of tokens, or 0 for all"),
        ({"seed": -1}, "seed=-1: expected 0 to 2\\*\\*32 - 1"),
        ({"seed": 2**32}, "seed=4294967296: expected"),
        ({"temperature": 0.5}, "temperature, top_k and top_p are for the sampler sample, not greedy"),
        ({"method": "beam", "top_k": 5}, "temperature, top_k and top_p are for the sampler sample, not beam"),
        ({"method": "sample", "length_penalty": 2.0}, "length_penalty is for the sampler beam, not sample"),
        ({"method": "beam", "length_penalty": float("inf")}, "length_penalty=inf: expected a finite number"),
        ({"banned": (3, -1)}, "allowed or banned token id -1: expected 0 or more"),
        ({"allowed": (3, 4), "banned": (4, 3)}, "All 2 allowed tokens are banned too"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(choice, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**choice)


@pytest.mark.parametrize("choice", [{"allowed": (3, VOCABULARY)}, {"banned": (VOCABULARY,)}], ids=str)
def test_ids_that_are_no_tokens_of_the_model_are_refused(choice):
    table = random_table(vocabulary=VOCABULARY, seed=1)
    with pytest.raises(
        ConfigError, match="token id 12 is allowed or banned, but the model's 12 tokens end with 11"
    ):
        decode_table(table, PROMPTS, Sampling(**choice), max_new_tokens=2)
