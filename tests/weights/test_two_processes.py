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
from pgdist.errors import UserError, WeightsError
from pgdist.weights import fetch, reading_plan
from tests.weights.samples import BFLOAT16, assert_same_bits, attention, expected_of, random_array, write_npz

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


# Too large to be read by both processes: what both hold, halves of short rows, halves of layers stored apart.
LARGE = {
    "replicated": P(),
    "rows": P(None, ("data", "fsdp")),
    "halves": P("data", "fsdp"),
    "img/Transformer/encoderblock/w": P(None, None, "data"),
}


def large_arrays():
    return {
        "replicated": random_array((64, 3000), np.float32, seed=6),
        "rows": random_array((4096, 48), BFLOAT16, seed=7),
        "halves": random_array((16, 20_000), np.float16, seed=8),
        "img/Transformer/encoderblock/w": random_array((3, 512, 160), np.float32, seed=9),
    }


def write_large(folder: Path, arrays) -> None:
    """Layers of the image tower apart, as some published files have them."""
    layers = {
        f"img/Transformer/encoderblock_{i}/w": w
        for i, w in enumerate(arrays["img/Transformer/encoderblock/w"])
    }
    rest = {name: array for name, array in arrays.items() if "encoderblock" not in name}
    write_npz(folder / "in.npz", rest | layers)


def load_large(folder: Path):
    """The large arrays on a mesh of both processes, and how many bytes this process has read."""
    reading_plan._SMALL = 2**16
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in LARGE.items()}
    read, preadv = [], os.preadv
    os.preadv = lambda *arguments: read.append(preadv(*arguments)) or read[-1]
    loaded = weights.load(folder / "in.npz", expected=expected_of(large_arrays()), shardings=shardings)
    for name, array in loaded.items():
        assert array.sharding == shardings[name]
    return loaded, sum(read)


def load_in_halves(folder: Path) -> None:
    """Each process reads half of the bytes, and both have all that is theirs."""
    loaded, read = load_large(folder)
    for name, array in loaded.items():
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), large_arrays()[name][shard.index])
    total = sum(array.nbytes for array in large_arrays().values())
    assert 0.5 * total <= read < 0.5 * total + 50_000, read / total  # the headers of the file, twice


def end_together(folder: Path) -> None:
    """What is wrong in what one process reads ends both, and it alone says what."""
    try:
        load_large(folder)
    except UserError as error:
        print(f"{type(error).__name__} {error.exit_code}: {error}")
    else:
        print("loaded")


def run_two(folder: Path, what: str, *, folders: tuple[str, str] = ("", "")) -> list[str]:
    """What two processes print that do `what`, each in its folder below."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = "--xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    module = "tests.weights.test_two_processes"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, address, str(index), what, str(folder / folders[index])],
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
        assert "done" in out  # among what Gloo prints
    return [out for out, _ in outputs]


@pytest.mark.multiprocess
def test_two_processes_load_their_shards_and_save_one_file(tmp_path):
    weights.save(tmp_path / "in.npz", arrays())
    run_two(tmp_path, "load_and_save")
    with np.load(tmp_path / "out.npz") as file:
        assert "llm/layers/attn/qkv_einsum/w" in file
    assert_same_bits(weights.load(tmp_path / "out.npz", expected=expected_of(arrays())), arrays())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.npz", "out.npz"]


@pytest.mark.multiprocess
def test_two_processes_read_each_half_of_what_is_large(tmp_path):
    write_large(tmp_path, large_arrays())
    run_two(tmp_path, "load_in_halves")


@pytest.mark.multiprocess
@pytest.mark.parametrize("row", [0, -1])
def test_a_number_that_is_not_finite_ends_both_processes_wherever_it_is(tmp_path, row):
    """The first row and the last are read by different processes."""
    found = large_arrays()
    found["rows"][row, 5] = np.nan
    write_large(tmp_path, found)
    outputs = run_two(tmp_path, "end_together")
    reader = 0 if row == 0 else 1
    assert "WeightsError 3: " in outputs[reader] and "array 'rows' holds NaN or infinity" in outputs[reader]
    assert "UserError 3: Another process of this job cannot go on" in outputs[1 - reader]


@pytest.mark.multiprocess
def test_a_file_that_one_process_does_not_find_ends_both(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "empty").mkdir()
    write_large(tmp_path / "there", large_arrays())
    outputs = run_two(tmp_path, "end_together", folders=("there", "empty"))
    assert "UserError 3: Another process of this job cannot go on" in outputs[0]
    assert "WeightsError 3: " in outputs[1] and "in.npz: no such file" in outputs[1]


if __name__ == "__main__":
    jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
    globals()[sys.argv[3]](Path(sys.argv[4]))
    print("done", flush=True)
