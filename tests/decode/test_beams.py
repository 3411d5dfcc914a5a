"""Beam search against all sequences there are; `tests/parity` compares it with transformers'."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pgdist.decode import Sampling
from tests.decode.table import EOS, PAD, decode_table, random_table, table_logprobs

NEW_TOKENS = 3
WORDS = (2, 3)
PROMPTS = np.array([4, 5])  # no words, so that no two sequences are made of the same steps


def make_table() -> np.ndarray:
    """Of words and EOS: other tokens never follow."""
    table = random_table(vocabulary=6, seed=2)
    table[:, [PAD, *PROMPTS]] = -np.inf
    return table


def all_sequences(*words: int) -> np.ndarray:
    """int[N, M]: those that end with their first EOS, and those that are cut before it."""
    found = []
    for tokens in itertools.product((EOS, *words), repeat=NEW_TOKENS):
        end = tokens.index(EOS) + 1 if EOS in tokens else NEW_TOKENS
        found.append((*tokens[:end], *[PAD] * (NEW_TOKENS - end)))
    return np.array(sorted(set(found)))


def beam_search(table: np.ndarray, **choice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens int[B, n, M], their log-probabilities float32[B, n, M] and scores float32[B, n]."""
    found, _ = decode_table(table, PROMPTS, Sampling(method="beam", **choice), max_new_tokens=NEW_TOKENS)
    return found.tokens, found.logprobs, found.scores


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_with_room_for_all_sequences_they_come_in_the_order_of_their_scores(length_penalty):
    table = make_table()
    sequences = all_sequences(*WORDS)
    tokens, logprobs, scores = beam_search(table, n=len(sequences), length_penalty=length_penalty)

    expected = table_logprobs(table, PROMPTS, np.broadcast_to(sequences, (len(PROMPTS), *sequences.shape)))
    lengths = np.sum(sequences != PAD, axis=1)
    expected_scores = expected.sum(axis=-1) / lengths**length_penalty
    for row in range(len(PROMPTS)):
        order = np.argsort(-expected_scores[row])
        np.testing.assert_array_equal(tokens[row], sequences[order])
        np.testing.assert_allclose(scores[row], expected_scores[row, order], rtol=0, atol=1e-5)
        np.testing.assert_allclose(logprobs[row], expected[row, order], rtol=0, atol=1e-5)


def test_where_there_are_fewer_sequences_than_beams_there_are_no_others():
    tokens, _, scores = beam_search(make_table(), n=6, allowed=(3,))
    sequences = set(map(tuple, all_sequences(3)))
    assert len(sequences) == 4
    for row in range(len(PROMPTS)):
        assert set(map(tuple, tokens[row, :4])) == sequences
        assert np.isfinite(scores[row, :4]).all() and (scores[row, 4:] == -np.inf).all()


def test_more_candidates_than_answers_only_widen_the_search():
    wide = beam_search(make_table(), n=8)
    best = beam_search(make_table(), n=2, candidates=8)
    for all_found, found in zip(wide, best, strict=True):
        np.testing.assert_array_equal(found, all_found[:, :2])


def test_the_search_ends_when_no_open_beam_could_be_among_the_best():
    table = np.zeros((6, 6))
    table[:, EOS] = 8.0  # after every token the end is far likelier than any other
    sampling = Sampling(method="beam", n=2, length_penalty=0.0)
    found, steps = decode_table(table, PROMPTS, sampling, max_new_tokens=20)
    # The end at once is the best answer; the second best is a word before it.
    assert steps == 2
    assert (found.tokens[:, 0, 0] == EOS).all() and (found.tokens[:, 1, 1] == EOS).all()
    assert not found.tokens[:, :, 2:].any()


@pytest.mark.parametrize("n", [1, 3])
def test_a_model_whose_logits_are_no_numbers_has_answers_too(n):
    _, _, scores = beam_search(np.full((6, 6), np.nan), n=n)
    assert np.isnan(scores[:, 0]).all()
