"""Weights in a bucket: read by byte range, whatever their layout, and what is said where they cannot be read."""

import fsspec
import jax
import numpy as np
import pytest
from etils import epath

from pgdist import weights
from pgdist.errors import WeightsError
from pgdist.finetune import finetune
from pgdist.models.presets import PRESETS
from pgdist.parameters import flatten
from tests.models.small import random_parameters
from tests.tiny_runs import TOKENIZER, assert_same_bits, tiny_config, write_inputs


@pytest.fixture(scope="module")
def arrays():
    return {name: np.asarray(x) for name, x in flatten(random_parameters(PRESETS["tiny"], seed=1)).items()}


@pytest.fixture
def local(arrays, tmp_path):
    weights.save(tmp_path / "a.npz", arrays)
    return tmp_path / "a.npz"


def upload(path, folder):
    """The file, or the files of the folder, in the bucket; returns the URL."""
    url = f"{folder}/{path.name}"
    for file in [path] if path.is_file() else path.iterdir():
        target = epath.Path(url) if path.is_file() else epath.Path(url) / file.name
        target.write_bytes(file.read_bytes())
    return url


def load(name, arrays):
    expected = {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in arrays.items()}
    return {key: np.asarray(x) for key, x in weights.load(name, expected=expected).items()}


def test_an_npz_in_a_bucket_is_read_in_parts(bucket_folder, arrays, local, monkeypatch):
    url = upload(local, bucket_folder)
    reads = []
    bucket = fsspec.filesystem("gcs")
    cat_file = type(bucket).cat_file

    def counting(self, path, start=None, end=None, **more):
        reads.append(end - start)
        return cat_file(self, path, start=start, end=end, **more)

    monkeypatch.setattr(type(bucket), "cat_file", counting)
    weights.read_header(url)
    assert sum(reads) < 0.1 * local.stat().st_size
    reads.clear()
    assert_same_bits(load(url, arrays), arrays)
    assert sum(reads) < 1.1 * local.stat().st_size


def test_a_transformers_folder_in_a_bucket_is_one_too(bucket_folder, arrays, local, tmp_path, monkeypatch):
    monkeypatch.setenv("PGDIST_CACHE", str(tmp_path / "cache"))
    weights.convert(local, tmp_path / "hf", tokenizer=TOKENIZER)
    url = upload(tmp_path / "hf", bucket_folder)
    assert_same_bits(load(url, arrays), arrays)
    weights.convert(url, tmp_path / "back.npz")
    assert (tmp_path / "back.npz").read_bytes() == local.read_bytes()
    weights.convert(url, tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()


def test_a_run_in_a_bucket_is_exported_from_there(bucket_folder, tmp_path):
    inputs = write_inputs(tmp_path)
    fields = {"trainable": (("llm/layers/attn/.*", 1.0), (".*", 0.0)), "frozen_dtype": "float32"}
    config = tiny_config(inputs, steps=2, export=True, **fields)
    config.init = upload(inputs.weights, bucket_folder)
    finetune(config, workdir=f"{bucket_folder}/run")
    weights.convert(f"{bucket_folder}/run@2", tmp_path / "merged.npz")
    exported = epath.Path(bucket_folder) / "run" / "model.npz"
    assert (tmp_path / "merged.npz").read_bytes() == exported.read_bytes()


def test_what_is_wrong_in_a_bucket_is_said(bucket_folder, local, tmp_path):
    with pytest.raises(WeightsError, match=r"gs://.*/none.npz: there is no such object"):
        weights.read_header(f"{bucket_folder}/none.npz")
    cut = tmp_path / "cut.npz"
    cut.write_bytes(local.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"gs://.*/cut.npz: not a readable npz: .* cut short"):
        weights.read_header(upload(cut, bucket_folder))
    with pytest.raises(WeightsError, match="written to local files"):
        weights.convert(local, f"{bucket_folder}/out.npz")
