"""A run's folder: whose config it is, what may differ, and folders that cannot be written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from pgdist.config import default_config
from pgdist.errors import ConfigError
from pgdist.workdir import Workdir, write_json, write_jsonl


def config_with(**fields: object) -> ConfigDict:
    config = default_config()
    config.update_from_flattened_dict(fields)
    return config


def begin(path: Path, config: ConfigDict, *, fork: bool = False) -> None:
    """What a run does with its folder before it trains."""
    workdir = Workdir(path)
    workdir.check(config, fork=fork)
    workdir.make()
    workdir.record(config)


def recorded(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


@pytest.fixture
def begun(tmp_path) -> Path:
    """The folder of a run of the default config."""
    begin(tmp_path / "runs" / "one", config_with())
    return tmp_path / "runs" / "one"


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_run_records_its_config(begun):
    assert files(begun).keys() == {"config.json", "data.json"}
    assert recorded(begun) == json.loads(default_config().to_json())
    assert recorded(begun)["trainable"] == [["llm/layers/attn/.*", 1.0], [".*", 0.0]]


def test_the_same_config_goes_on(begun):
    before = files(begun)

    begin(begun, config_with())

    assert files(begun) == before


def test_a_run_that_is_older_than_a_field_goes_on_with_its_default(begun):
    old = recorded(begun)
    del old["eval"]["sampler"], old["loss"]
    write_json(begun / "config.json", old)

    begin(begun, config_with())

    assert recorded(begun) == json.loads(default_config().to_json())
    write_json(begun / "config.json", old)
    with pytest.raises(ConfigError, match="config.eval.sampler: 'greedy' -> 'beam'"):
        begin(begun, config_with(**{"eval.sampler": "beam"}))


def test_another_config_is_refused_with_the_differences_and_nothing_changes(begun):
    before = files(begun)
    other = config_with(
        **{"steps": 65, "optimizer.name": "adamw", "data.prefix": "caption en", "trainable": ((".*", 1.0),)}
    )

    with pytest.raises(ConfigError) as refused:
        begin(begun, other)

    message = str(refused.value)
    assert f"--workdir={begun}" in message
    # Another optimizer or other trainable arrays: no checkpoint here can be gone on from.
    assert message.endswith("checkpoints of other arrays are in this one (optimizer.name, trainable).")
    differences = [line for line in message.splitlines() if line.startswith("  config.")]
    assert differences == [
        "  config.data.prefix: '' -> 'caption en'",
        "  config.optimizer.name: 'sgd' -> 'adamw'",
        "  config.steps: 64 -> 65",
        "  config.trainable: [['llm/layers/attn/.*', 1.0], ['.*', 0.0]] -> [['.*', 1.0]]",
    ]
    assert files(begun) == before


def test_a_difference_that_checkpoints_survive_may_be_forked(begun):
    with pytest.raises(ConfigError, match="config.steps: 64 -> 65\nUse a new --workdir, or --fork to go on"):
        begin(begun, config_with(steps=65))


def test_other_training_data_is_told_and_needs_a_fork(begun):
    workdir = Workdir(begun)
    workdir.record(config_with(), data="12 examples, sha256 ab")

    workdir.check(config_with(), fork=False, data="12 examples, sha256 ab")
    workdir.check(config_with(), fork=True, data="6 examples, sha256 cd")
    with pytest.raises(ConfigError, match="content of config.data.train: 12 .* ab -> 6 .* cd\n.* --fork"):
        workdir.check(config_with(), fork=False, data="6 examples, sha256 cd")


def test_fields_that_do_not_change_the_result_may_differ(begun):
    begin(
        begun,
        config_with(
            **{
                "mesh.data": 2,
                "mesh.fsdp": 4,
                "checkpoint.every": 7,
                "checkpoint.keep": 5,
                "data.workers": 2,
                "model.attention": "chunked",
                "model.remat": "full",
                "gradient_accumulation_steps": 2,
                "export": False,
            }
        ),
    )

    assert recorded(begun)["checkpoint"] == {"every": 7, "keep": 5}
    assert files(begun).keys() == {"config.json", "data.json"}


def test_a_fork_goes_on_and_keeps_each_config_before_it(begun):
    first = (begun / "config.json").read_bytes()
    begin(begun, config_with(steps=65), fork=True)
    second = (begun / "config.json").read_bytes()
    begin(begun, config_with(steps=66), fork=True)
    begin(begun, config_with(steps=66), fork=True)  # no difference, no copy

    assert files(begun) == {
        "config.json": (begun / "config.json").read_bytes(),
        "data.json": (begun / "data.json").read_bytes(),
        "config_before_fork_1.json": first,
        "config_before_fork_2.json": second,
    }
    assert recorded(begun)["steps"] == 66


@pytest.mark.parametrize("damage", [b"", b'{"seed": 0', b"[1, 2]", b"\xff\xfe"])
def test_a_damaged_record_is_an_error_and_stays(begun, damage):
    (begun / "config.json").write_bytes(damage)

    for fork in (False, True):
        with pytest.raises(ConfigError, match="config.json"):
            begin(begun, config_with(), fork=fork)
    assert (begun / "config.json").read_bytes() == damage


@pytest.mark.parametrize("below", ["", "runs/one"])
def test_a_file_in_the_folders_place_is_an_error_and_stays(tmp_path, below):
    file = tmp_path / "taken"
    file.write_text("mine")

    with pytest.raises(ConfigError, match=f"--workdir={file / below}: .*is a file"):
        begin(file / below, config_with())
    with pytest.raises(ConfigError, match="--workdir="):
        Workdir(file / below).make()
    assert file.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_an_error(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)

    with pytest.raises(ConfigError, match="cannot be written"):
        begin(tmp_path / "closed" / "run", config_with())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc here")
def test_a_folder_that_nobody_can_make_is_an_error():
    with pytest.raises(ConfigError, match="--workdir=/proc/pgdist: expected a folder"):
        begin(Path("/proc/pgdist"), config_with())


def test_a_url_is_not_taken_for_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ConfigError, match="s3://bucket/run: expected a local folder or gs://"):
        Workdir("s3://bucket/run")
    assert list(tmp_path.iterdir()) == []


def test_files_are_replaced_as_a_whole(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    write_jsonl(tmp_path / "folder" / "a.jsonl", [{"text": "zwei\nZeilen é"}, {"x": None}])
    write_json(tmp_path / "a.json", [2])

    assert json.loads((tmp_path / "a.json").read_text()) == [2]
    lines = (tmp_path / "folder" / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"text": "zwei\nZeilen é"}, {"x": None}]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.json", "a.jsonl", "folder"]
