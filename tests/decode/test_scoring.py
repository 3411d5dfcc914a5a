"""Log-probabilities of given answers: those of one pass over the whole text, and those that generating reports."""

from __future__ import annotations

import dataclasses
import functools
import io

import jax
import numpy as np
import pytest
from PIL import Image

from pgdist.data.images import load_image
from pgdist.data.text import encode_example
from pgdist.decode import Sampling, generate_candidates, score_answers, score_batches
from pgdist.decode.decoder import _score
from pgdist.decode.given import NOTHING
from pgdist.decode.scoring import longest_answer
from pgdist.errors import DataError
from pgdist.mesh import make_mesh
from pgdist.models import normalize_image
from tests.decode.model import varied_parameters
from tests.decode.test_decoder import BAD, BATCH_SIZE, Batch, batches, examples, make_decoder
from tests.decode.test_generation import PROMPTS, model, parameters, random_images, tokenizer

TOLERANCE = 1e-5
ANSWERS = [
    ["yes", "no", "a red circle above a blue square"],
    [],
    ["<loc0001><loc0002><loc0300><loc0400> circle"],
    ["two", ""],
    ["a", "b", "c", "d"],
]


def score(images=None, prompts=PROMPTS, answers=ANSWERS, **options):
    options = {"batch_size": 2, "mesh": make_mesh(devices=jax.devices()[:1])} | options
    images = random_images(5) if images is None else images
    return score_answers(
        model(),
        parameters(),
        images=images,
        prompts=prompts,
        answers=answers,
        tokenizer=tokenizer(),
        **options,
    )


@functools.cache
def scores():
    return score()


def teacher_forced(pixels: np.ndarray, prompt: str, text: str) -> np.ndarray:
    """float32[tokens], of one pass over prompt and answer, the end counted in."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    image = load_image(file.getvalue(), size=model().config.image.image_size)[None]
    encoded = encode_example(tokenizer(), prefix=prompt, suffix=text, length=48)
    assert not encoded.truncated
    arrays = (encoded.text[None], encoded.mask_ar[None], encoded.mask_input[None])
    logits = jax.jit(model().apply)({"params": parameters()}, normalize_image(image), *arrays)[0]
    places = np.flatnonzero(encoded.mask_loss)
    return np.asarray(jax.nn.log_softmax(logits))[places - 1, encoded.text[places]]


def test_log_probabilities_are_those_of_one_pass_over_prompt_and_answer():
    for number, (image, prompt, texts) in enumerate(zip(random_images(5), PROMPTS, ANSWERS, strict=True)):
        assert [found.text for found in scores()[number]] == texts
        for found, text in zip(scores()[number], texts, strict=True):
            expected = teacher_forced(image, prompt, text)
            np.testing.assert_allclose(found.token_logprobs, expected, rtol=0, atol=TOLERANCE)
            assert found.logprob == pytest.approx(expected.sum(), abs=TOLERANCE * len(expected))
            assert found.mean_logprob == pytest.approx(expected.mean(), abs=TOLERANCE)


@pytest.mark.parametrize(
    "options", [{"batch_size": 3}, {"mesh": make_mesh(data=2, fsdp=4)}, {"mesh": make_mesh(fsdp=8)}]
)
def test_the_batch_size_and_the_mesh_change_no_score(options):
    for found, expected in zip(score(**options), scores(), strict=True):
        assert [each.text for each in found] == [each.text for each in expected]
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one.token_logprobs, other.token_logprobs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("data", "fsdp"), [(1, 1), (2, 4)])
def test_given_tokens_have_the_log_probabilities_that_generating_them_reported(data, fsdp):
    decoder = make_decoder(data=data, fsdp=fsdp, eos_id=17)
    sampling = Sampling(method="sample", n=3, temperature=1.5, seed=3)
    generating = dataclasses.replace(decoder, sampling=sampling)
    generated = list(generating.decode_batches(varied_parameters("paligemma2"), batches(examples())))
    of_example = {each.index: each.answers for each in generated}
    assert len({len(one.logprobs) for each in generated for one in each.answers}) > 1  # some end early

    def with_answers(batch: Batch) -> Batch:
        tokens = np.full((BATCH_SIZE, 3, decoder.max_new_tokens), NOTHING, np.int32)
        for row, index in enumerate(batch.arrays["index"]):
            for slot, one in enumerate(of_example.get(int(index), ())):
                tokens[row, slot, : len(one.logprobs)] = one.tokens + [17] * one.finished
        return Batch(arrays={**batch.arrays, "answers": tokens})

    scored = decoder.score_batches(varied_parameters("paligemma2"), map(with_answers, batches(examples())))
    for found, expected in zip(scored, generated, strict=True):
        assert found.index == expected.index
        assert [one.tokens for one in found.answers] == [one.tokens for one in expected.answers]
        for one, other in zip(found.answers, expected.answers, strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=TOLERANCE)
            assert one.score == pytest.approx(other.score, abs=TOLERANCE * decoder.max_new_tokens)


def test_a_generated_text_scores_what_it_was_generated_with():
    """Where its tokens are those that the text is read as."""
    count = 0
    for number, candidates in enumerate(
        generate_candidates(
            model(),
            parameters(),
            images=random_images(5),
            prompts=PROMPTS,
            tokenizer=tokenizer(),
            sampling=Sampling(method="sample", n=4, allowed=tuple(tokenizer().encode("red circle"))),
            max_new_tokens=3,
            mesh=make_mesh(devices=jax.devices()[:1]),
        )
    ):
        assert [one.score for one in candidates] == sorted((one.score for one in candidates), reverse=True)
        assert [one.score for one in candidates] == pytest.approx([one.logprob for one in candidates])
        canonical = [one for one in candidates if tokenizer().encode(one.text) == list(one.tokens)]
        texts = [one.text for one in canonical]
        answers = [texts if place == number else [] for place in range(5)]
        for found, one in zip(score(answers=answers)[number], canonical, strict=True):
            length = len(one.token_logprobs)
            np.testing.assert_allclose(
                found.token_logprobs[:length], one.token_logprobs, rtol=0, atol=TOLERANCE
            )
            assert list(one.pieces) == tokenizer().pieces(one.tokens)
            count += 1
    assert count > 3


def test_batches_of_a_data_set_are_scored_and_bad_records_have_no_score():
    arrays = examples() | {"weight": examples()["weight"].copy()}
    arrays["weight"][BAD] = 0
    choices = ["yes", "no", "a circle"]
    longest = longest_answer(tokenizer(), choices)
    decoder = make_decoder(data=2, fsdp=4, eos_id=tokenizer().eos_id)
    decoder = dataclasses.replace(decoder, model=model(), max_new_tokens=longest)
    texts = {int(index): choices[: 1 + index % 3] for index in examples()["index"]}
    found = list(
        score_batches(
            decoder,
            parameters(),
            batches(arrays),
            answers=texts.__getitem__,
            most_answers=3,
            tokenizer=tokenizer(),
        )
    )
    assert [each.index for each in found] == examples()["index"].tolist()
    for number, each in enumerate(found):
        assert each.valid == (number != BAD)
        assert [one.text for one in each.answers] == (texts[each.index] if each.valid else [])
        assert all(np.isfinite(one.logprob) and one.logprob < 0 for one in each.answers)


def test_other_answers_of_nearly_the_same_length_share_a_program():
    scores()
    programs = _score._cache_size()
    score(answers=[["two circles"], ["no"], [], [], ["1", "2", "3", "4"]])
    assert _score._cache_size() == programs


def test_no_answer_needs_no_score():
    assert score(answers=[[]] * 5) == [[]] * 5
    assert score(images=[], prompts="caption en", answers=[]) == []


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["yes", "no", "a", "b", "c"], "a list of texts for each of 5 images, found 5 texts"),
        ([["yes", "no"]], "for each of 5 images, found 1 lists"),
    ],
)
def test_answers_that_are_no_list_for_each_image_are_refused(answers, message):
    with pytest.raises(DataError, match=message):
        score(answers=answers)
