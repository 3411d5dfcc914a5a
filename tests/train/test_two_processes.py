"""Two processes of two devices each: equal runs are equal to the bit, and train what one process trains."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from pgdist.mesh import make_mesh
from pgdist.models.presets import PRESETS
from pgdist.parameters import flatten
from tests.tiny_runs import ROOT, assert_same_bits, largest_difference
from tests.train.small_training import STEPS, batch_of_step, small_training

RUNS = 5


def trained(*, devices: list[jax.Device], runs: int) -> Iterator[dict[str, np.ndarray]]:
    """The parameters at the end of each of several equal runs.

    In this model a device's part of a layer's largest gradient is 64 KiB: more than Gloo's reduce-scatter sends at
    once, and with that it made each run another.
    """
    training = small_training(make_mesh(data=2, devices=devices), model=PRESETS["tiny"])
    step = training.step.lower(training.start(), {}, training.place(batch_of_step(0))).compile()
    assert jax.process_count() == 1 or "reduce-scatter" not in step.as_text()
    for _ in range(runs):
        state = training.start()
        for number in range(STEPS):
            state, _ = step(state, {}, training.place(batch_of_step(number)))
        yield flatten(multihost_utils.process_allgather(state.trainable, tiled=True))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_equal_runs_of_two_processes_are_equal_to_the_bit_and_as_one_process(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.train.test_two_processes", address, str(tmp_path)]
    processes = [subprocess.Popen([*command, str(number)], env=environment, cwd=ROOT) for number in range(2)]
    try:
        codes = [process.wait(timeout=250) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0]

    first, *others = (dict(np.load(tmp_path / f"{run}.npz")) for run in range(RUNS))
    for other in others:
        assert_same_bits(other, first)
    (alone,) = trained(devices=jax.devices()[:4], runs=1)
    # Sums are added in another order, as in test_meshes_agree.
    assert largest_difference(first, alone) <= 1e-5


if __name__ == "__main__":
    jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[3]))
    for run, parameters in enumerate(trained(devices=jax.devices(), runs=RUNS)):
        if jax.process_index() == 0:
            np.savez(Path(sys.argv[2]) / f"{run}.npz", **parameters)
