"""Batches through the decoder on simulated meshes: the same answers, one for each example, in order."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgdist.decode import Decoder
from pgdist.decode.decoder import _decode
from pgdist.mesh import batch_sharding, make_mesh, parameter_sharding, put_batch
from pgdist.models import PaliGemma, normalize_image
from pgdist.parameters import flatten, map_named, unflatten
from tests.decode.model import random_prompts, token_ending_one_row, varied_parameters
from tests.models.small import PAD, SMALL

NAME = "paligemma2"
EXAMPLES = 13
BATCH_SIZE = 8
LENGTH = 12
NEW_TOKENS = 6
BAD = 5  # the example whose record is bad
NEVER = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    arrays: dict[str, np.ndarray]


@functools.cache
def examples() -> dict[str, np.ndarray]:
    prefixes = [1 + (5 * i) % (LENGTH - 1) for i in range(EXAMPLES)]
    arrays = random_prompts(SMALL[NAME], prefixes=prefixes, length=LENGTH)
    # Ids that are no row numbers, in an order that is theirs.
    return arrays | {"index": np.array([(7 * i) % EXAMPLES + 100 for i in range(EXAMPLES)], np.int64)}


def batches(arrays: dict[str, np.ndarray]) -> list[Batch]:
    """Full batches, the last one filled up with rows of weight 0 and index -1."""
    filled = {
        name: np.concatenate([array, np.zeros((-len(array) % BATCH_SIZE, *array.shape[1:]), array.dtype)])
        for name, array in arrays.items()
    }
    filled["index"][len(arrays["index"]) :] = -1
    return [
        Batch(arrays={name: array[start : start + BATCH_SIZE] for name, array in filled.items()})
        for start in range(0, len(filled["index"]), BATCH_SIZE)
    ]


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
    return np.array([answer.tokens for answer in answers])


def test_each_example_has_one_answer_in_the_order_of_the_input():
    decoder = make_decoder(data=1, fsdp=1)
    answers = list(decoder.decode_batches(varied_parameters(NAME), batches(examples())))
    assert [answer.index for answer in answers] == examples()["index"].tolist()
    assert all(answer.valid and not answer.finished for answer in answers)
    assert len({tuple(answer.tokens) for answer in answers}) == EXAMPLES  # so that a swap would be seen


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (2, 4), (1, 8)])
def test_every_mesh_gives_the_tokens_of_one_device(data, fsdp):
    decoder = make_decoder(data=data, fsdp=fsdp)
    answers = list(decoder.decode_batches(sharded_parameters(decoder), batches(examples())))
    np.testing.assert_array_equal([answer.tokens for answer in answers], tokens_on_one_device())
    assert [answer.index for answer in answers] == examples()["index"].tolist()


def test_answers_stop_before_their_end_token_and_bad_records_have_none():
    eos_id, row, step = token_ending_one_row(tokens_on_one_device())
    arrays = examples() | {"weight": examples()["weight"].copy()}
    arrays["weight"][BAD] = 0
    assert row != BAD
    decoder = make_decoder(data=2, fsdp=4, eos_id=eos_id)
    answers = list(decoder.decode_batches(varied_parameters(NAME), batches(arrays)))

    expected = [before(answer, eos_id) for answer in tokens_on_one_device()]
    expected[BAD] = []
    assert [answer.tokens for answer in answers] == expected
    assert [i for i, answer in enumerate(answers) if answer.finished] == [row]
    assert [i for i, answer in enumerate(answers) if not answer.valid] == [BAD]
    assert len(answers[row].tokens) == step


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
    exact = decoder.model.apply({"params": params}, *inputs)
    wide, narrowed = (
        np.max(np.abs(narrow.model.apply({"params": tree}, *inputs) - exact))
        for tree in (params, unflatten(placed))
    )
    assert narrowed <= 2 * wide


def test_no_batch_gives_no_answer():
    decoder = make_decoder(data=1, fsdp=1)
    assert list(decoder.decode_batches(varied_parameters(NAME), [])) == []


def test_the_compiled_loop_moves_no_weights_and_no_cache_between_devices():
    decoder = make_decoder(data=2, fsdp=4)
    sharding = batch_sharding(decoder.mesh)
    arrays = put_batch(batches(examples())[0].arrays, sharding=sharding, batch_size=BATCH_SIZE)
    compiled = _decode.lower(
        decoder.model,
        decoder.place(varied_parameters(NAME)),
        arrays,
        max_new_tokens=NEW_TOKENS,
        eos_id=NEVER,
        pad_id=PAD,
        sharding=sharding,
    ).compile()
    collectives = re.findall(
        r"= (.+?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
        compiled.as_text(),
    )
    shapes = [shape for found in collectives for shape in re.findall(r"\w+\[([\d,]*)\]", found)]
    sizes = [math.prod(int(size) for size in shape.split(",") if size) for shape in shapes]
    # The answers are gathered, and in the loop the devices agree on whether all rows have ended: no more than
    # that.
    assert BATCH_SIZE * NEW_TOKENS in sizes
    assert max(sizes) == BATCH_SIZE * NEW_TOKENS
