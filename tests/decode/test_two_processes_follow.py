"""Two real processes follow the same answers while they grow, and score the same choices."""

from __future__ import annotations

import json
from typing import Any

import jax
import pytest

from pgdist import cluster
from pgdist.decode import generate, score_answers
from pgdist.mesh import make_mesh, parameter_sharding
from pgdist.parameters import map_named
from tests.decode.test_generation import PROMPTS, model, parameters, random_images, tokenizer
from tests.multiprocess.processes import Processes

CHOICES = [["a circle", "a square", "two"], ["yes", "no"], [], ["red"], ["1", "2", "3"]]
SIMULATED = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}


def follow_and_score(*, devices: list[jax.Device]) -> dict[str, Any]:
    """With parameters that are split over the mesh, as training leaves them."""
    mesh = make_mesh(data=2 if len(devices) > 1 else 1, devices=devices)
    split = map_named(
        lambda name, leaf: jax.make_array_from_callback(
            leaf.shape, parameter_sharding(mesh, name, leaf.shape), lambda index: leaf[index]
        ),
        parameters(),
    )
    heard: list[tuple[int, str]] = []
    inputs = {
        "images": random_images(len(PROMPTS)),
        "prompts": PROMPTS,
        "tokenizer": tokenizer(),
        "mesh": mesh,
    }
    texts = generate(
        model(), split, **inputs, max_new_tokens=6, on_text=lambda number, text: heard.append((number, text))
    )
    scores = score_answers(model(), split, **inputs, answers=CHOICES)
    return {"texts": texts, "heard": heard, "logprobs": [[one.logprob for one in found] for found in scores]}


@pytest.mark.multiprocess
def test_both_processes_hear_and_score_what_one_does(tmp_path):
    with Processes(tmp_path, count=2) as job:
        for number in range(2):
            job.start(number, "-m", "tests.decode.test_two_processes_follow", variables=SIMULATED)
        assert job.codes() == [0, 0], job.tails()
        first, second = (json.loads(job.output(number).splitlines()[-1]) for number in range(2))
    assert first == second
    alone = json.loads(json.dumps(follow_and_score(devices=jax.devices()[:1])))
    assert first["texts"] == alone["texts"]
    assert first["heard"] == alone["heard"]
    for found, expected in zip(first["logprobs"], alone["logprobs"], strict=True):
        assert found == pytest.approx(expected, abs=1e-4)  # each of up to nine tokens within 1e-5


if __name__ == "__main__":
    cluster.join()
    print(json.dumps(follow_and_score(devices=jax.devices())), flush=True)
    cluster.leave()
