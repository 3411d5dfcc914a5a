"""One seed, one answer: on any mesh, in any batch, from any number of processes, with every sampler.

Float32 and random models, whose choices are no near ties. Each process of a job is a real one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from launch import entry, membership
from pgdist import cluster, program_cache
from pgdist.decode import Decoded, Decoder, Sampling
from pgdist.mesh import batch_sharding, host_rows, make_mesh, parameter_sharding
from pgdist.models import PaliGemma
from pgdist.parameters import map_named
from tests.decode.batches import EXAMPLES, NAME, examples, make_batches
from tests.decode.model import varied_parameters
from tests.models.small import EOS, PAD, SMALL
from tests.multiprocess.processes import Processes

SAMPLERS = {
    # Banned in every part of the vocabulary; `test_decoder` bans none.
    "greedy": Sampling(banned=tuple(range(3, SMALL[NAME].text.vocab_size, 7))),
    "sample": Sampling(method="sample", temperature=0.8, top_k=20, top_p=0.9, n=2, candidates=3, seed=7),
    "beam": Sampling(method="beam", n=2, candidates=3),
}
BATCH_SIZE = 8
DEVICES = 8
NEW_TOKENS = 6
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


@functools.cache
def parameters() -> dict:
    """Under which some answers end early."""
    params = jax.tree.map(np.copy, varied_parameters(NAME))
    params["llm"]["embedder"]["input_embedding"][EOS] *= 4
    return params


def decode(
    sampling: Sampling,
    *,
    batch_size: int = BATCH_SIZE,
    data: int = 1,
    fsdp: int = 1,
    padding: int = 0,
    bad: Sequence[int] = (),
) -> list[Decoded]:
    """From parameters that are split as in training.  padding: columns behind the prompts.  bad: examples whose
    records are.
    """
    mesh = make_mesh(data=data, fsdp=fsdp, devices=jax.devices()[: data * fsdp])
    decoder = Decoder(
        model=PaliGemma(SMALL[NAME]),
        mesh=mesh,
        batch_size=batch_size,
        max_new_tokens=NEW_TOKENS,
        eos_id=EOS,
        pad_id=PAD,
        sampling=sampling,
    )
    params = map_named(
        lambda name, leaf: jax.make_array_from_callback(
            leaf.shape, parameter_sharding(mesh, name, leaf.shape), lambda index: leaf[index]
        ),
        parameters(),
    )
    arrays = examples() | {
        name: np.pad(examples()[name], ((0, 0), (0, padding))) for name in ("text", "mask_input", "mask_ar")
    }
    arrays["weight"] = np.where(np.isin(np.arange(EXAMPLES), bad), 0, 1).astype(np.float32)
    rows = host_rows(batch_sharding(mesh), batch_size)
    batches = make_batches(arrays, batch_size=batch_size, rows=rows)
    return list(decoder.decode_batches(params, batches))


def answers(found: list[Decoded]) -> list:
    """[id, [tokens of each answer]] of each example."""
    return [[each.index, [answer.tokens for answer in each.answers]] for each in found]


@functools.cache
def on_one_device(sampler: str) -> list:
    return answers(decode(SAMPLERS[sampler]))


@every_sampler
def test_answers_vary_and_some_end_early(sampler):
    found = on_one_device(sampler)
    assert [index for index, _ in found] == examples()["index"].tolist()
    texts = [tokens for _, of_example in found for tokens in of_example]
    assert len(texts) == EXAMPLES * SAMPLERS[sampler].n
    lengths = list(map(len, texts))
    assert min(lengths) < NEW_TOKENS == max(lengths)
    assert len(set(map(tuple, texts))) > 0.9 * len(texts)
    assert not set(itertools.chain(*texts)) & set(SAMPLERS[sampler].banned)


@every_sampler
def test_bad_records_have_no_answers_and_change_no_others(sampler):
    bad = (0, 5, 12)
    found = decode(SAMPLERS[sampler], bad=bad)
    assert [number for number, each in enumerate(found) if not each.valid] == list(bad)
    expected = [
        [index, [] if number in bad else of_example]
        for number, (index, of_example) in enumerate(on_one_device(sampler))
    ]
    assert answers(found) == expected


@every_sampler
@pytest.mark.parametrize("batch_size", [1, 2, 5, 32])
def test_the_batch_and_its_padding_change_no_answer(sampler, batch_size):
    found = decode(SAMPLERS[sampler], batch_size=batch_size, padding=batch_size % 4)
    assert answers(found) == on_one_device(sampler)


@pytest.mark.slow
@every_sampler
@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (2, 4), (1, 8)])
def test_the_mesh_changes_no_answer(sampler, data, fsdp):
    assert answers(decode(SAMPLERS[sampler], data=data, fsdp=fsdp)) == on_one_device(sampler)


def test_another_seed_gives_other_answers():
    other = answers(decode(dataclasses.replace(SAMPLERS["sample"], seed=8)))
    different = [mine != theirs for mine, theirs in zip(on_one_device("sample"), other, strict=True)]
    assert np.mean(different) > 0.9


@pytest.mark.multiprocess
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_number_of_processes_changes_no_answer_and_all_get_all(count, tmp_path):
    devices = {"PGDIST_FAKE_DEVICES": str(DEVICES // count)}
    with Processes(tmp_path, count=count) as job:
        for number in range(count):
            job.start(number, "-m", "tests.decode.test_same_answers", variables=devices)
        assert job.codes(seconds=250) == [0] * count, job.tails()
    for number in range(count):
        found = json.loads((tmp_path / f"{number}.json").read_text())
        assert found == {sampler: on_one_device(sampler) for sampler in SAMPLERS}


def main() -> None:
    """One process of a job: writes its answers to a file of its own number."""
    membership.join_job()
    program_cache.open_cache("")
    found = {name: answers(decode(sampling, data=2, fsdp=4)) for name, sampling in SAMPLERS.items()}
    Path(f"{jax.process_index()}.json").write_text(json.dumps(found))
    cluster.leave()


if __name__ == "__main__":
    entry.run(main, name="job", usage="")
