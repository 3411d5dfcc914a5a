"""Files and examples of buckets by name: what is fetched, what is left alone, and what is said where it fails."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from pgdist import hub
from pgdist.data.jsonl import BadRecord, JsonlSource
from pgdist.errors import ConfigError, DataError

core = pytest.importorskip("gcsfs.core")
pytestmark = pytest.mark.usefixtures("own_cache")

ROOT = Path(__file__).parents[2]
RECORDS = [
    {"image": "a.jpg", "prefix": "p", "suffix": "s"},
    {"image": "images/b c.jpg", "prefix": "p", "suffix": "s"},
    {"image": ["./images/d.jpg", "a.jpg"], "prefix": "p", "suffix": "s"},
    {"image": "missing.jpg", "prefix": "p", "suffix": "s"},
    {"image": "../outside.jpg", "prefix": "p", "suffix": "s"},
    {"image": "images/../../outside.jpg", "prefix": "p", "suffix": "s"},
    {"image": "/outside.jpg", "prefix": "p", "suffix": "s"},
    {"image": 7},
    {"image": ["a.jpg", None, "nul\0"]},
    [],
    None,
]
LINES = [json.dumps(record) for record in RECORDS] + ["{broken", "", '{"image": ".."}']
IMAGES = {name: name.encode() * 1000 for name in ("a.jpg", "images/b c.jpg", "images/d.jpg")}


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PGDIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bucket(bucket_folder):
    """The emulator's file system, with the data in `bucket_folder`/data."""
    filesystem = core.GCSFileSystem(token="anon")
    filesystem.pipe_file(f"{bucket_folder}/outside.jpg", b"outside")
    filesystem.pipe_file(f"{bucket_folder}/data/unnamed.jpg", b"unnamed")
    filesystem.pipe_file(f"{bucket_folder}/data/train.jsonl", "\n".join(LINES).encode())
    for name, content in IMAGES.items():
        filesystem.pipe_file(f"{bucket_folder}/data/{name}", content)
    return filesystem


@pytest.fixture
def fetched(bucket, monkeypatch) -> list[str]:
    """The objects whose content is asked for, in order."""
    names: list[str] = []
    get_file = bucket.get_file

    def get_and_note(path, target):
        names.append(path)
        return get_file(path, target)

    monkeypatch.setattr(bucket, "get_file", get_and_note)
    return names


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def fetch_train(bucket_folder: str) -> Path:
    return hub.fetch_examples(f"{bucket_folder}/data/train.jsonl", field="config.data.train")


def test_examples_come_with_the_images_that_they_name(bucket_folder, bucket, own_cache):
    path = fetch_train(bucket_folder)
    assert path == own_cache / "gs" / bucket_folder.removeprefix("gs://") / "data/train.jsonl"
    assert files_in(own_cache / "gs" / bucket_folder.removeprefix("gs://")) == {
        "data/train.jsonl", *(f"data/{name}" for name in IMAGES)
    }  # fmt: skip
    assert {name: (path.parent / name).read_bytes() for name in IMAGES} == IMAGES


def test_what_is_wrong_with_a_record_is_left_for_the_reader(bucket_folder, bucket):
    source = JsonlSource(fetch_train(bucket_folder))
    assert len(source) == len(LINES) - 1
    assert Path(source[3].image).name == "missing.jpg" and not Path(source[3].image).exists()
    for index in (4, 5, 6, 11):
        assert isinstance(source[index], BadRecord)


def test_a_second_fetch_copies_what_has_changed(bucket_folder, bucket, fetched):
    path = fetch_train(bucket_folder)
    assert len(fetched) == 1 + len(IMAGES)
    fetched.clear()
    assert fetch_train(bucket_folder) == path and fetched == []

    bucket.pipe_file(f"{bucket_folder}/data/a.jpg", b"new")
    (path.parent / "images/d.jpg").write_bytes(b"changed here")
    bucket.rm_file(f"{bucket_folder}/data/images/b c.jpg")
    fetch_train(bucket_folder)
    assert sorted(name.rpartition("/")[2] for name in fetched) == ["a.jpg", "d.jpg"]
    assert (path.parent / "a.jpg").read_bytes() == b"new"
    assert (path.parent / "images/d.jpg").read_bytes() == IMAGES["images/d.jpg"]
    assert not (path.parent / "images/b c.jpg").exists()


def test_a_fetch_that_was_interrupted_goes_on(bucket_folder, bucket, fetched, own_cache, monkeypatch):
    get_file = bucket.get_file

    def interrupt(path, target):
        get_file(path, target)
        if path.endswith("d.jpg"):
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(bucket, "get_file", interrupt)
        with pytest.raises(DataError, match="RuntimeError: killed"):
            fetch_train(bucket_folder)
    assert not list(own_cache.rglob("*.partial")) and not list(own_cache.rglob("d.jpg"))
    before = len(fetched)
    fetch_train(bucket_folder)
    there = files_in(own_cache / "gs")
    assert len(there) == 1 + len(IMAGES) and 1 <= len(fetched) - before <= len(IMAGES)


def damage(bucket, monkeypatch, *, times: int) -> None:
    get_file, left = bucket.get_file, [times]

    def get_damaged(path, target):
        get_file(path, target)
        if path.endswith("a.jpg") and left[0]:
            left[0] -= 1
            content = Path(target).read_bytes()
            Path(target).write_bytes(content[:-1] + b"x")

    monkeypatch.setattr(bucket, "get_file", get_damaged)


def test_damaged_bytes_are_fetched_again(bucket_folder, bucket, monkeypatch):
    damage(bucket, monkeypatch, times=1)
    assert (fetch_train(bucket_folder).parent / "a.jpg").read_bytes() == IMAGES["a.jpg"]


@pytest.mark.parametrize("checksum", ["md5Hash", "crc32c"])
def test_damaged_bytes_are_refused(bucket_folder, bucket, own_cache, monkeypatch, checksum):
    damage(bucket, monkeypatch, times=2)
    if checksum == "crc32c":  # of objects that were put together from parts there is no MD5
        process = type(bucket)._process_object
        monkeypatch.setattr(
            type(bucket), "_process_object", lambda *arguments: process(*arguments) | {"md5Hash": None}
        )
    with pytest.raises(DataError, match=r"^config.data.train=gs://.*a.jpg came damaged, twice"):
        fetch_train(bucket_folder)
    assert not list(own_cache.rglob("a.jpg"))
    assert (fetch_train(bucket_folder).parent / "a.jpg").read_bytes() == IMAGES["a.jpg"]


def test_one_file_is_fetched(bucket_folder, bucket, fetched):
    for _ in range(2):
        path = hub.fetch_file(f"{bucket_folder}/data/images/b c.jpg", field="config.tokenizer")
        assert path.read_bytes() == IMAGES["images/b c.jpg"]
    assert len(fetched) == 1


def test_a_file_that_is_not_there_is_told_with_what_is(bucket_folder, bucket):
    with pytest.raises(ConfigError) as raised:
        hub.fetch_file(f"{bucket_folder}/data/trian.jsonl", field="config.tokenizer")
    assert str(raised.value).startswith(
        f"config.tokenizer={bucket_folder}/data/trian.jsonl: gs://pgdist-tests has no"
    )
    assert "There are: train.jsonl, ..." in str(raised.value)
    with pytest.raises(ConfigError, match="has no object"):
        hub.fetch_file(f"{bucket_folder}/data", field="config.tokenizer")
    with pytest.raises(ConfigError, match="gs://no-such-bucket has no object a.model"):
        hub.fetch_file("gs://no-such-bucket/a.model", field="config.tokenizer")


def test_a_missing_package_is_named(bucket_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=r"pip install 'pgdist\[gcs\]'"):
        fetch_train(bucket_folder)


def test_a_disk_that_is_too_small(bucket_folder, bucket, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2000}))
    with pytest.raises(DataError, match=r"no space left for it .* are free.*set PGDIST_CACHE"):
        fetch_train(bucket_folder)


def test_a_cache_that_cannot_be_made(bucket_folder, bucket, own_cache):
    own_cache.write_text("no folder")
    with pytest.raises(DataError, match=r"config.data.train=gs://"):
        fetch_train(bucket_folder)


def test_the_cache_is_where_it_was_asked_for(bucket_folder, bucket, tmp_path, monkeypatch):
    monkeypatch.delenv("PGDIST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch_train(bucket_folder).is_relative_to(tmp_path / "xdg/pgdist")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert fetch_train(bucket_folder).is_relative_to(tmp_path / "home/.cache/pgdist")


@pytest.fixture
def no_network(bucket, monkeypatch):
    """A function that ends it: nobody listens, and nobody waits for long."""

    def end() -> None:
        type(bucket).clear_instance_cache()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
        monkeypatch.setattr("pgdist.hub.buckets._FIRST_ANSWER", 0.5)

    yield end
    type(bucket).clear_instance_cache()


def test_the_cache_serves_where_there_is_no_network(bucket_folder, bucket, no_network):
    path = fetch_train(bucket_folder)
    no_network()
    assert fetch_train(bucket_folder) == path
    assert hub.fetch_file(f"{bucket_folder}/data/a.jpg", field="config.x") == path.parent / "a.jpg"


def test_an_incomplete_cache_does_not_serve(bucket_folder, bucket, no_network):
    hub.fetch_file(f"{bucket_folder}/data/train.jsonl", field="config.x")
    no_network()
    with pytest.raises(
        DataError, match="cannot be reached from this host, and not all images are in the cache"
    ):
        fetch_train(bucket_folder)
    with pytest.raises(ConfigError, match=r"storage.googleapis.com cannot be reached.*give the local path"):
        hub.fetch_file(f"{bucket_folder}/data/a.jpg", field="config.x")


def test_two_processes_fetch_once(bucket_folder, bucket, own_cache):
    program = (
        "import sys; from absl import logging; logging.set_verbosity(logging.INFO); from pgdist import hub; "
        "hub.fetch_examples(sys.argv[1], field='config.data.train')"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, f"{bucket_folder}/data/train.jsonl"],
            cwd=ROOT, env=os.environ, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    logs = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], logs
    assert sum("fetching 3 images" in log for log in logs) == 1
    assert len(files_in(own_cache / "gs")) == 1 + len(IMAGES)


class PublicObjects(http.server.BaseHTTPRequestHandler):
    """Objects that everybody may read and nobody may list; a token that it does not know is an error to it."""

    objects: dict[str, bytes] = {}

    def do_GET(self) -> None:
        name = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).partition("/o/")[2]
        if "Authorization" in self.headers:
            self.answer(401, b'{"error": {"code": 401, "message": "this token is not known"}}')
        elif name not in self.objects:
            self.answer(403, b'{"error": {"code": 403, "message": "Anonymous caller may not list"}}')
        elif "/download/" in self.path:
            self.answer(200, self.objects[name])
        else:
            content = self.objects[name]
            md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
            self.answer(200, json.dumps({"name": name, "size": str(len(content)), "md5Hash": md5}).encode())

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def public_bucket(monkeypatch) -> Iterator[None]:
    """Instead of Google's, and a host with credentials that are good for nothing."""
    credentials = pytest.importorskip("google.oauth2.credentials")
    PublicObjects.objects = {"train.jsonl": "\n".join(LINES).encode(), **IMAGES}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), PublicObjects)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setitem(
        fsspec.config.conf,
        "gcs",
        fsspec.config.conf["gcs"] | {"endpoint_url": f"http://127.0.0.1:{server.server_address[1]}"},
    )
    monkeypatch.setattr("google.auth.default", lambda **_: (credentials.Credentials("secret"), None))
    yield
    core.GCSFileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


def test_a_public_bucket_serves_a_host_whose_credentials_are_refused(public_bucket):
    path = hub.fetch_examples("gs://public/train.jsonl", field="config.data.train")
    assert {name: (path.parent / name).read_bytes() for name in IMAGES} == IMAGES
    assert files_in(path.parent) == {"train.jsonl", *IMAGES}


def test_what_a_host_may_not_read_is_told_with_the_role_that_it_needs(public_bucket):
    with pytest.raises(ConfigError) as raised:
        hub.fetch_file("gs://public/private.model", field="config.tokenizer")
    message = str(raised.value)
    assert message.startswith("config.tokenizer=gs://public/private.model: this host may not read it")
    assert "Storage Object Viewer" in message and "secret" not in message
