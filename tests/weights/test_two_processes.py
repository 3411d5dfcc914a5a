"""Two real processes load one file onto a mesh that spans both, and save what neither of them holds alone."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pgdist import weights
from pgdist.errors import WeightsError
from pgdist.weights import fetch
from tests.weights.samples import BFLOAT16, assert_same_bits, attention, expected_of, random_array

ROOT = Path(__file__).parents[2]
P = PartitionSpec
SPECS = {
    "llm/layers/attn/q_einsum/w": P(None, None, ("data", "fsdp")),
    "llm/layers/attn/kv_einsum/w": P(None, "data", "fsdp"),
    "llm/final_norm/scale": P(),
    "embedding": P(("data", "fsdp")),
    "all_split": P("data", "fsdp"),
    "empty": P(),
}


def arrays():
    more = {
        "embedding": random_array((16, 37), np.float32, seed=4),
        "all_split": random_array((2, 4), np.float16, seed=5),
        "empty": np.zeros((0, 3), np.float32),
    }
    return attention(dtype=BFLOAT16) | more


def load_and_save(folder: Path) -> None:
    """What each of the processes does."""
    fetch._GATHER_BYTES = 300  # several slices, of which the last overlaps the one before
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    loaded = weights.load(folder / "in.npz", expected=expected_of(arrays()), shardings=shardings)
    for name, array in loaded.items():
        assert array.sharding == shardings[name]
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), arrays()[name][shard.index])

    weights.save(folder / "out.npz", loaded, fuse_qkv=True)

    refused = False
    try:
        weights.save(folder / "in.npz" / "impossible.npz", loaded)
    except WeightsError:
        refused = True
    assert refused == (jax.process_index() == 0)
    jax.block_until_ready(
        jax.jit(lambda x: x.sum())(loaded["embedding"])
    )  # nobody waits in a gather any more
    print("done", flush=True)


@pytest.mark.multiprocess
def test_two_processes_load_their_shards_and_save_one_file(tmp_path):
    weights.save(tmp_path / "in.npz", arrays())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = "--xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.weights.test_two_processes", address, str(index), str(tmp_path)],
            env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()

    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err
        assert out.splitlines()[-1] == "done"
    with np.load(tmp_path / "out.npz") as file:
        assert "llm/layers/attn/qkv_einsum/w" in file
    assert_same_bits(weights.load(tmp_path / "out.npz", expected=expected_of(arrays())), arrays())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.npz", "out.npz"]


if __name__ == "__main__":
    jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
    load_and_save(Path(sys.argv[3]))
