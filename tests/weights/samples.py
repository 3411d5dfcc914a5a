"""Arrays and files for the tests of weights."""

import jax
import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)


def random_array(shape, dtype, *, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def attention(*, layers=2, heads=4, kv_heads=4, width=8, head_dim=6, dtype=np.float32):
    """The arrays of a decoder's attention that have the two published forms."""
    return {
        "llm/layers/attn/q_einsum/w": random_array((layers, heads, width, head_dim), dtype, seed=1),
        "llm/layers/attn/kv_einsum/w": random_array((layers, 2, kv_heads, width, head_dim), dtype, seed=2),
        "llm/final_norm/scale": random_array((width,), dtype, seed=3),
    }


def expected_of(arrays, *, dtype=None):
    return {name: jax.ShapeDtypeStruct(a.shape, dtype or a.dtype) for name, a in arrays.items()}


def write_npz(path, arrays):
    """As published: by numpy.savez, bfloat16 as 2-byte voids."""
    np.savez(path, **{name: a.view("V2") if a.dtype == BFLOAT16 else a for name, a in arrays.items()})
    return path


def assert_same_bits(actual, wanted):
    assert actual.keys() == wanted.keys()
    for name, array in wanted.items():
        got = np.asarray(actual[name])
        assert (got.shape, got.dtype) == (array.shape, array.dtype), name
        assert got.tobytes() == np.ascontiguousarray(array).tobytes(), name
