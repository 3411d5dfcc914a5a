"""Sources that cannot be used, of every format: one WeightsError that names the file, whatever is done with them."""

import io
import os
import pickle
import zipfile

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgdist import weights
from pgdist.errors import WeightsError
from tests.models.small import flat_shapes, with_text
from tests.weights.bad_sources import BIAS, CONFIG, SOURCES, model, npz, tensors, with_number
from tests.weights.samples import assert_same_bits, expected_of
from tests.weights.transformers_by_hand import write_folder


def do(action, source, folder, *, allow_non_finite=False):
    if action == "load":
        return weights.load(source, expected=expected_of(model()), allow_non_finite=allow_non_finite)
    target = folder / "out" / ("model.npz" if action == "to npz" else "model")
    target.parent.mkdir()
    weights.convert(source, target, allow_non_finite=allow_non_finite)
    return target


ACTIONS = ["load", "to npz", "to transformers"]
CASES = [(name, action) for name in SOURCES for action in ACTIONS]
CASES.remove(("npz: of another size", "to npz"))  # where any arrays may go


@pytest.mark.parametrize(("name", "action"), CASES)
def test_a_bad_source_is_one_error_that_names_it_and_nothing_is_written(tmp_path, name, action):
    make, message = SOURCES[name]
    source = make(tmp_path)
    with pytest.raises(WeightsError, match=message) as caught:
        do(action, source, tmp_path)
    assert caught.value.exit_code == 3
    assert str(tmp_path) in str(caught.value)
    assert not list((tmp_path / "out").glob("*"))


class Trap:
    """What unpickles it makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def pickled_npz(folder, trap):
    content = io.BytesIO()
    np.lib.format.write_array(content, np.array([trap], object), allow_pickle=True)
    np.savez(folder / "w.npz", **model())
    with zipfile.ZipFile(folder / "w.npz", "a") as archive:
        archive.writestr("x/y.npy", content.getvalue())
    return folder / "w.npz"


def pickled_folder(name, *, in_a_zip):
    def make(folder, trap):
        (folder / "m").mkdir()
        (folder / "m" / "config.json").write_text("{}")
        data = pickle.dumps(trap)
        (folder / "m" / name).write_bytes(data)
        if in_a_zip:
            with zipfile.ZipFile(folder / "m" / name, "w") as archive:
                archive.writestr("archive/data.pkl", data)
        return folder / "m"

    return make


PICKLES = {
    "npz": (pickled_npz, r"array 'x/y' holds Python objects, which are never unpickled"),
    "pytorch_model.bin": (
        pickled_folder("pytorch_model.bin", in_a_zip=False),
        r"m: holds pytorch_model\.bin, a pickle, which may run any code and is never loaded",
    ),
    "model.pt": (pickled_folder("model.pt", in_a_zip=True), r"m: holds model\.pt, a pickle"),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_is_refused_and_never_loaded(tmp_path, name, action):
    make, message = PICKLES[name]
    source = make(tmp_path, Trap(tmp_path / "sprung"))
    with pytest.raises(WeightsError, match=message):
        do(action, source, tmp_path)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()  # it is a trap


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("make", [npz, write_folder], ids=["npz", "folder"])
def test_numbers_that_are_not_finite_pass_where_they_are_allowed(tmp_path, make, action):
    bias = with_number(np.nan)
    bias[:2] = np.inf, -np.inf
    wanted = dict(model()) | {BIAS: bias}
    if make is npz:
        source = npz(**{BIAS: bias})(tmp_path)
    else:
        source = write_folder(tmp_path / "m", CONFIG, tensors(bias=bias))
    found = do(action, source, tmp_path, allow_non_finite=True)
    if action != "load":
        found = weights.load(found, expected=expected_of(wanted), allow_non_finite=True)
    assert_same_bits(found, wanted)


def test_the_preset_that_a_folder_is_of_is_named(tmp_path):
    source = write_folder(tmp_path / "m", CONFIG, tensors())
    other = with_text(CONFIG, mlp_dim=128)

    def shapes(config):
        return {n: jax.ShapeDtypeStruct(s, np.float32) for n, s in flat_shapes(config).items()}

    with pytest.raises(WeightsError, match=r"m/model\.safetensors does not fit the model") as caught:
        weights.load(
            source, expected=shapes(other), layouts=lambda: {"mine": shapes(other), "its own": shapes(CONFIG)}
        )
    assert str(caught.value).splitlines()[-1] == "It fits --config.model.preset=its own."


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
def test_any_damage_of_a_header_is_an_error_and_no_crash(tmp_path, data):
    """Of the numbers themselves the format has no checksum."""
    path = tmp_path / "m" / "model.safetensors"
    if not path.exists():
        write_folder(tmp_path / "m", CONFIG, tensors())
        (tmp_path / "good").write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "good").read_bytes())
    size = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, size - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.none() | st.integers(0, len(content)))])
    try:
        weights.read_header(tmp_path / "m")
        weights.fingerprint(tmp_path / "m")
    except WeightsError as error:
        assert str(tmp_path) in str(error)
