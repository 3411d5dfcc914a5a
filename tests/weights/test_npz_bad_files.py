"""Files that cannot be used: each gives a WeightsError that names the file, the array, and a way on."""

import io
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgdist import weights
from pgdist.errors import WeightsError
from tests.weights.samples import BFLOAT16, assert_same_bits, expected_of, random_array, write_npz

ARRAYS = {"a": random_array((40, 5), np.float32, seed=1), "b/c": random_array((3, 4), BFLOAT16, seed=2)}


def good(path):
    write_npz(path, ARRAYS)


def cut_short(path):
    good(path)
    path.write_bytes(path.read_bytes()[:400])


def one_bit_flipped_in_the_data(path):
    good(path)
    data = bytearray(path.read_bytes())
    data[data.index(ARRAYS["a"].tobytes()) + 100] ^= 1
    path.write_bytes(data)


def text(content):
    return lambda path: path.write_text(content)


def members(**contents):
    """A zip with these members as they are (bytes), or as arrays."""

    def write(path):
        with zipfile.ZipFile(path, "w") as file:
            for name, content in contents.items():
                file.writestr(name.replace("__", "."), content)

    return write


def npy(array, *, allow_pickle=False):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=allow_pickle)
    return stream.getvalue()


def savez(**arrays):
    return lambda path: np.savez(path, **arrays)


def header_that_promises(shape):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def twice(path):
    with zipfile.ZipFile(path, "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("a.npy", npy(ARRAYS["a"]))
        file.writestr("a.npy", npy(ARRAYS["a"]))


def encrypted(path):
    good(path)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flag in the first entry of the directory
    path.write_bytes(data)


BAD_FILES = {
    "missing": (lambda path: None, r"no such file"),
    "folder": (lambda path: path.mkdir(), r"is a folder; name the \.npz file itself"),
    "empty": (text(""), r"it is empty"),
    "cut short": (cut_short, r"cut short. Download or copy it again"),
    "web page": (text("<!doctype html><title>Sign in</title>"), r"web page"),
    "git lfs pointer": (text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), r"git lfs pull"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08\x00"), r"gzip archive: unpack it"),
    "npy": (lambda path: path.write_bytes(npy(ARRAYS["a"])), r"single array \(\.npy\)"),
    "noise": (lambda path: path.write_bytes(bytes(range(200))), r"an \.npz, a zip archive"),
    "bit flip": (one_bit_flipped_in_the_data, r"array 'a' is damaged .*CRC"),
    "pickled objects": (
        members(x__npy=npy(np.array([{}, []], object), allow_pickle=True)),
        r"array 'x' holds Python objects, which are never unpickled",
    ),
    "strings": (savez(x=np.array(["a", "b"])), r"array 'x' holds <U1, not numbers"),
    "complex": (savez(x=np.ones(2, complex)), r"array 'x' holds complex128, not numbers"),
    "records": (savez(x=np.zeros(2, [("a", "f4"), ("b", "f4")])), r"array 'x' holds .*, not numbers"),
    "three-byte voids": (savez(x=np.zeros(2, "V3")), r"array 'x' holds \|V3, not numbers"),
    "other member": (members(readme__txt="hello"), r"member 'readme.txt' is not an array"),
    "same name twice": (twice, r"array 'a' is in it twice"),
    "both prefixes": (
        members(a__npy=npy(ARRAYS["a"]), **{"params/a__npy": npy(ARRAYS["a"])}),
        r"'a' and 'params/a' are both 'a' of the model",
    ),
    "both attention forms": (
        savez(**{"attn/q_einsum/w": np.ones((2, 3, 4)), "attn/qkv_einsum/w": np.ones((3, 2, 3, 4))}),
        r"'attn/q_einsum/w' and 'attn/qkv_einsum/w' are both 'attn/q_einsum/w' of the model",
    ),
    "no header": (members(a__npy=b""), r"array 'a' is damaged"),
    "cut member": (
        members(a__npy=npy(ARRAYS["a"])[:-8]),
        r"array 'a' says that it is float32 \(40, 5\), 928 bytes",
    ),
    "data after the member": (
        members(a__npy=npy(ARRAYS["a"]) + b"more"),
        r"but has 932. The file is damaged",
    ),
    "more than there is": (
        members(a__npy=header_that_promises((2**40, 2**40))),
        r"array 'a' says that it is",
    ),
    "negative size": (members(a__npy=header_that_promises((-2, 0))), r"array 'a' says that it is"),
    "newer npy": (
        members(a__npy=b"\x93NUMPY\x03\x00" + b"\0" * 100),
        r"array 'a' is damaged \(npy format \(3, 0\)",
    ),
    "encrypted": (encrypted, r"array 'a' is damaged .*encrypted"),
    "not a number": (savez(a=np.array([1.0, np.nan], np.float32)), r"array 'a' holds NaN or infinity"),
    "infinity": (savez(a=np.array([1.0, -np.inf], np.float16)), r"array 'a' holds NaN or infinity"),
    "infinity in bfloat16": (
        lambda path: write_npz(path, {"a": np.array([1.0, np.inf], BFLOAT16)}),
        r"array 'a' holds NaN or infinity",
    ),
}


@pytest.mark.parametrize(("write", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_named_with_what_to_do(tmp_path, write, message):
    path = tmp_path / "weights.npz"
    write(path)
    expected = ARRAYS if write is one_bit_flipped_in_the_data else {"a": np.zeros((2,), np.float32)}

    with pytest.raises(WeightsError, match=message) as caught:
        weights.load(path, expected=expected_of(expected))

    assert str(caught.value).startswith(str(path))
    assert caught.value.exit_code == 3


def test_an_unreadable_file_is_told_from_a_bad_one(tmp_path):
    loop = tmp_path / "loop.npz"
    loop.symlink_to(loop)
    with pytest.raises(WeightsError, match="loop.npz: cannot be read: Too many levels of symbolic links"):
        weights.load(loop, expected={})


def test_a_remote_path_is_refused_by_its_form():
    with pytest.raises(WeightsError, match=r"s3://bucket/a\.npz: expected a local path"):
        weights.load("s3://bucket/a.npz", expected={})
    with pytest.raises(WeightsError, match="s3://bucket/a.npz: .* local files"):
        weights.save("s3://bucket/a.npz", ARRAYS)


def test_a_folder_says_which_files_it_holds(tmp_path):
    good(tmp_path / "pt_224.npz")
    with pytest.raises(WeightsError, match=r"It holds pt_224\.npz"):
        weights.load(tmp_path, expected={})


def test_non_finite_numbers_pass_when_allowed(tmp_path):
    arrays = {"a": np.array([1.0, np.nan, -np.inf], np.float32)}
    path = write_npz(tmp_path / "a.npz", arrays)
    assert_same_bits(weights.load(path, expected=expected_of(arrays), allow_non_finite=True), arrays)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
def test_damage_is_an_error_or_harmless_but_never_other_numbers(tmp_path, data):
    good(tmp_path / "good.npz")
    content = bytearray((tmp_path / "good.npz").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(content)))
    path = tmp_path / "bad.npz"
    path.write_bytes(content[:cut])

    try:
        weights.read_header(path)
        weights.fingerprint(path)
        loaded = weights.load(path, expected=expected_of(ARRAYS))
    except WeightsError as error:
        assert str(path) in str(error)
    else:
        assert_same_bits(loaded, ARRAYS)
