"""What evaluation adds to the devices' memory beside training: a second set of weights on a mesh, and not for long."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import pytest

from pgdist.decode import Decoder
from pgdist.finetune import finetune
from pgdist.mesh import make_mesh, parameter_sharding
from pgdist.models import PaliGemma, preset
from pgdist.parameters import flatten, map_named, unflatten
from tests.models.small import random_parameters
from tests.tiny_runs import Inputs, tiny_config, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def bytes_held() -> Counter[jax.Device]:
    """By device; a buffer that several arrays share counts once."""
    shards = [shard for array in jax.live_arrays() for shard in array.addressable_shards]
    buffers = {(shard.device, shard.data.unsafe_buffer_pointer()): shard.data.nbytes for shard in shards}
    held: Counter[jax.Device] = Counter()
    for (device, _), size in buffers.items():
        held[device] += size
    return held


class Witness:
    """Measures when the run says what it has loaded, at each batch that is evaluated, and after each evaluation."""

    def __init__(self) -> None:
        self.loaded: Counter[jax.Device] = Counter()
        self.evaluating: list[Counter[jax.Device]] = []
        self.evaluated: Counter[jax.Device] = Counter()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == 0 and "time/loading_seconds" in metrics:
            self.loaded = bytes_held()
        if step == 0 and "time/evaluation_seconds" in metrics:
            self.evaluated = bytes_held()

    def close(self) -> None:
        pass

    def should_stop(self, step: int) -> bool:
        if step == 0:
            self.evaluating.append(bytes_held())
        return False


def evaluate(inputs: Inputs, workdir: Path, *, devices: int) -> Witness:
    witness = Witness()
    fields = {"data.validation": str(inputs.validation), "steps": 1, "frozen_dtype": "float32"}
    finetune(
        tiny_config(inputs, **fields),
        workdir=workdir,
        devices=jax.devices()[:devices],
        writers=[witness],
        should_stop=witness.should_stop,
    )
    return witness


def make_decoder(*, data: int, fsdp: int) -> Decoder:
    return Decoder(
        model=PaliGemma(preset("tiny")),
        mesh=make_mesh(data=data, fsdp=fsdp),
        batch_size=data * fsdp,
        max_new_tokens=4,
        eos_id=1,
    )


def bytes_of_one_device(arrays: Iterable[jax.Array]) -> int:
    return sum(array.addressable_shards[0].data.nbytes for array in arrays)


def test_one_device_evaluates_the_very_arrays_that_it_trains(inputs, tmp_path):
    witness = evaluate(inputs, tmp_path / "work", devices=1)
    assert len(witness.evaluating) > 1
    assert all(held == witness.loaded for held in witness.evaluating)
    assert witness.evaluated == witness.loaded


def test_a_mesh_holds_weights_a_second_time_where_decoding_wants_them_elsewhere_and_until_its_end(
    inputs, tmp_path
):
    decoder = make_decoder(data=1, fsdp=8)
    trained = flatten(
        map_named(
            lambda name, leaf: jax.device_put(leaf, parameter_sharding(decoder.mesh, name, leaf.shape)),
            random_parameters(decoder.model.config, seed=0),
        )
    )
    placed = flatten(decoder.place(unflatten(trained)))
    moved = [
        leaf
        for name, leaf in placed.items()
        if not leaf.sharding.is_equivalent_to(trained[name].sharding, leaf.ndim)
    ]
    assert 0 < bytes_of_one_device(moved) < bytes_of_one_device(placed.values())

    witness = evaluate(inputs, tmp_path / "work", devices=8)

    for device in jax.devices():
        most = max(held[device] for held in witness.evaluating)
        assert most - witness.loaded[device] == bytes_of_one_device(moved)
    assert witness.evaluated == witness.loaded


def test_the_mlp_and_the_vocabulary_are_split_over_fsdp():
    decoder = make_decoder(data=2, fsdp=4)
    placed = flatten(decoder.place(random_parameters(decoder.model.config, seed=0)))
    split = {name for name in placed if re.fullmatch(r"llm/(layers/mlp/.*|embedder/input_embedding)", name)}
    assert len(split) == 3
    for name in split:
        assert {shard.data.nbytes for shard in placed[name].addressable_shards} == {placed[name].nbytes // 4}
