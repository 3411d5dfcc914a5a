"""Weights for a model that is not quite theirs; the judges are scipy's zoom and numpy's generator."""

import logging

import jax
import numpy as np
import pytest
import scipy.ndimage
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pgdist import weights
from pgdist.errors import ConfigError, WeightsError
from pgdist.models import parameter_shapes
from pgdist.parameters import flatten
from pgdist.weights import loading
from tests.models.small import SMALL, with_image, with_text
from tests.weights.samples import BFLOAT16, DTYPES, assert_same_bits, expected_of, random_array, write_npz
from tests.weights.transformers_by_hand import in_transformers, random_model, write_folder

P = PartitionSpec
POSITIONS, EMBEDDING = "img/pos_embedding", "llm/embedder/input_embedding"
SPECS = [None, P(), P(None, None, "fsdp"), P(None, "fsdp"), P(None, "data", "fsdp")]


def mesh():
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def load_one(path, name, shape, *, dtype=np.float32, spec=None, **options):
    """The array of a file of one, on a mesh if there is a spec."""
    shardings = None if spec is None else {name: NamedSharding(mesh(), spec)}
    expected = {name: jax.ShapeDtypeStruct(shape, dtype)}
    return np.asarray(weights.load(path, expected=expected, shardings=shardings, **options)[name])


@pytest.fixture(params=[100, 8 * 2**20], ids=["small blocks", "one block"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(loading, "_BLOCK_BYTES", request.param)


@pytest.mark.parametrize(("old", "new"), [(4, 8), (4, 6), (8, 4), (6, 5), (1, 3), (3, 1)])
def test_position_embeddings_are_resized_as_scipy_does(tmp_path, old, new):
    array = random_array((1, old**2, 12), np.float32)
    path = write_npz(tmp_path / "a.npz", {POSITIONS: array})
    grid = array.reshape(old, old, 12)
    wanted = scipy.ndimage.zoom(grid, (new / old, new / old, 1), order=1).reshape(1, new**2, 12)
    assert load_one(path, POSITIONS, wanted.shape).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("old", [2, 3, 5])
def test_resizing_keeps_the_corners_and_is_linear_between_them(tmp_path, old):
    """By the formula of bilinear interpolation, without scipy."""
    new = 2 * old - 1  # every other new point is an old one
    array = random_array((1, old**2, 3), np.float32)
    path = write_npz(tmp_path / "a.npz", {POSITIONS: array})
    found = load_one(path, POSITIONS, (1, new**2, 3)).reshape(new, new, 3)
    grid = array.reshape(old, old, 3)
    np.testing.assert_allclose(found[::2, ::2], grid, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found[1::2, ::2], (grid[1:] + grid[:-1]) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_resized_embeddings_are_the_same_on_every_mesh(tmp_path, blocks, spec, dtype):
    array = random_array((1, 16, 8), dtype)
    path = write_npz(tmp_path / "a.npz", {POSITIONS: array})
    zoomed = scipy.ndimage.zoom(array.astype(np.float32).reshape(4, 4, 8), (2, 2, 1), order=1)
    wanted = zoomed.reshape(1, 64, 8).astype(dtype)
    assert load_one(path, POSITIONS, (1, 64, 8), dtype=dtype, spec=spec).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", [None, P(), P("fsdp"), P(None, "fsdp"), P("data", "fsdp")], ids=str)
def test_new_rows_are_the_seeded_generators_on_every_mesh_and_old_ones_as_they_were(
    tmp_path, blocks, spec, dtype
):
    old = random_array((20, 8), dtype)
    path = write_npz(tmp_path / "a.npz", {EMBEDDING: old})
    found = load_one(path, EMBEDDING, (32, 8), dtype=dtype, spec=spec, seed=7)
    new = np.float32(0.02) * np.random.default_rng(7).standard_normal((12, 8), dtype=np.float32)
    assert found[:20].tobytes() == old.tobytes()
    assert found[20:].tobytes() == new.astype(dtype).tobytes()


def test_another_seed_gives_other_rows_of_the_published_spread(tmp_path):
    path = write_npz(tmp_path / "a.npz", {EMBEDDING: random_array((20, 64), np.float32)})
    one, two = (load_one(path, EMBEDDING, (1020, 64), seed=seed)[20:] for seed in (0, 1))
    assert not (one == two).any(axis=1).any()
    for rows in (one, two):
        # The standard error of a deviation is 0.02 / sqrt(2 * 64,000), of a mean 0.02 / sqrt(64,000).
        assert abs(rows.std() - 0.02) < 5 * 0.02 / np.sqrt(2 * rows.size)
        assert abs(rows.mean()) < 5 * 0.02 / np.sqrt(rows.size)


def test_a_folder_for_transformers_is_adapted_too(tmp_path):
    old = SMALL["paligemma2"]
    new = with_text(with_image(old, image_size=84), vocab_size=330)
    flat = random_model(old, BFLOAT16)
    write_folder(tmp_path / "m", old, in_transformers(flat, old, rows=384))
    expected = flatten(parameter_shapes(new))
    found = weights.load(tmp_path / "m", expected=expected, dtypes=dict.fromkeys(expected, np.float32))

    grid = flat[POSITIONS].astype(np.float32).reshape(4, 4, 48)
    wanted = {name: array.astype(np.float32) for name, array in flat.items()}
    wanted[POSITIONS] = scipy.ndimage.zoom(grid, (1.5, 1.5, 1), order=1).reshape(1, 36, 48)
    rows = np.random.default_rng(0).standard_normal((10, 72), dtype=np.float32) * np.float32(0.02)
    wanted[EMBEDDING] = np.concatenate([wanted[EMBEDDING], rows.astype(BFLOAT16).astype(np.float32)])
    assert_same_bits(found, wanted)


ARRAYS = {
    "img/head/kernel": random_array((3, 4), np.float32, seed=1),
    "img/head/bias": random_array((4,), np.float32, seed=2),
    "llm/final_norm/scale": random_array((5,), np.float32, seed=3),
}


def test_arrays_that_a_pattern_matches_are_neither_wanted_nor_read(tmp_path):
    """Of either side, by their whole names; what is wrong with them in the file does not matter."""
    stored = ARRAYS | {"img/head/kernel": np.full((9, 9), np.nan, np.float32), "extra/x": np.ones(2)}
    path = write_npz(tmp_path / "a.npz", stored)
    expected = expected_of(ARRAYS | {"img/mlp/w": np.ones(3)})
    found = weights.load(path, expected=expected, skip=["img/head/k.*", "extra/.*", ".*/mlp/.*"])
    assert_same_bits(found, {name: ARRAYS[name] for name in ("img/head/bias", "llm/final_norm/scale")})
    with pytest.raises(WeightsError, match=r"(?s)\+ extra/x.*! img/head/kernel"):
        weights.load(path, expected=expected_of(ARRAYS), skip=["img/head/bias"])
    for part in ("img/head", "extra", "head/kernel"):
        with pytest.raises(ConfigError, match=f"config.init_skip: '{part}' matches no array"):
            weights.load(path, expected=expected_of(ARRAYS), skip=[part])


@pytest.mark.parametrize("pattern", ["img/(", "*", "[a"])
def test_a_broken_pattern_is_an_error_of_the_config(tmp_path, pattern):
    path = write_npz(tmp_path / "a.npz", ARRAYS)
    with pytest.raises(ConfigError, match=r"config\.init_skip: .* is not a regular expression") as caught:
        weights.load(path, expected=expected_of(ARRAYS), skip=["img/.*", pattern])
    assert repr(pattern) in str(caught.value)


def test_each_adaptation_is_logged_and_nothing_where_none_is_made(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    arrays = ARRAYS | {
        POSITIONS: random_array((1, 4, 6), np.float32),
        EMBEDDING: random_array((7, 5), np.float32),
    }
    path = write_npz(tmp_path / "a.npz", arrays)
    weights.load(path, expected=expected_of(arrays))
    assert not caplog.messages

    larger = {POSITIONS: np.ones((1, 9, 6), np.float32), EMBEDDING: np.ones((10, 5), np.float32)}
    weights.load(path, expected=expected_of(arrays | larger), skip=["img/head/.*"], seed=3)
    assert caplog.messages == [
        "Not read, as config.init_skip says: img/head/bias, img/head/kernel.",
        f"{POSITIONS}: resized from 2 x 2 to 3 x 3 image tokens, bilinearly.",
        f"{EMBEDDING}: extended from 7 to 10 rows, the new ones from 0.02 * normal with seed 3.",
    ]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (POSITIONS, (1, 12, 4), (1, 16, 4)),  # no square
        (POSITIONS, (1, 16, 4), (1, 36, 8)),  # of another width
        (POSITIONS, (16, 4), (36, 4)),
        (EMBEDDING, (20, 4), (16, 4)),  # rows too many
        (EMBEDDING, (20, 4), (24, 8)),
        (EMBEDDING, (0, 4), (24, 4)),
        ("img/head/kernel", (3, 4), (3, 8)),
    ],
    ids=str,
)
def test_what_cannot_be_adapted_is_the_one_error_that_lists_both_sides(tmp_path, name, old, new):
    path = write_npz(tmp_path / "a.npz", {name: np.ones(old, np.float32), "theirs": np.ones(2, np.float32)})
    expected = {name: jax.ShapeDtypeStruct(new, np.float32), "ours": jax.ShapeDtypeStruct((3,), np.float32)}
    with pytest.raises(WeightsError) as caught:
        weights.load(path, expected=expected)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{path} does not fit the model")
    assert "  - ours (3,) expected by the model, not in the file" in lines
    assert "  + theirs (2,) in the file, not in the model" in lines
    assert f"  ! {name}: file {old}, model {new}" in lines


@pytest.mark.parametrize("name", [POSITIONS, EMBEDDING])
def test_a_number_that_is_not_finite_is_found_in_what_is_adapted(tmp_path, name):
    old, new = {POSITIONS: ((1, 4, 6), (1, 9, 6)), EMBEDDING: ((7, 5), (9, 5))}[name]
    array = np.ones(old, np.float32)
    array.reshape(-1)[-1] = np.inf
    path = write_npz(tmp_path / "a.npz", {name: array})
    with pytest.raises(WeightsError, match=rf"a\.npz: array '{name}.* holds NaN or infinity"):
        load_one(path, name, new)
