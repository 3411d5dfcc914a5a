"""Two real processes decode one batch together: each brings its rows, and both get all answers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pgdist.data.tokenizer import Tokenizer
from pgdist.decode import generate
from pgdist.mesh import make_mesh, parameter_sharding
from pgdist.models import PaliGemma
from pgdist.parameters import map_named
from tests.decode.test_generation import PROMPTS, TOKENIZER, model, parameters, random_images

ROOT = Path(__file__).parents[2]
DEVICES_OF_EACH = 4


def generate_on(*, devices: list[jax.Device]) -> list[str]:
    """Answers from parameters that are split over the mesh, as training leaves them."""
    mesh = make_mesh(data=2 if len(devices) > 1 else 1, devices=devices)
    split = map_named(
        lambda name, leaf: jax.make_array_from_callback(
            leaf.shape, parameter_sharding(mesh, name, leaf.shape), lambda index: leaf[index]
        ),
        parameters(),
    )
    found = generate(
        PaliGemma(model().config),
        split,
        images=random_images(len(PROMPTS)),
        prompts=PROMPTS,
        tokenizer=Tokenizer(TOKENIZER),
        max_new_tokens=4,
        mesh=mesh,
    )
    return found


@pytest.mark.multiprocess
def test_both_processes_get_all_answers_in_order():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES_OF_EACH}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.decode.test_two_processes", address, str(process)],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    # Gloo writes on stdout too; the answers are the last line.
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert first == second == generate_on(devices=jax.devices()[:1])


if __name__ == "__main__":
    jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
    print(json.dumps(generate_on(devices=jax.devices())), flush=True)
