"""Which numbers are found that must not be there; numpy's isfinite is the judge."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgdist.errors import WeightsError
from pgdist.weights.casting import cast, check_finite, check_range, may_overflow
from tests.weights.samples import BFLOAT16, DTYPES

F16, F32, F64 = (np.dtype(name) for name in ("float16", "float32", "float64"))
EDGES = (0, 1, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF)
FLOAT32_BITS = st.integers(0, 2**32 - 1) | st.sampled_from([e | sign for e in EDGES for sign in (0, 2**31)])


def passes(numbers):
    try:
        check_finite(numbers, source=numbers, name="x", path="w.npz")
    except WeightsError as error:
        assert "array 'x' holds NaN or infinity" in str(error)
        return False
    return True


@pytest.mark.parametrize("dtype", [F16, BFLOAT16], ids=str)
def test_each_of_all_16_bit_patterns_is_judged_as_numpy_does(dtype):
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):  # of signalling NaNs
        wanted = np.isfinite(every)
    others = np.array([1.0, -1.0, 0.0, -0.0, 6e4, -6e4, 1e-7], dtype)
    found = np.empty_like(wanted)
    for i, number in enumerate(every):
        block = np.insert(others, i % (len(others) + 1), number)
        found[i] = passes(block)
    np.testing.assert_array_equal(found, wanted)


@given(bits=FLOAT32_BITS, at=st.integers(0, 8), sign=st.sampled_from([1.0, -1.0]))
def test_float32_patterns_are_judged_as_numpy_does(bits, at, sign):
    number = np.uint32(bits).view(np.float32)
    block = np.insert(sign * np.linspace(0, 3e38, 8, dtype=np.float32), at, number)
    assert passes(block) == bool(np.isfinite(block).all())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [*DTYPES, F64, np.dtype(">f4"), np.dtype(">f2")], ids=str)
def test_blocks_of_any_layout_and_byte_order_are_searched(dtype, bad):
    block = np.zeros((6, 4), dtype)
    block[3, 1] = bad
    assert not passes(block)
    assert not passes(block.T)
    assert not passes(block[::-1, 1:2])
    assert passes(block[:, 2:])
    assert passes(block[:0])
    assert not passes(block[3, 1].reshape(()))


def test_whole_numbers_and_flags_are_always_finite():
    for numbers in (np.array([2**31 - 1, -1], np.int32), np.array([True]), np.array([255], np.uint8)):
        assert passes(numbers)


@pytest.mark.parametrize("target", [*DTYPES, F64], ids=str)
@pytest.mark.parametrize("source", [*DTYPES, F64, np.dtype(">f4"), np.dtype("<i4"), np.dtype("?")], ids=str)
def test_what_may_overflow_is_what_the_largest_number_tells(source, target):
    overflows = False
    if source.kind not in "ib":
        bits = {2: 0x7BFF if source.kind == "f" else 0x7F7F, 4: 0x7F7FFFFF, 8: 0x7FEFFFFFFFFFFFFF}
        native = source.newbyteorder("=")
        largest = np.array(bits[source.itemsize], f"u{source.itemsize}").view(native)
        assert np.isfinite(largest)
        with np.errstate(over="ignore"):
            overflows = bool(np.isinf(largest.astype(target)))
    assert may_overflow(source, target) == overflows


def test_a_number_that_is_too_large_is_told_from_one_that_was_infinite_before():
    too_large, infinite = np.array([1.0, 1e6], np.float32), np.array([1.0, np.inf], np.float32)
    for check in (check_finite, check_range):
        with pytest.raises(WeightsError, match=r"^w\.npz: array 'x' .* too large for float16, .* 6.55e\+04"):
            check(cast(too_large, F16), source=too_large, name="x", path="w.npz")
    with pytest.raises(WeightsError, match="NaN or infinity"):
        check_finite(cast(infinite, F16), source=infinite, name="x", path="w.npz")
    check_range(cast(infinite, F16), source=infinite, name="x", path="w.npz")


def test_casting_rounds_as_numpy_does_and_overflows_in_silence(recwarn):
    numbers = np.array([1 + 2**-11, 1e6, -1e39, np.nan], np.float64)
    for dtype in DTYPES:
        with np.errstate(all="ignore"):
            wanted = numbers.astype(dtype)
        recwarn.clear()
        assert cast(numbers, dtype).tobytes() == wanted.tobytes()
        assert not recwarn.list
    assert cast(numbers, F64) is numbers
