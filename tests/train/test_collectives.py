"""What the training step sends between devices, layer by layer, against a written expectation.

Counted in the step as traced (its jaxpr), where each loop over layers is a `scan` and each collective has its axis and
dtype: the step says in `jax.shard_map` what it wants, so this is exact and the same for every backend, and a
parameter that is gathered twice, whole, in float32 or where it is frozen shows here without a TPU. What a compiler
makes of it is its own affair, but it must add nothing: that is looked at in the program compiled for the CPU.
"""

from __future__ import annotations

import collections
import functools

import jax
import pytest

from pgdist.config import default_config
from pgdist.parts import Parts
from pgdist.plan import hlo
from tests.asked_collectives import Asked, collectives

TRAINABLE = {
    "attention": (("llm/layers/attn/.*", 1.0), (".*", 0.0)),
    "all": ((".*", 1.0),),
}
MESHES = {"fsdp=8": 1, "data=2 x fsdp=4": 2, "data=8": 8}  # the size of `data`
VOCAB = 1344  # of the `tiny` preset

# "primitive over axes in dtype": how often.  SigLIP's layers have six split arrays (query, key, value, out and two
# of the MLP), Gemma's five (q, kv, attention's output and two of the MLP); norms and biases are whole.
IMAGE_FORWARD = {"all_gather over fsdp in bfloat16": 6}
TEXT_FORWARD = {"all_gather over fsdp in bfloat16": 5}
LOSS = {
    "all_gather over fsdp in bfloat16": 1,  # hidden states of all rows, to the rows of the embedding
    "all_gather over fsdp in int32": 1,  # targets
    "all_gather over fsdp in float32": 1,  # their weights
    "pmax over fsdp in float32": 1,
    "psum over fsdp in float32": 2,
    "reduce_scatter over fsdp in float32": 1,  # gradients of the hidden states
}


def backward(forward: dict[str, int], *, trained: int) -> dict[str, int]:
    """The layer again, for it is recomputed, and the gradients of its trained arrays to their shards."""
    return forward | {
        "reduce_scatter over fsdp in float32": trained,
        "psum over data in float32": trained,
    }


EXPECTED_LOOPS = {
    # A frozen image tower has no backward pass.
    "attention": [IMAGE_FORWARD, TEXT_FORWARD, LOSS, backward(TEXT_FORWARD, trained=3)],
    "all": [
        IMAGE_FORWARD,
        TEXT_FORWARD,
        LOSS,
        backward(TEXT_FORWARD, trained=5),
        backward(IMAGE_FORWARD, trained=6),
    ],
}
# Patches, positions and the connector; tokens to the rows of the embedding, and what those give back.
EXPECTED_ONCE = {
    "attention": {
        "all_gather over fsdp in bfloat16": 3,
        "all_gather over fsdp in int32": 1,
        "reduce_scatter over fsdp in bfloat16": 1,
        "psum over data, fsdp in float32": 6,  # loss and its sums
    },
    "all": {
        "all_gather over fsdp in bfloat16": 4,  # with the gradient of the embedded tokens
        "all_gather over fsdp in int32": 1,
        "reduce_scatter over fsdp in bfloat16": 1,
        "reduce_scatter over fsdp in float32": 3,
        "psum over data in float32": 4,  # these three, and the rows of the embedding where they are
        "psum over data, fsdp in float32": 6 + 17,  # norms and biases, all layers of one at a time
    },
}


@functools.cache
def traced(trainable: str, data: int) -> jax.stages.Traced:
    config = default_config()
    config.update_from_flattened_dict(
        {
            "model.preset": "tiny",
            "model.remat": "dots",
            "data.text_length": 16,
            "batch_size": 16,
            "mesh.data": data,
            "mesh.fsdp": -1,
            "trainable": TRAINABLE[trainable],
        }
    )
    parts = Parts(config)
    inputs = parts.step_inputs()
    return parts.train_step.trace(inputs.state, inputs.frozen, inputs.batch)


def asked_by(trainable: str, data: int) -> list[Asked]:
    return list(collectives(traced(trainable, data).jaxpr.jaxpr))


cases = pytest.mark.parametrize(
    ("trainable", "data"),
    [(trainable, data) for trainable in TRAINABLE for data in MESHES.values()],
    ids=[f"{trainable}, {mesh}" for trainable in TRAINABLE for mesh in MESHES],
)


@cases
def test_each_layer_asks_for_its_own_arrays_once_and_no_more(trainable, data):
    loops: dict[int, collections.Counter[str]] = {}
    for each in asked_by(trainable, data):
        if each.loop is not None:
            loops.setdefault(each.loop, collections.Counter())[str(each)] += 1
    assert list(loops.values()) == EXPECTED_LOOPS[trainable]


@cases
def test_outside_of_layers_the_ends_of_the_model_alone_are_asked_for(trainable, data):
    once = collections.Counter(str(each) for each in asked_by(trainable, data) if each.loop is None)
    assert once == EXPECTED_ONCE[trainable]


@cases
def test_the_embedding_stays_where_it_is(trainable, data):
    rows = {VOCAB, VOCAB * data // 8}  # all, and those of one shard
    moved = [str(each) for each in asked_by(trainable, data) if rows & set(each.shape[:1])]
    assert moved == (["psum over data in float32"] if trainable == "all" else [])


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_the_compiler_adds_no_collective_to_what_was_asked(trainable):
    asked = collections.Counter(each.primitive for each in asked_by(trainable, 2))
    text = traced(trainable, 2).lower().compile({"xla_backend_optimization_level": 0}).as_text()
    computations, _ = hlo.computations_of(text)
    lines = [line for computation in computations.values() for line in computation]
    found = collections.Counter(kind for line in lines if (kind := hlo.collective_of(line)))
    assert found["all-gather"] == asked["all_gather"]
    assert found["reduce-scatter"] == asked["reduce_scatter"]
    # Sums over the same devices are made together. The step itself sums norms of gradients over shards.
    assert found.keys() == {"all-gather", "reduce-scatter", "all-reduce"}
    assert found["all-reduce"] <= asked["psum"] + asked["pmax"]
