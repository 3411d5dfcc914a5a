import os

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from pgdist import weights
from pgdist.errors import WeightsError
from pgdist.weights import loading, npz_writer
from tests.weights.samples import (
    BFLOAT16,
    DTYPES,
    assert_same_bits,
    attention,
    expected_of,
    random_array,
    write_npz,
)

NAMES = st.lists(st.sampled_from("abc") | st.just("params"), min_size=1, max_size=3).map("/".join)


@st.composite
def any_arrays(draw):
    """Any bits, NaN payloads included, in the three published dtypes; scalars and empty arrays too."""
    arrays = {}
    for name in draw(st.sets(NAMES.filter(lambda name: not name.startswith("params/")), max_size=4)):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
        bits = draw(npst.arrays(np.dtype(f"u{dtype.itemsize}"), shape))
        arrays[name] = bits.view(dtype)
    return arrays


@given(arrays=any_arrays(), block=st.sampled_from([1, 6, 16 * 2**20]))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_what_is_saved_comes_back_bit_by_bit(tmp_path, monkeypatch, arrays, block):
    monkeypatch.setattr(loading, "_BLOCK_BYTES", block)
    monkeypatch.setattr(npz_writer, "_BLOCK_SIZE", block)
    path = tmp_path / "a.npz"

    weights.save(path, arrays)

    header = weights.read_header(path)
    assert {n: (i.shape, i.dtype) for n, i in header.items()} == {
        n: (a.shape, a.dtype) for n, a in arrays.items()
    }
    loaded = weights.load(path, expected=expected_of(arrays), allow_non_finite=True)
    assert_same_bits(loaded, arrays)
    with np.load(path) as file:  # numpy is the format's reader
        for name, array in arrays.items():
            assert file[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prefix", ["", "params/"])
def test_published_files_load_with_and_without_params_prefix(tmp_path, dtype, prefix):
    arrays = attention(dtype=dtype)
    path = write_npz(tmp_path / "a.npz", {prefix + name: array for name, array in arrays.items()})

    assert_same_bits(weights.load(path, expected=expected_of(arrays)), arrays)
    assert list(weights.read_header(path)) == list(arrays)


def test_bfloat16_is_stored_as_the_published_two_byte_void(tmp_path):
    array = random_array((3, 4), BFLOAT16)
    weights.save(tmp_path / "a.npz", {"x": array})

    with np.load(tmp_path / "a.npz") as file:
        assert file["x"].dtype == np.dtype("V2")
        np.testing.assert_array_equal(file["x"].view(BFLOAT16), array)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", DTYPES, ids=str)
def test_arrays_are_cast_to_the_expected_dtype(tmp_path, stored, wanted):
    array = random_array((40, 3), stored)
    path = write_npz(tmp_path / "a.npz", {"x": array})

    loaded = weights.load(path, expected={"x": jax.ShapeDtypeStruct(array.shape, wanted)})
    assert_same_bits(loaded, {"x": array.astype(wanted)})

    loaded = weights.load(path, expected=expected_of({"x": array}), dtypes={"x": wanted})
    assert_same_bits(loaded, {"x": array.astype(wanted)})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fused_file_is_presented_under_the_models_names(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(loading, "_BLOCK_BYTES", 64)
    arrays = attention(dtype=dtype)
    query, key_value = arrays["llm/layers/attn/q_einsum/w"], arrays["llm/layers/attn/kv_einsum/w"]
    fused = np.concatenate([query[:, None], key_value], axis=1)
    stored = {"llm/layers/attn/qkv_einsum/w": fused, "llm/final_norm/scale": arrays["llm/final_norm/scale"]}
    path = write_npz(tmp_path / "a.npz", stored)

    header = weights.read_header(path)
    assert {name: info.shape for name, info in header.items()} == {n: a.shape for n, a in arrays.items()}
    assert_same_bits(weights.load(path, expected=expected_of(arrays)), arrays)


def test_fused_saving_writes_the_published_form_only_where_head_counts_agree(tmp_path):
    equal, grouped = attention(), attention(kv_heads=2)
    weights.save(tmp_path / "equal.npz", equal, fuse_qkv=True)
    weights.save(tmp_path / "grouped.npz", grouped, fuse_qkv=True)

    with np.load(tmp_path / "equal.npz") as file:
        assert set(file) == {"llm/layers/attn/qkv_einsum/w", "llm/final_norm/scale"}
        fused = file["llm/layers/attn/qkv_einsum/w"]
        np.testing.assert_array_equal(fused[:, 0], equal["llm/layers/attn/q_einsum/w"])
        np.testing.assert_array_equal(fused[:, 1:], equal["llm/layers/attn/kv_einsum/w"])
    with np.load(tmp_path / "grouped.npz") as file:
        assert set(file) == set(grouped)
    assert_same_bits(weights.load(tmp_path / "equal.npz", expected=expected_of(equal)), equal)


def test_one_layer_without_a_layer_axis_fuses_too(tmp_path):
    arrays = {
        name.replace("layers", "layer_0"): array[0] for name, array in attention().items() if "attn" in name
    }
    weights.save(tmp_path / "a.npz", arrays, fuse_qkv=True)

    with np.load(tmp_path / "a.npz") as file:
        assert {name: file[name].shape for name in file} == {"llm/layer_0/attn/qkv_einsum/w": (3, 4, 8, 6)}
    assert_same_bits(weights.load(tmp_path / "a.npz", expected=expected_of(arrays)), arrays)


def test_column_order_and_foreign_byte_order_are_read_as_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_BLOCK_BYTES", 40)
    array = random_array((3, 4, 5), np.float32)
    path = write_npz(tmp_path / "a.npz", {"columns": np.asfortranarray(array), "big": array.astype(">f4")})

    loaded = weights.load(path, expected=expected_of({"columns": array, "big": array}))
    assert_same_bits(loaded, {"columns": array, "big": array})


def test_compressed_files_are_read(tmp_path):
    array = random_array((30, 30), np.float16)
    np.savez_compressed(tmp_path / "a.npz", x=array)
    assert_same_bits(weights.load(tmp_path / "a.npz", expected=expected_of({"x": array})), {"x": array})


def test_integers_and_flags_survive_beside_cast_floats(tmp_path):
    arrays = {"step": np.int32(7).reshape(()), "flags": np.array([True, False]), "x": np.ones(3, np.float32)}
    weights.save(tmp_path / "a.npz", arrays, dtype=BFLOAT16)
    wanted = {**arrays, "x": arrays["x"].astype(BFLOAT16)}
    assert_same_bits(weights.load(tmp_path / "a.npz", expected=expected_of(wanted)), wanted)


def test_saving_in_a_narrower_dtype_rounds_to_nearest(tmp_path):
    array = random_array((50,), np.float32)
    weights.save(tmp_path / "a.npz", {"x": array}, dtype=np.float16)
    with np.load(tmp_path / "a.npz") as file:
        np.testing.assert_array_equal(file["x"], array.astype(np.float16))


def test_a_header_is_read_without_the_data(tmp_path, monkeypatch):
    path = write_npz(tmp_path / "a.npz", {"x": np.zeros(2**20, np.float32), "y": np.zeros(2**20, np.float32)})
    read = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: read.append(preadv(*arguments)) or read[-1])
    assert set(weights.read_header(path)) == {"x", "y"}
    weights.fingerprint(path)
    assert 0 < sum(read) < 2 * 10_000  # twice the directory, and 1 KiB of each member, of 8 MiB


def test_fingerprint_follows_the_contents_not_the_file(tmp_path):
    a, b = random_array((4,), np.float32, seed=1), random_array((4,), np.float32, seed=2)
    weights.save(tmp_path / "1.npz", {"a": a, "b": b})
    weights.save(tmp_path / "2.npz", {"b": b, "a": a})
    weights.save(tmp_path / "3.npz", {"a": b, "b": a})
    weights.save(tmp_path / "4.npz", {"a": a, "c": b})
    one_bit = a.copy()
    one_bit.view(np.uint32)[0] ^= 1
    weights.save(tmp_path / "5.npz", {"a": one_bit, "b": b})

    digests = [weights.fingerprint(tmp_path / f"{i}.npz") for i in range(1, 6)]
    assert (
        digests[0] == digests[1] == weights.fingerprint(write_npz(tmp_path / "numpy.npz", {"a": a, "b": b}))
    )
    assert len(set(digests[1:])) == 4
    assert all(len(digest) == 64 and int(digest, 16) for digest in digests)


def test_the_same_arrays_give_the_same_bytes(tmp_path):
    arrays = attention()
    weights.save(tmp_path / "1.npz", arrays)
    weights.save(tmp_path / "2.npz", arrays)
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()


def test_a_number_too_large_for_the_dtype_is_refused_both_ways(tmp_path):
    path = tmp_path / "a.npz"
    array = np.array([1.0, 1e6], np.float32)
    with pytest.raises(
        WeightsError, match=r"'x' holds numbers that are too large for float16, whose largest is 6.55e\+04"
    ):
        weights.save(path, {"x": array}, dtype=np.float16)
    assert list(tmp_path.iterdir()) == []

    weights.save(path, {"x": array})
    with pytest.raises(WeightsError, match="'x' holds numbers that are too large for float16"):
        weights.load(path, expected={"x": jax.ShapeDtypeStruct((2,), np.float16)})


def test_compressed_arrays_are_read_right_by_many_threads(tmp_path):
    arrays = {f"layer_{i}": random_array((50, 60), np.float32, seed=i) for i in range(34)}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    for _ in range(5):
        assert_same_bits(weights.load(tmp_path / "a.npz", expected=expected_of(arrays)), arrays)
