"""Evaluation of examples in a file: what pads its prompts, and what it leaves on the devices."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from PIL import Image

from pgdist.data.jsonl import JsonlSource
from pgdist.data.loader import evaluation_batches
from pgdist.decode import Decoder
from pgdist.decode.decoder import _decode
from pgdist.evaluate.metrics import metric
from pgdist.evaluate.runner import Evaluator
from pgdist.mesh import make_mesh
from tests.decode.test_generation import model, parameters, tokenizer

TEXT_LENGTH = 48
BATCH_SIZE = 4
NEW_TOKENS = 5
# Of circles: batches of 16, 48 and 32 tokens, and another of 32, whose longest prompt has no image.
WORDS = [1, 2, 3, 4, 1, 1, 30, 2, 18, 9, 1, 2, 20, 1]
LOST = 12


@pytest.fixture
def source(tmp_path) -> JsonlSource:
    pixels = np.random.default_rng(0).integers(0, 256, (len(WORDS), 40, 60, 3), np.uint8)
    lines = []
    for i, words in enumerate(WORDS):
        Image.fromarray(pixels[i]).save(tmp_path / f"{i}.png")
        image = "lost.png" if i == LOST else f"{i}.png"
        lines.append(json.dumps({"image": image, "prefix": " ".join(["circle"] * words)}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return JsonlSource(tmp_path / "data.jsonl", require_suffix=False)


def evaluator(source: JsonlSource) -> Evaluator:
    return Evaluator(
        model=model(),
        mesh=make_mesh(devices=jax.devices()[:1]),
        source=source,
        tokenizer=tokenizer(),
        text_length=TEXT_LENGTH,
        batch_size=BATCH_SIZE,
        max_new_tokens=NEW_TOKENS,
        metric=metric("exact_match"),
    )


def prompts(source: JsonlSource, *, prompt_only: bool):
    return evaluation_batches(
        source=source,
        tokenizer=tokenizer(),
        image_size=model().config.image.image_size,
        text_length=TEXT_LENGTH,
        batch_size=BATCH_SIZE,
        rows=range(BATCH_SIZE),
        prompt_only=prompt_only,
    )


def test_prompts_padded_as_their_batch_needs_have_the_answers_of_those_padded_in_full(source):
    decoder = Decoder(
        model=model(),
        mesh=make_mesh(devices=jax.devices()[:1]),
        batch_size=BATCH_SIZE,
        max_new_tokens=NEW_TOKENS,
        eos_id=tokenizer().eos_id,
    )
    with prompts(source, prompt_only=True) as bucketed, prompts(source, prompt_only=False) as whole:
        short, long = list(bucketed), list(whole)

    assert [batch.arrays["text"].shape[1] for batch in short] == [16, 48, 32, 32]
    assert {batch.arrays["text"].shape[1] for batch in long} == {TEXT_LENGTH}
    found, expected = (list(decoder.decode_batches(parameters(), batches)) for batches in (short, long))
    assert [each.index for each in found] == list(range(len(WORDS)))
    assert [i for i, each in enumerate(found) if not each.valid] == [LOST]
    assert len({tuple(each.answers[0].tokens) for each in found if each.valid}) > len(WORDS) // 2
    for one, other in zip(found, expected, strict=True):
        assert [answer.tokens for answer in one.answers] == [answer.tokens for answer in other.answers]


def test_an_evaluation_compiles_a_program_for_each_length_and_the_next_one_none(source):
    before = _decode._cache_size()
    first = list(evaluator(source).predict(parameters(), {}))
    assert _decode._cache_size() - before <= 3
    compiled = _decode._cache_size()
    assert list(evaluator(source).predict(parameters(), {})) == first
    assert _decode._cache_size() == compiled
    assert [prediction.index for prediction in first if prediction.error] == [LOST]


@pytest.mark.parametrize("start", [1, BATCH_SIZE, LOST, len(WORDS) - 1])
def test_an_evaluation_that_begins_later_answers_the_same_to_the_bit(source, start):
    whole = list(evaluator(source).predict(parameters(), {}))
    assert list(evaluator(source).predict(parameters(), {}, start=start)) == whole[start:]


def test_the_reason_why_another_process_could_not_read_a_record_is_found(source):
    assert "image 'lost.png': no such file" in evaluator(source)._find_reason(LOST)
    assert "example 0 cannot be read" in evaluator(source)._find_reason(0)  # this one can read it
