"""One bit that is wrong in an npz is found, whichever way the array is read; and reading by several threads is safe."""

import threading
import zipfile

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pgdist import weights
from pgdist.errors import WeightsError
from pgdist.weights import loading, npz_reader
from tests.weights.samples import assert_same_bits, attention, expected_of, random_array, write_npz

P = PartitionSpec
POSITIONS, EMBEDDING = "img/pos_embedding", "llm/embedder/input_embedding"


def flip_a_bit(path, name):
    """In the last byte but one of an array's data: of a number's exponent, which stays finite."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        content = file.read(f"{name}.npy")
    at = data.index(content) + len(content) - 2
    data[at] ^= 1
    path.write_bytes(data)
    return path


def fused(arrays):
    query, key_value, scale = arrays
    return {
        "llm/layers/attn/qkv_einsum/w": np.concatenate([arrays[query][:, None], arrays[key_value]], axis=1),
        scale: arrays[scale],
    }


@pytest.mark.parametrize("block_bytes", [64, 1000, 8 * 2**20])
@pytest.mark.parametrize("head_dim", [6, 5000])
def test_damage_in_a_fused_array_is_found_though_two_arrays_are_read_of_it(
    tmp_path, monkeypatch, block_bytes, head_dim
):
    """Whether each of them is read apart, or the whole for each because its parts are small."""
    monkeypatch.setattr(loading, "_BLOCK_BYTES", block_bytes * (1 + head_dim // 6))
    arrays = attention(head_dim=head_dim)
    path = write_npz(tmp_path / "a.npz", fused(arrays))
    assert_same_bits(weights.load(path, expected=expected_of(arrays)), arrays)
    flip_a_bit(path, "llm/layers/attn/qkv_einsum/w")
    with pytest.raises(WeightsError, match=r"qkv_einsum/w' is damaged \(its CRC-32"):
        weights.load(path, expected=expected_of(arrays))
    with pytest.raises(WeightsError, match=r"qkv_einsum/w' is damaged \(its CRC-32"):
        weights.convert(path, tmp_path / "b.npz")


@pytest.mark.parametrize("spec", [P(), P(None, "fsdp"), P("fsdp"), P("data", None, "fsdp")], ids=str)
def test_damage_is_found_on_every_sharding_of_one_process(tmp_path, spec):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    arrays = {"x": random_array((8, 8, 8), np.float32)}
    path = flip_a_bit(write_npz(tmp_path / "a.npz", arrays), "x")
    with pytest.raises(WeightsError, match=r"'x' is damaged \(its CRC-32"):
        weights.load(path, expected=expected_of(arrays), shardings={"x": NamedSharding(mesh, spec)})


@pytest.mark.parametrize("name", [POSITIONS, EMBEDDING])
@pytest.mark.parametrize("block_bytes", [200, 8 * 2**20])
def test_damage_in_an_array_that_is_adapted_is_found(tmp_path, monkeypatch, name, block_bytes):
    monkeypatch.setattr(loading, "_BLOCK_BYTES", block_bytes)
    arrays = {
        POSITIONS: random_array((1, 16, 6), np.float32),
        EMBEDDING: random_array((20, 6), np.float32),
    }
    larger = {POSITIONS: (1, 36, 6), EMBEDDING: (24, 6)}
    expected = {n: jax.ShapeDtypeStruct(shape, np.float32) for n, shape in larger.items()}
    path = write_npz(tmp_path / "a.npz", arrays)
    weights.load(path, expected=expected)
    flip_a_bit(path, name)
    with pytest.raises(WeightsError, match=rf"'{name}' is damaged \(its CRC-32"):
        weights.load(path, expected=expected)


@pytest.mark.parametrize("target", ["b.npz", "m"])
def test_damage_is_found_while_converting_and_nothing_is_written(tmp_path, target):
    from tests.models.small import SMALL
    from tests.weights.transformers_by_hand import random_model

    path = write_npz(tmp_path / "a.npz", random_model(SMALL["paligemma"]))
    flip_a_bit(path, "llm/layers/mlp/gating_einsum")
    with pytest.raises(WeightsError, match=r"a\.npz: array 'llm/layers/mlp/gating_einsum' is damaged"):
        weights.convert(path, tmp_path / target)
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_a_deflated_array_is_inflated_once_and_kept_while_anything_is_read_of_it(tmp_path, monkeypatch):
    """Queries and keys are read at the same time of one fused member."""
    monkeypatch.setattr(loading, "_BLOCK_BYTES", 2000)
    arrays = attention(layers=4, width=32, head_dim=32)
    np.savez_compressed(tmp_path / "a.npz", **fused(arrays))
    inflated = []
    inflate = npz_reader.NpzReader.inflate

    def counting(reader, entry, *, skip):
        inflated.append(entry.filename)
        return inflate(reader, entry, skip=skip)

    monkeypatch.setattr(npz_reader.NpzReader, "inflate", counting)
    for _ in range(20):
        inflated.clear()
        assert_same_bits(weights.load(tmp_path / "a.npz", expected=expected_of(arrays)), arrays)
        assert sorted(inflated) == ["llm/final_norm/scale.npy", "llm/layers/attn/qkv_einsum/w.npy"]


def test_many_threads_read_different_parts_of_a_file_at_once(tmp_path):
    array = np.arange(2**20, dtype=np.float32)
    np.savez(tmp_path / "stored.npz", x=array)
    np.savez_compressed(tmp_path / "deflated.npz", x=array)
    for name in ("stored.npz", "deflated.npz"):
        wrong = []
        with npz_reader.NpzReader(tmp_path / name) as reader:

            def read(seed, stored=reader.arrays["x"], wrong=wrong):
                for start in np.random.default_rng(seed).integers(0, 2**20 - 5000, 100):
                    box = ((int(start), int(start) + 5000),)
                    if not np.array_equal(stored.read((2**20,), box).numbers, array[start : start + 5000]):
                        wrong.append(start)

            threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not wrong
