"""Tokens and masks of one text, and the tokenizer under them."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from pgdist.data.text import encode_example, masked_text, prompt_bucket, prompt_ids
from pgdist.data.tokenizer import Tokenizer
from pgdist.errors import ConfigError
from tests.data.conftest import TOKENIZER

SHARED = Tokenizer(TOKENIZER)
words = st.text(max_size=30) | st.sampled_from(
    ["", "caption en", "red circle <loc0010>", "  two  spaces ", "a\nb"]
)


def test_prefix_separator_suffix_and_masks(tokenizer):
    encoded = encode_example(tokenizer, prefix="caption en", suffix="a red circle", length=32)
    prefix = [tokenizer.bos_id, *tokenizer.encode("caption en"), *tokenizer.encode("\n")]
    suffix = [*tokenizer.encode("a red circle"), tokenizer.eos_id]
    padding = 32 - len(prefix) - len(suffix)
    assert encoded.text.tolist() == prefix + suffix + [0] * padding
    learnt = [0] * len(prefix) + [1] * len(suffix) + [0] * padding
    assert encoded.mask_ar.tolist() == learnt
    assert encoded.mask_loss.tolist() == learnt
    assert encoded.mask_input.tolist() == [1] * (len(prefix) + len(suffix)) + [0] * padding
    assert not encoded.truncated
    assert all(
        getattr(encoded, name).dtype == np.int32 for name in ("text", "mask_ar", "mask_loss", "mask_input")
    )


def test_a_prompt_ends_after_the_separator_and_learns_nothing(tokenizer):
    encoded = encode_example(tokenizer, prefix="count circles", suffix=None, length=16)
    prompt = [tokenizer.bos_id, *tokenizer.encode("count circles"), *tokenizer.encode("\n")]
    assert prompt_ids(tokenizer, "count circles") == prompt
    assert encoded.text.tolist() == prompt + [0] * (16 - len(prompt))
    assert encoded.mask_input.sum() == len(prompt)
    assert not encoded.mask_ar.any() and not encoded.mask_loss.any()


@pytest.mark.parametrize(
    ("limit", "buckets"),
    [(128, [16, 32, 64, 128]), (512, [16, 32, 64, 128, 256, 512]), (100, [16, 32, 64, 100]), (12, [12])],
)
def test_prompts_of_all_lengths_need_few_buckets_and_fit_into_theirs(limit, buckets):
    found = {longest: prompt_bucket(longest, limit=limit) for longest in range(1, limit + 1)}
    assert sorted(set(found.values())) == buckets
    assert all(longest <= bucket for longest, bucket in found.items())
    # The next shorter one would not do.
    assert all(not any(longest <= other < found[longest] for other in buckets) for longest in found)


def test_an_empty_suffix_still_learns_eos(tokenizer):
    encoded = encode_example(tokenizer, prefix="answer", suffix="", length=16)
    assert encoded.text[encoded.mask_loss == 1].tolist() == [tokenizer.eos_id]


def test_a_text_that_fits_exactly_is_not_truncated_and_one_token_less_loses_eos(tokenizer):
    whole = encode_example(tokenizer, prefix="caption en", suffix="a red circle", length=64)
    count = int(whole.mask_input.sum())
    exact = encode_example(tokenizer, prefix="caption en", suffix="a red circle", length=count)
    assert not exact.truncated and exact.text[-1] == tokenizer.eos_id
    cut = encode_example(tokenizer, prefix="caption en", suffix="a red circle", length=count - 1)
    assert cut.truncated and tokenizer.eos_id not in cut.text
    np.testing.assert_array_equal(cut.text, exact.text[:-1])


def test_a_prefix_that_fills_the_text_leaves_nothing_to_learn(tokenizer):
    encoded = encode_example(tokenizer, prefix="red circle " * 50, suffix="a", length=16)
    assert encoded.truncated and encoded.mask_input.all() and not encoded.mask_loss.any()


@given(prefix=words, suffix=words | st.none(), length=st.integers(2, 40))
def test_every_length_cuts_or_pads_the_same_text(prefix, suffix, length):
    whole = encode_example(SHARED, prefix=prefix, suffix=suffix, length=400)
    found = encode_example(SHARED, prefix=prefix, suffix=suffix, length=length)
    assert not whole.truncated
    for name in ("text", "mask_ar", "mask_loss", "mask_input"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name)[:length])
    assert found.truncated == (whole.mask_input.sum() > length)
    assert ((found.mask_loss == 1) <= (found.mask_input == 1)).all()


@given(prefix=words, first=words, second=words)
def test_the_prefix_tokens_do_not_depend_on_the_suffix(prefix, first, second):
    one = encode_example(SHARED, prefix=prefix, suffix=first, length=200)
    other = encode_example(SHARED, prefix=prefix, suffix=second, length=200)
    prompt = encode_example(SHARED, prefix=prefix, suffix=None, length=200)
    count = int(prompt.mask_input.sum())
    for encoded in (one, other):
        np.testing.assert_array_equal(encoded.text[:count], prompt.text[:count])
        assert not encoded.mask_ar[:count].any() and encoded.mask_ar[count] == 1


def test_the_separator_is_tokenised_on_its_own():
    class Lengths:
        """A tokenizer whose one token is the text's length."""

        bos_id, eos_id, pad_id = 102, 101, 0

        def encode(self, text: str) -> list[int]:
            return [len(text)]

    encoded = encode_example(Lengths(), prefix="four", suffix="seven..", length=8)
    assert encoded.text.tolist() == [102, 4, 1, 7, 101, 0, 0, 0]


def test_a_masked_text_has_one_input_position_and_nothing_else(tokenizer):
    masked = masked_text(tokenizer, length=8)
    assert masked.text.tolist() == [0] * 8
    assert masked.mask_input.tolist() == [1] + [0] * 7
    assert not masked.mask_ar.any() and not masked.mask_loss.any() and not masked.truncated


def test_decode_turns_ids_back_and_leaves_out_what_is_no_text(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("a red circle"), tokenizer.eos_id, 0, 0, 10**6, -3]
    assert tokenizer.decode(ids) == "a red circle"
    assert tokenizer.decode(np.array(ids, np.int32)) == "a red circle"
    assert tokenizer.decode([]) == ""


def test_pieces_name_every_id(tokenizer):
    ids = np.array([tokenizer.bos_id, *tokenizer.encode("<loc0010>"), 10**6, -1])
    assert tokenizer.pieces(ids) == ["<s>", "<loc0010>", "<id 1000000>", "<id -1>"]


def test_a_pickled_tokenizer_is_a_path_that_is_read_at_first_use(tokenizer):
    content = pickle.dumps(tokenizer)
    assert len(content) < 1000
    copy = pickle.loads(content)
    assert copy._loaded is None
    assert copy.encode("a red circle") == tokenizer.encode("a red circle")
    assert (copy.bos_id, copy.eos_id, copy.pad_id, copy.vocab_size) == (2, 1, 0, tokenizer.vocab_size)


def train_model(**options) -> bytes:
    model = io.BytesIO()
    sentences = [f"{a} {b} circle square" for a in ("red", "green", "blue") for b in "abcdefgh"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@pytest.mark.parametrize(
    ("options", "lacking"),
    [
        ({}, "newline"),  # the default normaliser makes spaces of newlines and drops them
        ({"bos_id": -1, "eos_id": -1, "user_defined_symbols": ["\n"]}, "BOS, EOS"),
    ],
)
def test_a_model_without_what_texts_need_is_refused(tmp_path, options, lacking):
    path = tmp_path / "some.model"
    path.write_bytes(train_model(**options))
    with pytest.raises(ConfigError, match=f"some.model.*lack {lacking}"):
        Tokenizer(path)


def test_a_model_without_padding_pads_with_0(tmp_path):
    path = tmp_path / "some.model"
    path.write_bytes(train_model(user_defined_symbols=["\n"]))
    assert Tokenizer(path).pad_id == 0


def test_a_missing_or_wrong_model_is_a_config_error_that_names_it(tmp_path):
    (tmp_path / "empty.model").touch()
    (tmp_path / "text.model").write_text("no model")
    (tmp_path / "cut.model").write_bytes(TOKENIZER.read_bytes()[:5000])
    for name, found in {
        "missing.model": "found nothing",
        ".": "found a directory",
        "empty.model": r"not a SentencePiece model \(0 bytes\)",
        "text.model": "not a SentencePiece model",
        "cut.model": "not a SentencePiece model",
    }.items():
        with pytest.raises(ConfigError, match=found) as error:
            Tokenizer(tmp_path / name)
        assert str(tmp_path) in str(error.value)
        assert error.value.exit_code == 2


def test_tokens_are_found_as_files_are_by_a_pattern(tokenizer):
    locations = tokenizer.find("<loc*>")
    assert len(locations) == 1024
    assert tokenizer.pieces(locations[:2]) == ["<loc0000>", "<loc0001>"]
    assert tokenizer.pieces(tokenizer.find("<loc002[13]>")) == ["<loc0021>", "<loc0023>"]
    assert tokenizer.find("<LOC*>") == [] == tokenizer.find("loc")
