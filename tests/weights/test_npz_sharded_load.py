import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from pgdist import weights
from pgdist.weights import loading, npz_writer
from tests.weights.samples import BFLOAT16, assert_same_bits, attention, expected_of, random_array, write_npz

P = PartitionSpec
MIB = 2**20


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture
def puts(monkeypatch):
    """Everything that is put on a device, as (array, where)."""
    calls = []
    put = jax.device_put

    def recording(array, where=None, **options):
        calls.append((array, where))
        return put(array, where, **options)

    monkeypatch.setattr(jax, "device_put", recording)
    return calls


@pytest.mark.parametrize("block_bytes", [6, 100, 16 * MIB])
@pytest.mark.parametrize(
    "spec",
    [P(), P("fsdp"), P(None, "fsdp"), P(None, None, "data"), P("fsdp", "data"), P(None, ("data", "fsdp"))],
    ids=str,
)
def test_each_device_gets_its_shard_and_nothing_more(tmp_path, monkeypatch, mesh, puts, spec, block_bytes):
    monkeypatch.setattr(loading, "_BLOCK_BYTES", block_bytes)
    array = random_array((4, 8, 6), BFLOAT16)
    path = write_npz(tmp_path / "a.npz", {"x": array})
    sharding = NamedSharding(mesh, spec)

    loaded = weights.load(path, expected=expected_of({"x": array}), shardings={"x": sharding})["x"]

    assert loaded.sharding == sharding
    assert len(loaded.addressable_shards) == 8
    for shard in loaded.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), array[shard.index])
    assert len(puts) == 8
    assert {put.shape for put, _ in puts} == {sharding.shard_shape(array.shape)}
    assert {device for _, where in puts for device in where.device_set} == set(mesh.devices.flat)


def test_a_fused_array_goes_to_its_two_shardings(tmp_path, mesh, puts):
    arrays = attention(dtype=BFLOAT16)
    weights.save(tmp_path / "a.npz", arrays, fuse_qkv=True)
    shardings = {
        "llm/layers/attn/q_einsum/w": NamedSharding(mesh, P(None, "fsdp", "data")),
        "llm/layers/attn/kv_einsum/w": NamedSharding(mesh, P(None, "data", None, "fsdp")),
    }

    loaded = weights.load(tmp_path / "a.npz", expected=expected_of(arrays), shardings=shardings)

    assert_same_bits(loaded, arrays)
    for name, sharding in shardings.items():
        assert loaded[name].sharding == sharding
        for shard in loaded[name].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), arrays[name][shard.index])
    assert {put.shape for put, _ in puts} == {(2, 1, 4, 6), (2, 1, 4, 2, 6), (8,)}


def test_without_a_sharding_an_array_is_free_to_move(tmp_path, mesh):
    array = random_array((4,), np.float32)
    path = write_npz(tmp_path / "a.npz", {"x": array})
    loaded = weights.load(path, expected=expected_of({"x": array}))["x"]
    assert not loaded.committed

    device = jax.devices()[3]
    sharding = SingleDeviceSharding(device)
    loaded = weights.load(path, expected=expected_of({"x": array}), shardings={"x": sharding})["x"]
    assert loaded.devices() == {device}


def test_scalars_and_empty_arrays_are_replicated(tmp_path, mesh):
    arrays = {"scalar": np.float32(3).reshape(()), "empty": np.zeros((0, 4), BFLOAT16)}
    path = write_npz(tmp_path / "a.npz", arrays)
    shardings = dict.fromkeys(arrays, NamedSharding(mesh, P()))
    loaded = weights.load(path, expected=expected_of(arrays), shardings=shardings)
    assert_same_bits(loaded, arrays)
    assert loaded["scalar"].is_fully_replicated


@pytest.mark.parametrize("compress", [False, True])
def test_host_memory_stays_at_one_array_however_many_there_are(tmp_path, monkeypatch, mesh, compress):
    monkeypatch.setattr(loading, "_BLOCK_BYTES", MIB // 8)  # eight at once
    arrays = {f"layer_{i}": np.full((8, MIB // 2), i, np.float32) for i in range(8)}  # 16 MiB each
    (np.savez_compressed if compress else np.savez)(tmp_path / "a.npz", **arrays)
    expected, largest = expected_of(arrays, dtype=BFLOAT16), 8 * MIB
    # A CPU device may keep the host's buffer as its own: a copy is put instead, as on any other device.
    put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, where=None: put(jnp.array(x), where))

    shardings = dict.fromkeys(arrays, NamedSharding(mesh, P("fsdp")))
    weights.load(
        tmp_path / "a.npz", expected=expected, shardings=shardings
    )  # what is imported once is not counted

    tracemalloc.start()
    try:
        loaded = weights.load(tmp_path / "a.npz", expected=expected, shardings=shardings)
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert left < MIB
    assert peak < largest + 3 * MIB, f"{peak / MIB:.1f} MiB"
    assert_same_bits(loaded, {name: array.astype(BFLOAT16) for name, array in arrays.items()})


def test_host_memory_of_saving_stays_at_one_array(tmp_path, monkeypatch, mesh):
    monkeypatch.setattr(npz_writer, "_BLOCK_SIZE", MIB // 4)
    sharding = NamedSharding(mesh, P("fsdp"))
    host = np.ones((8, MIB // 4), np.float32)
    arrays = {f"layer_{i}": jax.device_put(host * i, sharding) for i in range(6)}
    weights.save(tmp_path / "warm.npz", {"x": arrays["layer_0"]})

    tracemalloc.start()
    try:
        weights.save(tmp_path / "a.npz", arrays, dtype=BFLOAT16)
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert left < MIB
    assert peak < host.nbytes + 3 * MIB, f"{peak / MIB:.1f} MiB"
    loaded = weights.load(tmp_path / "a.npz", expected=expected_of(arrays, dtype=BFLOAT16))
    assert_same_bits(loaded, {name: np.asarray(array).astype(BFLOAT16) for name, array in arrays.items()})
