"""Answers heard while they grow: nothing is taken back, and in the end they are those that nobody listened to."""

from __future__ import annotations

import io

import pytest
import sentencepiece

from pgdist.data.tokenizer import Tokenizer
from pgdist.decode import Sampling, generate
from pgdist.errors import ConfigError
from pgdist.mesh import make_mesh
from pgdist.models import PaliGemma
from tests.decode.model import token_ending_one_row, varied_parameters
from tests.decode.test_decoder import (
    BAD,
    EXAMPLES,
    NEW_TOKENS,
    batches,
    before,
    examples,
    make_decoder,
    tokens_on_one_device,
)
from tests.decode.test_generation import PROMPTS, answer, answers, random_images
from tests.models.small import SMALL, random_parameters, with_text


def stream(decoder, arrays, *, tokens_at_a_time):
    """The final results, and for each example all that was heard of it."""
    heard: dict[int, list[list[int]]] = {}
    found = decoder.stream_batches(
        varied_parameters("paligemma2"),
        batches(arrays),
        tokens_at_a_time=tokens_at_a_time,
        on_tokens=lambda index, tokens: heard.setdefault(index, []).append(tokens),
    )
    return list(found), heard


@pytest.mark.parametrize(
    ("tokens_at_a_time", "lengths"), [(1, [1, 2, 3, 4, 5, 6]), (4, [1, 5, 6]), (99, [1, 6])]
)
def test_each_answer_is_heard_as_it_grows(tokens_at_a_time, lengths):
    assert NEW_TOKENS == 6
    found, heard = stream(make_decoder(data=1, fsdp=1), examples(), tokens_at_a_time=tokens_at_a_time)
    assert [each.index for each in found] == examples()["index"].tolist()
    for each, tokens in zip(found, tokens_on_one_device().tolist(), strict=True):
        assert each.answers[0].tokens == tokens
        assert heard[each.index] == [tokens[:length] for length in lengths]


@pytest.mark.parametrize(("data", "fsdp"), [(1, 1), (2, 4)])
def test_what_is_heard_in_parts_is_what_is_decoded_at_once(data, fsdp):
    eos_id, row, step = token_ending_one_row(tokens_on_one_device())
    arrays = examples() | {"weight": examples()["weight"].copy()}
    arrays["weight"][BAD] = 0
    decoder = make_decoder(data=data, fsdp=fsdp, eos_id=eos_id)
    found, heard = stream(decoder, arrays, tokens_at_a_time=2)

    whole = list(decoder.decode_batches(varied_parameters("paligemma2"), batches(arrays)))
    assert [(each.index, each.valid) for each in found] == [(each.index, each.valid) for each in whole]
    tokens = [each.answers[0].tokens if each.valid else [] for each in whole]
    assert tokens == [
        before(each, eos_id) if i != BAD else [] for i, each in enumerate(tokens_on_one_device())
    ]
    assert [each.answers[0].tokens if each.valid else [] for each in found] == tokens
    assert [heard[each.index][-1] if each.index in heard else [] for each in found] == tokens
    assert len(tokens[row]) == step and len(heard) == EXAMPLES - 1


def test_an_end_of_all_answers_ends_the_batch():
    first = int(tokens_on_one_device()[0, 0])
    arrays = {name: array[:1] for name, array in examples().items()}
    found, heard = stream(make_decoder(data=1, fsdp=1, eos_id=first), arrays, tokens_at_a_time=1)
    assert [(each.answers[0].tokens, each.answers[0].finished) for each in found] == [([], True)]
    assert heard == {}


def test_texts_are_heard_with_the_places_of_their_images():
    heard: list[tuple[int, str]] = []
    found = answer(random_images(5), PROMPTS, on_text=lambda number, text: heard.append((number, text)))
    assert found == answers()
    for number, text in enumerate(found):
        parts = [part for place, part in heard if place == number]
        assert parts[-1] == text and len(parts) > 1
        assert all(
            later.startswith(part) and later != part for part, later in zip(parts, parts[1:], strict=False)
        )


def byte_tokenizer(path) -> Tokenizer:
    """Whatever is no letter a or b is written in bytes."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b", "b a"] * 10),
        model_writer=trained,
        model_type="char",
        normalization_rule_name="identity",
        user_defined_symbols=["\n"],
        vocab_size=265,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    path.write_bytes(trained.getvalue())
    return Tokenizer(path)


def test_half_a_character_is_not_heard_before_its_other_half(tmp_path):
    tokenizer = byte_tokenizer(tmp_path / "bytes.model")
    first, second = tokenizer.encode("é")[-2:]
    model = PaliGemma(with_text(SMALL["paligemma"], vocab_size=tokenizer.vocab_size))
    heard: list[tuple[int, str]] = []
    found = generate(
        model,
        random_parameters(model.config, seed=0),
        images=random_images(5),
        prompts="a",
        tokenizer=tokenizer,
        sampling=Sampling(method="sample", temperature=100.0, allowed=(first, second)),
        max_new_tokens=12,
        mesh=make_mesh(),
        on_text=lambda number, text: heard.append((number, text)),
    )
    assert "é" in "".join(found)
    for number, text in enumerate(found):
        parts = ["", *(part for place, part in heard if place == number)]
        assert parts[-1] == text
        assert all(later.startswith(part) for part, later in zip(parts, parts[1:], strict=False))


@pytest.mark.parametrize("sampling", [Sampling(method="beam", n=2), Sampling(method="sample", candidates=3)])
def test_answers_of_which_the_best_is_not_known_yet_cannot_be_followed(sampling):
    with pytest.raises(ConfigError, match="candidates of the sampler"):
        answer(random_images(1), PROMPTS[0], sampling=sampling, on_text=print)
