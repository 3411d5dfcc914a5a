"""What a run may begin with: other layouts and resolutions, parts left out, several files, and in which dtypes."""

import jax
import ml_dtypes
import numpy as np
import pytest

from pgdist import weights
from pgdist.config import default_config
from pgdist.errors import ConfigError, WeightsError
from pgdist.finetune import finetune
from pgdist.job import Job
from pgdist.parameters import flatten
from pgdist.workdir import Workdir
from tests.tiny_runs import TOKENIZER, assert_same_bits, host, tiny_config, write_inputs

ATTENTION = (("llm/layers/attn/.*", 1.0), (".*", 0.0))
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def stored(inputs):
    with np.load(inputs.weights) as file:
        return dict(file)


def begin(config, tmp_path):
    """{name: array} of the state before the first step, trainable and frozen."""
    frozen, state = Job(config, Workdir(tmp_path / "work")).load_weights()
    return host(state.trainable), host(frozen)


def write_part(path, stored, prefix, *, bare=False):
    part = {name: array for name, array in stored.items() if name.startswith(prefix)}
    np.savez(path, **{name.removeprefix(prefix) if bare else name: array for name, array in part.items()})
    return path


def test_a_transformers_folder_begins_the_same_run_as_its_npz(inputs, tmp_path):
    folder = tmp_path / "hf"
    weights.convert(inputs.weights, folder, tokenizer=TOKENIZER)
    runs = [
        finetune(tiny_config(inputs, init=str(init), steps=3), workdir=tmp_path / f"run_{i}")
        for i, init in enumerate([inputs.weights, folder])
    ]
    assert_same_bits(host(runs[1].params), host(runs[0].params))


def test_masters_are_float32_and_the_rest_is_as_the_file_has_it(inputs, stored, tmp_path):
    """A bfloat16 file, as PaliGemma 2 is published, trains in float32 without being asked to."""
    path = tmp_path / "bf16.npz"
    weights.save(path, stored, dtype=BFLOAT16)
    config = tiny_config(inputs, init=str(path), trainable=ATTENTION, frozen_dtype="file")
    trainable, frozen = begin(config, tmp_path)
    assert {array.dtype for array in trainable.values()} == {np.dtype(np.float32)}
    assert {array.dtype for array in frozen.values()} == {BFLOAT16}
    assert default_config().frozen_dtype == "bfloat16"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_frozen_parameters_are_kept_in_the_chosen_dtype(inputs, tmp_path, dtype):
    trainable, frozen = begin(tiny_config(inputs, trainable=ATTENTION, frozen_dtype=dtype), tmp_path)
    assert {array.dtype.name for array in frozen.values()} == {dtype}
    assert {array.dtype.name for array in trainable.values()} == {"float32"}


def test_what_is_skipped_begins_at_random_and_the_rest_is_the_files(inputs, stored, tmp_path):
    config = tiny_config(inputs, init_skip=("img/head/.*", "llm/final_norm/scale"))
    found, _ = begin(config, tmp_path)
    skipped = {"img/head/kernel", "img/head/bias", "llm/final_norm/scale"}
    assert_same_bits(
        {name: array for name, array in found.items() if name not in skipped},
        {name: array for name, array in stored.items() if name not in skipped},
    )
    assert not any(found[name].any() for name in skipped)  # as published: connector and norms begin at zero


def test_a_skip_that_matches_nothing_is_a_mistake(inputs, tmp_path):
    with pytest.raises(ConfigError, match=r"config.init_skip: 'img/heads' matches no array"):
        begin(tiny_config(inputs, init_skip=("img/heads",)), tmp_path)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("prefix, other", [("llm/", "img/"), ("img/", "llm/")])
def test_one_tower_alone_begins_with_the_other_at_random(inputs, stored, tmp_path, prefix, other, bare):
    path = write_part(tmp_path / "tower.npz", stored, prefix, bare=bare)
    found, _ = begin(tiny_config(inputs, init=str(path), init_skip=(other + ".*",)), tmp_path)
    for name, array in found.items():
        assert (array.tobytes() == stored[name].tobytes()) == name.startswith(prefix), name


def test_two_towers_in_two_files_make_one_model(inputs, stored, tmp_path):
    paths = [write_part(tmp_path / f"{prefix[:3]}.npz", stored, prefix) for prefix in ("img/", "llm/")]
    found, _ = begin(tiny_config(inputs, init=",".join(map(str, paths))), tmp_path)
    assert_same_bits(found, stored)


def test_a_tower_that_is_missing_is_named_with_the_way_on(inputs, stored, tmp_path):
    path = write_part(tmp_path / "llm.npz", stored, "llm/")
    with pytest.raises(
        WeightsError, match=r"(?s)encoder_norm/bias .* not in the file.*--config.init_skip.*after a comma"
    ):
        begin(tiny_config(inputs, init=str(path)), tmp_path)


def test_another_resolution_is_resized_and_trains(inputs, stored, tmp_path, caplog):
    scipy_ndimage = pytest.importorskip("scipy.ndimage")
    grid = np.random.default_rng(0).normal(size=(4, 4, 64)).astype(np.float32)
    path = tmp_path / "small.npz"
    np.savez(path, **stored | {"img/pos_embedding": grid.reshape(1, 16, 64)})
    found, _ = begin(tiny_config(inputs, init=str(path)), tmp_path)
    expected = scipy_ndimage.zoom(grid, (7 / 4, 7 / 4, 1), order=1).reshape(1, 49, 64)
    np.testing.assert_array_equal(found["img/pos_embedding"], expected)


def test_infinity_passes_on_request_alone(inputs, stored, tmp_path):
    path = tmp_path / "inf.npz"
    bias = stored["img/head/bias"].copy()
    bias[3] = np.inf
    np.savez(path, **stored | {"img/head/bias": bias})
    with pytest.raises(WeightsError, match=r"'img/head/bias' holds NaN or infinity.*init_allow_non_finite"):
        begin(tiny_config(inputs, init=str(path)), tmp_path)
    found, _ = begin(tiny_config(inputs, init=str(path), init_allow_non_finite=True), tmp_path)
    assert np.isinf(found["img/head/bias"][3])


def test_what_is_random_is_the_same_on_every_mesh(inputs, tmp_path):
    fields = {"init_skip": ("img/.*",), "seed": 5}
    one = begin(tiny_config(inputs, **fields, **{"mesh.data": 8, "mesh.fsdp": 1}), tmp_path)[0]
    other = begin(tiny_config(inputs, **fields, **{"mesh.data": 1, "mesh.fsdp": 8}), tmp_path)[0]
    assert_same_bits(one, other)
    assert len(jax.devices()) == 8 and flatten(one)
