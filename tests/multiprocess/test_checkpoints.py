"""Two real processes save and restore a state of which each holds a part, also when one part is damaged."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pgdist import cluster
from pgdist.checkpoint import Checkpoints
from pgdist.mesh import make_mesh
from pgdist.train.state import TrainState

ROOT = Path(__file__).parents[2]
SHAPE = (16, 4096)


def state_of(step: int) -> TrainState:
    """A parameter split over the devices of both processes."""
    mesh = make_mesh()
    whole = np.random.default_rng(step).standard_normal(SHAPE).astype(np.float32)
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    return TrainState(
        step=jax.device_put(jnp.int32(step), NamedSharding(mesh, PartitionSpec())),
        trainable={"w": jax.make_array_from_callback(SHAPE, split, lambda index: whole[index])},
        opt_state=(),
    )


def assert_restored(checkpoints: Checkpoints, step: int) -> None:
    expected = state_of(step)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), expected)
    found = checkpoints.restore(abstract)
    assert found is not None and int(found.step) == step
    for one, other in zip(
        found.trainable["w"].addressable_shards, expected.trainable["w"].addressable_shards, strict=True
    ):
        assert one.device == other.device
        np.testing.assert_array_equal(one.data, other.data)


def save_damage_restore(directory: Path) -> None:
    """What each of the processes does."""
    checkpoints = Checkpoints(directory, keep=3, belongs_to={"base_weights": "abc"})
    for step in (1, 2, 3):
        checkpoints.save(step, state_of(step))
    checkpoints.wait()
    assert_restored(checkpoints, 3)
    checkpoints.close()
    for damaged_process in (0, 1):
        newest = 3 - damaged_process
        if cluster.is_primary():
            written = directory / str(newest) / "state" / f"ocdbt.process_{damaged_process}" / "d"
            largest = max(written.iterdir(), key=lambda path: path.stat().st_size)
            largest.write_bytes(largest.read_bytes()[:1000])
        cluster.barrier(f"damaged {newest}")
        checkpoints = Checkpoints(directory, keep=3, belongs_to={"base_weights": "abc"})
        assert_restored(checkpoints, newest - 1)
        checkpoints.close()
    print("done", flush=True)


@pytest.mark.multiprocess
def test_a_part_that_one_process_cannot_read_makes_both_take_the_checkpoint_before(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = "--xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.multiprocess.test_checkpoints", address, str(index), str(tmp_path)],
            env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()

    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0 and "done" in output, output
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert sorted(path.name for path in (tmp_path / "checkpoints_damaged").iterdir()) == ["2", "3"]


if __name__ == "__main__":
    jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
    save_damage_restore(Path(sys.argv[3]) / "checkpoints")
