"""Runs as weights: a checkpoint over its base, read for another run, for prediction and for export."""

import json
import shutil

import jax
import numpy as np
import pytest

from pgdist import weights
from pgdist.errors import WeightsError
from pgdist.finetune import finetune
from pgdist.inference import load_model, read_run_config
from pgdist.models.presets import PRESETS
from pgdist.parameters import flatten
from tests.models.small import random_parameters
from tests.tiny_runs import assert_same_bits, host, tiny_config, write_inputs, write_weights

TRAINED = "llm/layers/attn/"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """A run of eight steps with checkpoints at 4 and 8, on a base in float32; looked at only."""
    workdir = tmp_path_factory.mktemp("runs") / "cows"
    config = tiny_config(
        inputs,
        **{
            "steps": 8,
            "checkpoint.every": 4,
            "trainable": ((TRAINED + ".*", 1.0), (".*", 0.0)),
            "frozen_dtype": "float32",
            "optimizer.name": "adamw",
            "optimizer.learning_rate": 1e-3,
            "export": True,
        },
    )
    finetune(config, workdir=workdir)
    return workdir


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def arrays_of(path):
    with np.load(path) as file:
        return dict(file)


def test_the_newest_checkpoint_over_its_base_is_the_exported_model(run, tmp_path):
    weights.convert(run, tmp_path / "merged.npz")
    assert_same_bits(arrays_of(tmp_path / "merged.npz"), arrays_of(run / "model.npz"))


def test_a_step_names_an_earlier_checkpoint_and_only_what_trains_differs(run, tmp_path):
    weights.convert(f"{run}@4", tmp_path / "four.npz")
    four, eight = arrays_of(tmp_path / "four.npz"), arrays_of(run / "model.npz")
    different = {name for name in eight if four[name].tobytes() != eight[name].tobytes()}
    assert different == {name for name in eight if name.startswith(TRAINED)}


def test_a_run_goes_on_from_anothers_checkpoint(run, inputs, tmp_path):
    """SGD of a fixed rate has no state: eight steps from step 4's arrays begin with these very numbers."""
    config = tiny_config(inputs, init=f"{run}@4", steps=1, **{"optimizer.learning_rate": 0.0, "export": True})
    finetune(config, workdir=tmp_path / "next")
    weights.convert(f"{run}@4", tmp_path / "four.npz")
    assert_same_bits(arrays_of(tmp_path / "next" / "model.npz"), arrays_of(tmp_path / "four.npz"))


def test_a_run_on_a_run_is_exported_with_both(run, inputs, tmp_path):
    fields = {"trainable": (("img/head/.*", 1.0), (".*", 0.0)), "export": True, "steps": 2}
    config = tiny_config(inputs, init=str(run), **fields, frozen_dtype="file")
    finetune(config, workdir=tmp_path / "next")
    weights.convert(tmp_path / "next", tmp_path / "merged.npz")
    assert_same_bits(arrays_of(tmp_path / "merged.npz"), arrays_of(tmp_path / "next" / "model.npz"))
    assert arrays_of(tmp_path / "merged.npz")["img/head/kernel"].any()


def test_a_model_is_loaded_from_a_step(run):
    loaded = load_model(read_run_config(run), f"{run}@8")
    assert_same_bits(host(loaded.params), arrays_of(run / "model.npz"))


def test_a_folder_for_transformers_gets_the_runs_tokenizer(run, tmp_path):
    weights.convert(run, tmp_path / "hf")
    assert (tmp_path / "hf" / "tokenizer.model").exists()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vision_config"]["image_size"] == 56


def flip(path):
    data = bytearray(path.read_bytes())
    data[100::500] = bytes(byte ^ 1 for byte in data[100::500])  # wherever the trained arrays are in it
    path.write_bytes(data)


def damage_the_largest_file(copy):
    files = [path for path in (copy / "checkpoints" / "8").rglob("*") if path.is_file()]
    flip(max(files, key=lambda path: path.stat().st_size))


def other_base(copy, inputs):
    config = json.loads((copy / "config.json").read_text())
    config["init"] = str(write_weights(copy / "other.npz", seed=9))
    (copy / "config.json").write_text(json.dumps(config))


def base_gone(copy, inputs):
    config = json.loads((copy / "config.json").read_text())
    config["init"] = "gone.npz"
    (copy / "config.json").write_text(json.dumps(config))


MISTAKES = {
    "no such step": (
        "@5",
        lambda copy, inputs: None,
        r"copy: expected the checkpoint of step 5; it has those of step 4, 8",
    ),
    "no checkpoints": (
        "",
        lambda copy, inputs: shutil.rmtree(copy / "checkpoints"),
        r"copy: expected a checkpoint; it has none",
    ),
    "another base": ("", other_base, r"was trained on other weights than .*other.npz holds now"),
    "no base": ("", base_gone, r"gone.npz: no such file"),
    "damaged config": (
        "",
        lambda copy, inputs: (copy / "config.json").write_text("{}"),
        r"copy: its config.json or parameters.json is damaged: no 'init'",
    ),
    "no JSON": (
        "",
        lambda copy, inputs: (copy / "parameters.json").write_text("hello"),
        r"parameters.json: expected JSON, as a run writes it",
    ),
    "damaged checkpoint": ("", lambda copy, inputs: damage_the_largest_file(copy), r"array '.*' is damaged"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_wrong_with_a_run_is_said(name, copy, inputs, tmp_path):
    suffix, harm, message = MISTAKES[name]
    harm(copy, inputs)
    with pytest.raises(WeightsError, match=message):
        weights.convert(f"{copy}{suffix}", tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


def test_arrays_frozen_at_random_are_nobodys_to_read(inputs, tmp_path):
    fields = {"trainable": ((TRAINED + ".*", 1.0), (".*", 0.0)), "steps": 1}
    finetune(tiny_config(inputs, init="", **fields), workdir=tmp_path / "random")
    with pytest.raises(WeightsError, match=r"frozen at random numbers.*Name the run's model.npz"):
        weights.convert(tmp_path / "random", tmp_path / "out.npz")


def test_a_run_that_trains_all_from_nothing_needs_no_base(inputs, tmp_path):
    finetune(tiny_config(inputs, init="", steps=1, export=True), workdir=tmp_path / "all")
    weights.convert(tmp_path / "all", tmp_path / "out.npz")
    assert_same_bits(arrays_of(tmp_path / "out.npz"), arrays_of(tmp_path / "all" / "model.npz"))


def test_it_loads_onto_any_mesh(run):
    from jax.sharding import NamedSharding, PartitionSpec

    from pgdist.mesh import make_mesh

    params = flatten(random_parameters(PRESETS["tiny"], seed=0))
    mesh = make_mesh(data=2, fsdp=4)
    expected = {name: jax.ShapeDtypeStruct(leaf.shape, np.float32) for name, leaf in params.items()}
    sharding = NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))
    loaded = weights.load(run, expected=expected, shardings={"llm/layers/attn/q_einsum/w": sharding})
    assert_same_bits({name: np.asarray(x) for name, x in loaded.items()}, arrays_of(run / "model.npz"))
    assert loaded["llm/layers/attn/q_einsum/w"].sharding == sharding
