import itertools
import zlib

from hypothesis import given
from hypothesis import strategies as st

from pgdist.weights.crc import combine


@given(first=st.binary(max_size=300), second=st.binary(max_size=300))
def test_two_parts_combine_to_the_checksum_of_the_whole(first, second):
    assert combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


@given(data=st.binary(max_size=500), cuts=st.lists(st.integers(0, 500), max_size=8))
def test_any_number_of_parts_combine_in_turn(data, cuts):
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    crc = zlib.crc32(b"")
    for start, stop in itertools.pairwise(bounds):
        crc = combine(crc, zlib.crc32(data[start:stop]), stop - start)
    assert crc == zlib.crc32(data)


@given(head=st.binary(min_size=1, max_size=20), megabytes=st.integers(1, 3), odd=st.integers(0, 1000))
def test_a_second_part_of_megabytes_is_as_right_as_a_short_one(head, megabytes, odd):
    tail = bytes(range(256)) * (megabytes * 4096) + b"x" * odd
    assert combine(zlib.crc32(head), zlib.crc32(tail), len(tail)) == zlib.crc32(head + tail)
