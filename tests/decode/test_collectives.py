"""What a token sends between devices, against a written expectation: activations, and no parameters.

Counted in the program as traced, as `tests/train/test_collectives.py` does for the training step, and looked for again
in the program compiled for the CPU, to which the compiler must add nothing.
"""

from __future__ import annotations

import collections
import functools

import jax
import pytest

from pgdist.chips import Chip
from pgdist.decode import Decoder, Sampling
from pgdist.mesh import make_mesh
from pgdist.models import PaliGemma
from pgdist.models.presets import preset
from pgdist.plan import read_apart
from tests.asked_collectives import Asked, collectives

CONFIG = preset("tiny", image_dtype="bfloat16", text_dtype="bfloat16")
DEPTH, WIDTH, VOCAB = CONFIG.text.depth, CONFIG.text.width, CONFIG.text.vocab_size
ROWS = 16
MESHES = {"fsdp=8": 1, "data=2 x fsdp=4": 2}  # the size of `data`
SAMPLINGS = {
    "greedy": Sampling(),
    "sample": Sampling(method="sample", n=2),
    "beam": Sampling(method="beam", n=2),
}

LAYER = {  # hidden states of all rows to the MLP's shards, and their sums back
    "all_gather over fsdp in bfloat16": 1,
    "reduce_scatter over fsdp in bfloat16": 1,
}
ENDS = {
    "pmax over data, fsdp in int32": 1,  # whether a row goes on
    "all_gather over fsdp in int32": 1,  # tokens, to the rows of the embedding
    "reduce_scatter over fsdp in bfloat16": 1,  # and those embedded
    "all_gather over fsdp in bfloat16": 1,  # hidden states of all rows, to the rows of the embedding
    "all_to_all over fsdp in float32": 1,  # the likeliest token of each part of the vocabulary, or the logits
}


@functools.cache
def traced(sampling: str, data: int) -> jax.stages.Traced:
    decoder = Decoder(
        model=PaliGemma(CONFIG),
        mesh=make_mesh(data=data, devices=jax.devices()),
        batch_size=ROWS,
        max_new_tokens=4,
        eos_id=1,
        sampling=SAMPLINGS[sampling],
    )
    return decoder.trace(prompt_tokens=5)


def asked_by_a_token(sampling: str, data: int) -> list[Asked]:
    """Of the last loop, the one over tokens."""
    asked = list(collectives(traced(sampling, data).jaxpr.jaxpr))
    loop = [each.loop for each in asked if each.loop is not None][-1]
    return [each for each in asked if each.loop == loop]


cases = pytest.mark.parametrize(
    ("sampling", "data"),
    [(sampling, data) for sampling in SAMPLINGS for data in MESHES.values()],
    ids=[f"{sampling}, {mesh}" for sampling in SAMPLINGS for mesh in MESHES],
)


@cases
def test_a_token_asks_for_two_collectives_a_layer_and_five_at_the_ends(sampling, data):
    expected = collections.Counter(ENDS)
    for _ in range(DEPTH):
        expected.update(LAYER)
    assert collections.Counter(map(str, asked_by_a_token(sampling, data))) == expected


@cases
def test_a_token_moves_no_parameters_and_no_cache(sampling, data):
    rows = ROWS * SAMPLINGS[sampling].width // data  # of the devices that share the weights
    activations = {
        (rows, WIDTH),
        (rows // (8 // data), WIDTH),
        (rows, 1, WIDTH),
        (rows // (8 // data), 1, WIDTH),
    }
    small = {(), (rows, 1)}
    # Of the distribution, greedy asks for token, logit and normalizer of each part of the vocabulary.
    found = (rows // (8 // data), 8 // data, 3) if sampling == "greedy" else (rows // (8 // data), VOCAB)
    assert {each.shape for each in asked_by_a_token(sampling, data)} <= activations | small | {found}


@pytest.mark.parametrize("data", MESHES.values(), ids=MESHES)
def test_the_compiler_adds_no_collective_to_a_token(data):
    text = traced("greedy", data).lower().compile({"xla_backend_optimization_level": 0}).as_text()
    no_chip = Chip(clock=1, peak=1, memory=1, bandwidth=1, link=1)
    _, token = read_apart(text, no_chip, loop="PaliGemma.extend")
    found = collections.Counter(each.kind for each in token.transfers)
    asked = collections.Counter(each.primitive for each in asked_by_a_token("greedy", data))
    assert sum(found.values()) == sum(asked.values())
    assert found["reduce-scatter"] == asked["reduce_scatter"]
    # Without bfloat16 on a CPU, hidden states of all rows are the largest, at four bytes.
    assert max(each.nbytes for each in token.transfers) <= ROWS * WIDTH * 4
