"""Batches through the decoder on simulated meshes: the same answers, one for each example, in order."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgdist.decode import Decoded, Decoder
from pgdist.decode.decoder import _decode
from pgdist.mesh import make_mesh, parameter_sharding
from pgdist.models import PaliGemma, normalize_image
from pgdist.parameters import flatten, map_named, unflatten
from tests.decode.batches import EXAMPLES, NAME, Batch, examples, make_batches
from tests.decode.model import NEVER, token_ending_one_row, varied_parameters
from tests.models.small import PAD, SMALL

BATCH_SIZE = 8
NEW_TOKENS = 6
BAD = 5  # the example whose record is bad


def batches(arrays: dict[str, np.ndarray]) -> list[Batch]:
    return make_batches(arrays, batch_size=BATCH_SIZE)


def make_decoder(*, data: int, fsdp: int, eos_id: int = NEVER) -> Decoder:
    mesh = make_mesh(data=data, fsdp=fsdp, devices=jax.devices()[: data * fsdp])
    return Decoder(
        model=PaliGemma(SMALL[NAME]),
        mesh=mesh,
        batch_size=BATCH_SIZE,
        max_new_tokens=NEW_TOKENS,
        eos_id=eos_id,
        pad_id=PAD,
    )


def sharded_parameters(decoder: Decoder) -> dict:
    """The parameters where training has them."""
    return map_named(
        lambda name, leaf: jax.device_put(leaf, parameter_sharding(decoder.mesh, name, leaf.shape)),
        varied_parameters(NAME),
    )


@functools.cache
def tokens_on_one_device() -> np.ndarray:
    """int32[examples, M]."""
    decoder = make_decoder(data=1, fsdp=1)
    answers = list(decoder.decode_batches(varied_parameters(NAME), batches(examples())))
    assert len(answers) == EXAMPLES
    return np.array([tokens_of(found) for found in answers])


def tokens_of(found: Decoded) -> list[int]:
    """Of the only answer; none where the record is bad."""
    return found.answers[0].tokens if found.valid else []


def test_each_example_has_one_answer_in_the_order_of_the_input():
    decoder = make_decoder(data=1, fsdp=1)
    answers = list(decoder.decode_batches(varied_parameters(NAME), batches(examples())))
    assert [found.index for found in answers] == examples()["index"].tolist()
    assert all(found.valid and len(found.answers) == 1 for found in answers)
    assert not any(found.answers[0].finished for found in answers)
    assert len({tuple(tokens_of(found)) for found in answers}) == EXAMPLES  # so that a swap would be seen


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (2, 4), (1, 8)])
def test_every_mesh_gives_the_tokens_of_one_device(data, fsdp):
    decoder = make_decoder(data=data, fsdp=fsdp)
    answers = list(decoder.decode_batches(sharded_parameters(decoder), batches(examples())))
    np.testing.assert_array_equal([tokens_of(found) for found in answers], tokens_on_one_device())
    assert [found.index for found in answers] == examples()["index"].tolist()


def test_answers_stop_before_their_end_token_and_bad_records_have_none():
    eos_id, row, step = token_ending_one_row(tokens_on_one_device())
    arrays = examples() | {"weight": examples()["weight"].copy()}
    arrays["weight"][BAD] = 0
    assert row != BAD
    decoder = make_decoder(data=2, fsdp=4, eos_id=eos_id)
    answers = list(decoder.decode_batches(varied_parameters(NAME), batches(arrays)))

    expected = [before(answer, eos_id) for answer in tokens_on_one_device()]
    expected[BAD] = []
    assert [tokens_of(found) for found in answers] == expected
    assert [i for i, found in enumerate(answers) if found.valid and found.answers[0].finished] == [row]
    assert [i for i, found in enumerate(answers) if not found.valid] == [BAD]
    assert answers[BAD].answers == ()
    assert len(tokens_of(answers[row])) == step


def before(tokens: np.ndarray, eos_id: int) -> list[int]:
    """The tokens before the first `eos_id`."""
    tokens = tokens.tolist()
    return tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens


def test_a_second_evaluation_compiles_nothing():
    parameters = varied_parameters(NAME)
    list(make_decoder(data=1, fsdp=1).decode_batches(parameters, batches(examples())))
    programs = _decode._cache_size()
    list(make_decoder(data=1, fsdp=1).decode_batches(parameters, batches(examples())))
    assert _decode._cache_size() == programs


def test_parameters_that_are_in_place_are_shared_and_not_copied():
    decoder = make_decoder(data=1, fsdp=1)
    placed = decoder.place(varied_parameters(NAME))
    again = decoder.place(placed)
    pointers = [[leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)] for tree in (placed, again)]
    assert pointers[0] == pointers[1]


def test_masters_are_narrowed_to_what_the_model_computes_in_and_norms_are_not():
    decoder = make_decoder(data=2, fsdp=4)
    config = decoder.model.config
    text = dataclasses.replace(config.text, dtype="bfloat16")
    narrow = dataclasses.replace(decoder, model=PaliGemma(dataclasses.replace(config, text=text)))
    params = varied_parameters(NAME)

    placed = flatten(narrow.place(params))

    narrowed = {name for name, leaf in placed.items() if leaf.dtype == jnp.bfloat16}
    assert narrowed == {name for name in placed if name.startswith("llm/") and "norm" not in name}
    # Not to the bit: XLA may leave out a rounding to bfloat16 that it finds between two float32 numbers, so
    # the wide weights can be read wide. Either way the error is that of bfloat16, 8 bits a number.
    arrays = batches(examples())[0].arrays
    inputs = (normalize_image(arrays["image"]), arrays["text"], arrays["mask_ar"], arrays["mask_input"])
    exact = jax.jit(decoder.model.apply)({"params": params}, *inputs)
    in_bfloat16 = jax.jit(narrow.model.apply)
    wide, narrowed = (
        np.max(np.abs(in_bfloat16({"params": tree}, *inputs) - exact)) for tree in (params, unflatten(placed))
    )
    assert narrowed <= 2 * wide


def test_no_batch_gives_no_answer():
    decoder = make_decoder(data=1, fsdp=1)
    assert list(decoder.decode_batches(varied_parameters(NAME), [])) == []
