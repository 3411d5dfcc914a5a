"""From one layout to the other and back: the same bits; transformers' side is compared with numpy's formulas."""

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pgdist import weights
from pgdist.errors import WeightsError
from pgdist.models import PRESETS
from pgdist.weights import converting
from tests.models.small import SMALL, with_text
from tests.weights.samples import BFLOAT16, DTYPES, assert_same_bits, random_array, write_npz
from tests.weights.transformers_by_hand import in_transformers, random_model, read_folder, write_folder

CONFIGS = SMALL | {"tiny": PRESETS["tiny"]}
ROWS = {"paligemma": 384, "paligemma2": 384, "tiny": 1408}  # (V + 1) in multiples of 64
EMBEDDING, STORED_EMBEDDING = "llm/embedder/input_embedding", "language_model.model.embed_tokens.weight"
TOKENIZER = Path(__file__).parents[2] / "assets" / "tiny_tokenizer.model"

every_config = pytest.mark.parametrize("name", CONFIGS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def arrays_in(path):
    """What an npz holds, read by numpy."""
    with np.load(path) as file:
        return {name: file[name].view(BFLOAT16) if file[name].dtype == "V2" else file[name] for name in file}


def assert_is_in_transformers(folder, flat, config, *, rows):
    """The folder has the model's tensors, and in rows behind the vocabulary the mean of the others."""
    found, wanted = read_folder(folder), in_transformers(flat, config, rows=rows)
    embedding = flat[EMBEDDING]
    tail = found[STORED_EMBEDDING][len(embedding) :]
    mean = embedding.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(
        tail.astype(np.float64), np.broadcast_to(mean, tail.shape), rtol=2**-8, atol=1e-7
    )
    assert (tail == tail[0]).all()
    wanted[STORED_EMBEDDING] = np.concatenate([embedding, tail])
    assert_same_bits(found, wanted)


@every_config
@every_dtype
def test_an_npz_becomes_transformers_tensors_and_comes_back_bit_by_bit(tmp_path, monkeypatch, name, dtype):
    monkeypatch.setattr(converting, "_ROWS_BYTES", 3000)
    flat = random_model(CONFIGS[name], dtype)
    write_npz(tmp_path / "a.npz", flat)

    weights.convert(tmp_path / "a.npz", tmp_path / "m")
    assert_is_in_transformers(tmp_path / "m", flat, CONFIGS[name], rows=ROWS[name])
    weights.convert(tmp_path / "m", tmp_path / "b.npz")
    assert_same_bits(arrays_in(tmp_path / "b.npz"), flat)


@every_config
def test_each_array_keeps_its_own_dtype_both_ways(tmp_path, name):
    flat = random_model(CONFIGS[name])
    flat = {name: array.astype(DTYPES[i % 3]) for i, (name, array) in enumerate(flat.items())}
    write_npz(tmp_path / "a.npz", flat)
    weights.convert(tmp_path / "a.npz", tmp_path / "m")
    assert_is_in_transformers(tmp_path / "m", flat, CONFIGS[name], rows=ROWS[name])
    weights.convert(tmp_path / "m", tmp_path / "b.npz")
    assert_same_bits(arrays_in(tmp_path / "b.npz"), flat)


def with_prefix(path, flat):
    return write_npz(path, {f"params/{name}": array for name, array in flat.items()})


def deflated(path, flat):
    np.savez_compressed(path, **flat)


def in_fortran_order(path, flat):
    return write_npz(path, {name: np.asfortranarray(array) for name, array in flat.items()})


def in_foreign_byte_order(path, flat):
    return write_npz(
        path, {name: array.astype(array.dtype.newbyteorder(">")) for name, array in flat.items()}
    )


def fused(flat):
    """As published where queries and keys have the same number of heads."""
    query, key_value = "llm/layers/attn/q_einsum/w", "llm/layers/attn/kv_einsum/w"
    rest = {name: array for name, array in flat.items() if name not in (query, key_value)}
    return rest | {
        "llm/layers/attn/qkv_einsum/w": np.concatenate([flat[query][:, None], flat[key_value]], axis=1)
    }


def layers_apart(path, flat):
    block = "img/Transformer/encoderblock"
    apart = {name: array for name, array in flat.items() if not name.startswith(block)}
    for name in flat.keys() - apart.keys():
        apart |= {name.replace(block, f"{block}_{i}"): layer for i, layer in enumerate(flat[name])}
    return write_npz(path, apart)


SOURCES = {
    "params/ in front": with_prefix,
    "deflated": deflated,
    "Fortran order": in_fortran_order,
    "big-endian": in_foreign_byte_order,
    "fused": lambda path, flat: write_npz(path, fused(flat)),
    "fused and deflated": lambda path, flat: deflated(path, fused(flat)),
    "fused, in Fortran order": lambda path, flat: in_fortran_order(path, fused(flat)),
    "image layers apart": layers_apart,
}


@pytest.mark.parametrize("write", SOURCES.values(), ids=SOURCES)
def test_every_form_of_npz_gives_the_same_tensors_and_the_same_npz(tmp_path, monkeypatch, write):
    monkeypatch.setattr(converting, "_ROWS_BYTES", 3000)
    config = with_text(SMALL["paligemma2"], num_kv_heads=4)
    flat = random_model(config)
    write(tmp_path / "a.npz", flat)

    weights.convert(tmp_path / "a.npz", tmp_path / "m")
    assert_is_in_transformers(tmp_path / "m", flat, config, rows=384)
    weights.convert(tmp_path / "a.npz", tmp_path / "b.npz")
    assert_same_bits(arrays_in(tmp_path / "b.npz"), flat)


@every_config
@pytest.mark.parametrize("shards", [1, 4])
def test_a_folder_becomes_an_npz_and_comes_back_with_the_models_rows(tmp_path, name, shards):
    config = CONFIGS[name]
    flat = random_model(config, BFLOAT16)
    tensors = in_transformers(flat, config, rows=ROWS[name])
    tensors[STORED_EMBEDDING][config.text.vocab_size :] = 7  # of no token: they do not come back
    write_folder(tmp_path / "m", config, tensors, shards=shards)

    weights.convert(tmp_path / "m", tmp_path / "a.npz")
    assert_same_bits(arrays_in(tmp_path / "a.npz"), flat)
    weights.convert(tmp_path / "a.npz", tmp_path / "n")
    assert_is_in_transformers(tmp_path / "n", flat, config, rows=ROWS[name])
    if name != "paligemma2":  # whose query scale is no preset's, and not to be seen in an npz
        contents = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in "mn"]
        assert contents[0] == contents[1]


def test_layers_of_several_dtypes_become_one_array_without_loss(tmp_path):
    config = SMALL["paligemma"]
    tensors = in_transformers(random_model(config, BFLOAT16), config, rows=384)
    norm = "language_model.model.layers.1.input_layernorm.weight"
    tensors[norm] = random_array(tensors[norm].shape, np.float32, seed=9)
    write_folder(tmp_path / "m", config, tensors)
    weights.convert(tmp_path / "m", tmp_path / "a.npz")

    found = arrays_in(tmp_path / "a.npz")["llm/layers/pre_attention_norm/scale"]
    assert found.dtype == np.float32
    assert found[1].tobytes() == tensors[norm].tobytes()
    np.testing.assert_array_equal(found[0], tensors[norm.replace("s.1", "s.0")].astype(np.float32))


@pytest.mark.parametrize("dtypes", [DTYPES[:2], DTYPES[1:], DTYPES], ids=str)
def test_layers_of_several_dtypes_in_an_npz_become_one_array_too(tmp_path, dtypes):
    block = "img/Transformer/encoderblock"
    layers = [random_array((4, 5), dtype, seed=i) for i, dtype in enumerate(dtypes)]
    write_npz(tmp_path / "a.npz", {f"{block}_{i}/x": layer for i, layer in enumerate(layers)})
    weights.convert(tmp_path / "a.npz", tmp_path / "b.npz")
    wanted = np.stack([layer.astype(np.float32) for layer in layers])
    assert_same_bits(arrays_in(tmp_path / "b.npz"), {f"{block}/x": wanted})


@every_dtype
def test_a_wanted_dtype_is_that_of_all_tensors_rounded_to_nearest(tmp_path, dtype):
    config = SMALL["paligemma2"]
    flat = random_model(config)
    write_npz(tmp_path / "a.npz", flat)
    weights.convert(tmp_path / "a.npz", tmp_path / "m", dtype=dtype)
    weights.convert(tmp_path / "a.npz", tmp_path / "b.npz", dtype=dtype)

    cast = {name: array.astype(dtype) for name, array in flat.items()}
    assert_is_in_transformers(tmp_path / "m", cast, config, rows=384)
    assert_same_bits(arrays_in(tmp_path / "b.npz"), cast)
    content = json.loads((tmp_path / "m" / "config.json").read_text())
    assert content["torch_dtype"] == dtype.name


@pytest.mark.parametrize("target", ["b.npz", "m"])
@pytest.mark.parametrize("allow", [False, True])
def test_a_number_that_is_too_large_is_refused_whatever_else_is_allowed(tmp_path, target, allow):
    flat = random_model(SMALL["paligemma"])
    flat["img/head/bias"][3] = 1e6
    write_npz(tmp_path / "a.npz", flat)
    with pytest.raises(WeightsError, match=r"a\.npz: array 'img/head/bias' holds numbers that are too large"):
        weights.convert(tmp_path / "a.npz", tmp_path / target, dtype=np.float16, allow_non_finite=allow)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_the_tokenizer_goes_with_the_weights(tmp_path, monkeypatch):
    """From the file that is named, or from the folder that is converted, however that is called."""
    config = PRESETS["tiny"]
    flat = random_model(config, BFLOAT16)
    write_npz(tmp_path / "a.npz", flat)
    weights.convert(tmp_path / "a.npz", tmp_path / "m", tokenizer=TOKENIZER)
    monkeypatch.setenv("HOME", str(tmp_path))
    weights.convert("~/m", "~/n", dtype=np.float32)
    for folder in ("m", "n"):
        assert (tmp_path / folder / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()
        assert (tmp_path / folder / "preprocessor_config.json").exists()


def test_a_source_may_be_replaced_by_itself_in_another_dtype(tmp_path):
    flat = random_model(SMALL["paligemma"])
    write_npz(tmp_path / "a.npz", flat)
    weights.convert(tmp_path / "a.npz", tmp_path / "a.npz", dtype=BFLOAT16, force=True)
    cast = {name: array.astype(BFLOAT16) for name, array in flat.items()}
    assert_same_bits(arrays_in(tmp_path / "a.npz"), cast)
    weights.convert(tmp_path / "a.npz", tmp_path / "m")
    weights.convert(tmp_path / "m", tmp_path / "m", dtype=np.float32, force=True)
    weights.convert(tmp_path / "m", tmp_path / "b.npz")
    assert_same_bits(arrays_in(tmp_path / "b.npz"), {n: a.astype(np.float32) for n, a in cast.items()})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz", "m"]


def test_memory_stays_at_a_few_blocks_both_ways(tmp_path, monkeypatch):
    """Of 15 MiB in float32, of which the embedding is 12 and the largest layer of an array 0.1."""
    config = with_text(SMALL["paligemma"], vocab_size=44_000)
    flat = random_model(config)
    write_npz(tmp_path / "a.npz", flat)
    total = sum(array.nbytes for array in flat.values())
    monkeypatch.setattr(converting, "_ROWS_BYTES", 2**18)

    def peak(source, target):
        weights.convert(source, target)  # what is imported and allocated once is not counted
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        tracemalloc.start()
        try:
            weights.convert(source, target)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    del flat
    peaks = [peak(tmp_path / "a.npz", tmp_path / "m"), peak(tmp_path / "m", tmp_path / "b.npz")]
    assert total > 12 * 2**20
    assert max(peaks) < 5 * 2**18 + 2**20, f"{[p / 2**20 for p in peaks]} MiB"
