import jax
import numpy as np
import pytest

from pgdist import weights
from pgdist.errors import WeightsError
from pgdist.models import parameter_shapes
from pgdist.models.presets import PRESETS
from pgdist.parameters import flatten
from pgdist.weights.mismatch import check_fits
from tests.weights.samples import expected_of, write_npz


def layouts():
    return {name: flatten(parameter_shapes(config)) for name, config in PRESETS.items()}


@pytest.fixture(scope="module")
def published():
    return layouts()


def as_file(layout):
    return {
        name: weights.ArrayInfo(name=name, shape=leaf.shape, dtype=leaf.dtype)
        for name, leaf in layout.items()
    }


def mismatch(found, expected, **options):
    with pytest.raises(WeightsError) as caught:
        check_fits(found, expected=expected, path="w.npz", **options)
    return str(caught.value).splitlines()


def test_one_error_lists_both_sides(tmp_path):
    path = write_npz(tmp_path / "w.npz", {"same": np.ones(2), "theirs": np.ones(3), "wide": np.ones((4, 5))})
    model = {"same": np.ones(2), "ours": np.ones((6, 7), np.float32), "wide": np.ones((4, 9))}

    with pytest.raises(WeightsError) as caught:
        weights.load(path, expected=expected_of(model), hint="Set --config.init to another file.")

    assert str(caught.value).splitlines() == [
        f"{path} does not fit the model: arrays missing (-): 1, unexpected (+): 1, "
        "of another shape or type (!): 1, fitting: 1",
        "  - ours (6, 7) expected by the model, not in the file",
        "  + theirs (3,) in the file, not in the model",
        "  ! wide: file (4, 5), model (4, 9)",
        "Choose the preset that the file was written for, or another file.",
        "Set --config.init to another file.",
    ]


def test_numbers_of_another_kind_are_a_mismatch():
    found = {"x": weights.ArrayInfo(name="x", shape=(2,), dtype=np.dtype(np.int32))}
    lines = mismatch(found, {"x": jax.ShapeDtypeStruct((2,), np.float32)})
    assert "  ! x: file int32, model float32" in lines


def test_hundreds_of_lines_are_cut_to_ten_of_each_kind():
    found = as_file({f"theirs_{i}": jax.ShapeDtypeStruct((i,), np.float32) for i in range(300)})
    lines = mismatch(found, {f"ours_{i}": jax.ShapeDtypeStruct((i,), np.float32) for i in range(11)})
    assert sum(line.startswith("  - ours_") for line in lines) == 11  # one more line is as short as saying so
    assert sum(line.startswith("  + theirs_") for line in lines) == 10
    assert "  + ... and 290 more" in lines


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "paligemma-3b-224"])
def test_the_preset_that_fits_the_file_is_named(published, preset):
    lines = mismatch(as_file(published[preset]), published["paligemma-3b-224"], layouts=lambda: published)
    assert lines[-1] == f"It fits --config.model.preset={preset}."


def test_what_the_file_holds_is_told_in_the_terms_of_presets(published):
    lines = mismatch(as_file(published["paligemma2-3b-448"]), published["paligemma-3b-224"])
    assert (
        lines[-1]
        == "The file has decoder width 2304, vocabulary 257,152, 26 layers, 8 heads, 1024 image tokens."
    )


def test_a_file_that_almost_fits_names_the_nearest_preset(published):
    found = as_file(published["paligemma2-10b-224"])
    del found["img/head/bias"]
    lines = mismatch(found, published["paligemma-3b-224"], layouts=lambda: published)
    assert lines[-1] == "The nearest preset is paligemma2-10b-224 (97% of the arrays fit)."


def test_layouts_are_not_computed_for_a_file_that_fits(published):
    def never():
        raise AssertionError

    layout = published["tiny"]
    check_fits(as_file(layout), expected=layout, path="w.npz", layouts=never)


def test_every_published_model_has_its_published_number_of_arrays(published):
    """32 for PaliGemma, 34 for PaliGemma 2: what a file must hold, no more and no less."""
    numbers = {name: len(layout) for name, layout in published.items() if name != "tiny"}
    assert {n for name, n in numbers.items() if name.startswith("paligemma-")} == {32}
    assert {n for name, n in numbers.items() if name.startswith("paligemma2-")} == {34}
