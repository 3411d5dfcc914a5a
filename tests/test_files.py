"""Folders that may be a bucket: their names, and the local folder that is copied to one. (Real buckets: buckets/.)"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from etils import epath

from pgdist import files
from pgdist.errors import ConfigError
from pgdist.files import Mirror


@pytest.fixture
def mirror(tmp_path) -> Mirror:
    """A mirror in a local folder, which takes what a bucket takes."""
    return Mirror(epath.Path(tmp_path / "remote"), interval=0.1)


def contents(folder: Path) -> dict[str, str]:
    paths = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def wait_until(is_so) -> None:
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_what_is_written_appended_and_removed_is_so_in_the_remote_folder(mirror):
    (mirror.local / "tb").mkdir()
    (mirror.local / "tb" / "events").write_text("1")
    (mirror.local / "metrics.jsonl").write_text("a\n")
    mirror.flush()
    assert contents(mirror.remote) == {"tb/events": "1", "metrics.jsonl": "a\n"}

    with (mirror.local / "metrics.jsonl").open("a") as file:
        file.write("b\n")
    (mirror.local / "tb" / "events").unlink()
    mirror.flush()
    assert contents(mirror.remote) == {"metrics.jsonl": "a\nb\n"}


def test_only_what_has_changed_is_copied(mirror, monkeypatch):
    copied = []
    copy = mirror._copy
    monkeypatch.setattr(mirror, "_copy", lambda name: (copied.append(name), copy(name)))
    for name in ("a", "b"):
        (mirror.local / name).write_text(name)
    mirror.flush()
    (mirror.local / "b").write_text("changed")
    mirror.flush()
    mirror.flush()
    assert sorted(copied) == ["a", "b", "b"]


def test_changes_are_copied_in_the_background_until_the_end(mirror):
    mirror.start()
    (mirror.local / "a").write_text("1")
    wait_until(lambda: contents(mirror.remote) == {"a": "1"})
    (mirror.local / "a").write_text("22")
    mirror.close()
    assert contents(mirror.remote) == {"a": "22"}
    assert not mirror.local.exists()


def test_a_file_that_is_written_all_the_time_arrives_whole_in_the_end(mirror):
    mirror.start()
    with (mirror.local / "metrics.jsonl").open("a", buffering=1) as file:
        for line in range(3000):
            file.write(f"{line}\n")
    mirror.close()
    assert contents(mirror.remote) == {"metrics.jsonl": "".join(f"{line}\n" for line in range(3000))}


def test_what_is_being_written_is_not_copied(mirror):
    for name in ("config.tmp", ".model.npz.ab12.partial", "answers.jsonl.partial", ".writable"):
        (mirror.local / name).write_text("half")
    mirror.flush()
    assert contents(mirror.remote) == {}


def test_a_run_that_goes_on_elsewhere_finds_what_was_there(mirror, tmp_path):
    remote = tmp_path / "remote"
    for name in ("config.json", "predictions/step_000000.jsonl", "checkpoints/5/state", "model.npz"):
        (remote / name).parent.mkdir(parents=True, exist_ok=True)
        (remote / name).write_text(name)
    before = {path: path.stat().st_mtime_ns for path in remote.rglob("*")}

    mirror.fetch(skip=["checkpoints", "model.npz"])
    found = {name: name for name in ("config.json", "predictions/step_000000.jsonl")}
    assert contents(mirror.local) == found
    mirror.fetch_file("model.npz")
    mirror.fetch_file("no such file")
    assert contents(mirror.local) == found | {"model.npz": "model.npz"}

    mirror.flush()  # nothing has changed, so nothing is copied back
    assert {path: path.stat().st_mtime_ns for path in remote.rglob("*")} == before
    (mirror.local / "config.json").unlink()
    mirror.close()
    assert not (remote / "config.json").exists()
    assert (remote / "checkpoints" / "5" / "state").exists()


def test_a_folder_that_is_not_there_yet_is_an_empty_one(mirror):
    mirror.fetch()
    assert contents(mirror.local) == {}


def test_a_file_that_is_fetched_outlives_the_mirror(tmp_path):
    (tmp_path / "model.npz").write_text("weights")
    mirror = Mirror(epath.Path(tmp_path))
    mirror.fetch_file("model.npz")
    local = mirror.local
    del mirror
    assert (local / "model.npz").read_text() == "weights"


def test_what_cannot_be_copied_stays_here_and_is_named(mirror, tmp_path):
    (tmp_path / "remote").write_text("in the way")
    (mirror.local / "a").write_text("1")
    with pytest.raises(ConfigError) as raised:
        mirror.close()
    assert f"--workdir={tmp_path / 'remote'}: cannot be read and written" in str(raised.value)
    assert f"What could not be copied lies in {mirror.local}." in str(raised.value)
    assert (mirror.local / "a").read_text() == "1"
    shutil.rmtree(mirror.local)


def test_trouble_in_the_background_is_told_once_and_passes(mirror, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(files.logging, "warning", lambda text, *values: told.append(text % values))
    (tmp_path / "remote").write_text("in the way")
    mirror.start()
    (mirror.local / "a").write_text("1")
    wait_until(lambda: told)
    time.sleep(0.5)
    (tmp_path / "remote").unlink()
    wait_until(lambda: contents(tmp_path / "remote") == {"a": "1"})
    mirror.close()
    assert len(told) == 1 and told[0].endswith("It is tried again.")


def test_copying_that_takes_long_happens_less_often(mirror, monkeypatch):
    starts = []

    def slow() -> None:
        starts.append(time.monotonic())
        time.sleep(0.1)

    monkeypatch.setattr(mirror, "flush", slow)
    mirror.start()
    wait_until(lambda: len(starts) == 2)
    mirror.close()
    assert starts[1] - starts[0] > 0.1 / 0.05


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://bucket/run", "expected a local folder or gs://BUCKET/FOLDER, found s3://"),
        ("http://host/run", "found http://"),
        ("gs://", "expected gs://BUCKET/FOLDER"),
        ("gs://bucket/run#2", "without any of #"),
        ("gs://bucket/[run]", "without any of #"),
    ],
)
def test_a_url_that_is_no_bucket_is_refused(path, message):
    with pytest.raises(ConfigError, match=f"--workdir=.*{message}"):
        files.folder(path)


def test_a_bucket_without_its_package_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    files.prepare_buckets.cache_clear()
    with pytest.raises(ConfigError, match=r"--workdir=gs://bucket/run: .* pip install 'pgdist\[gcs\]'"):
        files.folder("gs://bucket/run")


def test_home_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert os.fspath(files.folder("~/run")) == str(tmp_path / "run")
    assert files.open_folder("~/run").local == tmp_path / "run"


def test_of_several_who_create_a_file_one_succeeds(tmp_path):
    path = epath.Path(tmp_path / "token.json")
    start = threading.Barrier(8)
    made = []

    def create(number: int) -> None:
        start.wait()
        made.append(files.create_text(path, str(number)))

    threads = [threading.Thread(target=create, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False] * 7 + [True]
    files.write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["token.json"]


def test_the_module_needs_no_jax():
    loaded = "import sys, pgdist.files; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
