"""Repositories and files of the Hub: what is fetched, how downloads end well, and what is said where they do not."""

from __future__ import annotations

import random
import shutil
import socket

import pytest

from tests.hub.conftest import FILES, WANTED, WEIGHTS
from tests.hub.fetching import fetch, finish_fetch, start_fetch

MODEL = "fetch_model('hf://org/model')"
NPZ = "fetch_model('hf://org/model/pt_224.npz')"
SHARD = "model-00001-of-00002.safetensors"


def test_a_repository_becomes_a_folder_of_what_transformers_needs(site, environment):
    found = fetch(MODEL, environment=environment)
    assert {path.name: path.read_bytes() for path in found.path.iterdir()} == {
        name: FILES[name] for name in WANTED
    }
    assert "hf://org/model: fetching 6 files, 605.1 kB, into" in found.log
    assert "%|" not in found.log  # progress bars are for terminals


def test_a_second_fetch_downloads_nothing_and_reads_no_file_again(site, environment):
    first = fetch(MODEL, environment=environment)
    site.requests.clear()
    forbid = "from pgdist.hub import cache; cache.has_checksum = None"
    second = fetch(MODEL, environment=environment, prelude=forbid)
    assert second.path == first.path and "fetching" not in second.log
    assert not any("/resolve/" in request.path for request in site.requests)


@pytest.mark.parametrize("revision", ["v1.0", "c" * 40])
def test_a_revision_is_fetched(site, environment, revision):
    found = fetch(f"fetch_model('hf://org/model@{revision}')", environment=environment)
    assert found.path.name == site.commit and {path.name for path in found.path.iterdir()} == WANTED
    assert any(request.path == f"/api/models/org/model/revision/{revision}" for request in site.requests)


def test_one_file_is_fetched_alone(site, environment):
    found = fetch("fetch_file('hf://org/model/pt_224.npz', field='config.x')", environment=environment)
    assert found.path.read_bytes() == FILES["pt_224.npz"]
    assert [path.name for path in found.path.parent.iterdir()] == ["pt_224.npz"]
    nested = fetch("fetch_model('hf://org/model@main/onnx/model.safetensors')", environment=environment)
    assert nested.path.read_bytes() == WEIGHTS


def test_a_download_that_is_cut_goes_on_where_it_was(site, environment):
    block = 10 * 2**20  # what the library writes at once
    site.files[SHARD] = random.Random(1).randbytes(3 * block)
    site.cut[SHARD] = 1
    found = fetch(MODEL, environment=environment)
    assert (found.path / SHARD).read_bytes() == site.files[SHARD]
    assert [request.range for request in site.downloads(SHARD)] == [None, f"bytes={block}-"]


def test_a_connection_that_is_reset_is_made_again(site, environment):
    site.reset[SHARD] = 2
    found = fetch(MODEL, environment=environment)
    assert (found.path / SHARD).read_bytes() == WEIGHTS
    # Whether the library or pgdist goes on depends on what the reset does to bytes that are still on the way.
    assert len(site.downloads(SHARD)) == 3 and len(site.downloads("config.json")) == 1


def test_damaged_bytes_are_fetched_again(site, environment):
    site.damaged[SHARD] = 1
    found = fetch(MODEL, environment=environment)
    assert f"{SHARD} came damaged; fetching again" in found.log
    assert (found.path / SHARD).read_bytes() == WEIGHTS and len(site.downloads("config.json")) == 1


def test_damaged_bytes_are_refused_and_removed(site, environment, tmp_path):
    site.damaged |= {SHARD: 2, "config.json": 2}  # a large file, and one whose checksum is git's
    failed = fetch(MODEL, environment=environment)
    assert failed.error == "WeightsError"
    assert f"config.init=hf://org/model: config.json, {SHARD} came damaged, twice" in failed.message
    left = {path.name for path in (tmp_path / "hf/hub").rglob("snapshots/*/*")}
    assert left == WANTED - {SHARD, "config.json"}
    assert (fetch(MODEL, environment=environment).path / SHARD).read_bytes() == WEIGHTS


def test_a_file_that_changes_in_the_cache_is_noticed(site, environment):
    shard = fetch(MODEL, environment=environment).path / SHARD
    shard.resolve().chmod(0o644)
    shard.resolve().write_bytes(WEIGHTS[:-1] + b"x")
    assert (fetch(MODEL, environment=environment).path / SHARD).read_bytes() == WEIGHTS


def closed_port() -> str:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{closed.getsockname()[1]}"


@pytest.mark.parametrize("call", [MODEL, NPZ])
def test_the_cache_serves_where_there_is_no_network(site, environment, call):
    first = fetch(call, environment=environment)
    second = fetch(call, environment=environment | {"HF_ENDPOINT": closed_port()})
    assert second.path == first.path
    assert "the Hub did not give it (ConnectError); using the copy in" in second.log
    assert fetch(call, environment=environment | {"HF_HUB_OFFLINE": "1"}).path == first.path


def test_the_cache_serves_where_the_hub_is_ill(site, environment):
    first = fetch(MODEL, environment=environment)
    site.status = 503
    assert fetch(MODEL, environment=environment).path == first.path


@pytest.mark.parametrize("forgotten", [True, False], ids=["without_the_listing", "with_the_listing"])
def test_an_incomplete_cache_does_not_serve(site, environment, tmp_path, forgotten):
    folder = fetch(MODEL, environment=environment).path
    (folder / SHARD).unlink()
    if forgotten:  # what older versions of the library leave
        shutil.rmtree(tmp_path / "hf/hub/models--org--model/trees", ignore_errors=True)
    failed = fetch(MODEL, environment=environment | {"HF_ENDPOINT": closed_port()})
    assert failed.error == "WeightsError" and "there is no complete copy in its cache" in failed.message


def test_two_processes_download_once(site, environment):
    processes = [start_fetch(MODEL, environment=environment) for _ in range(2)]
    found = [finish_fetch(process) for process in processes]
    assert found[0].path == found[1].path
    assert {name: len(site.downloads(name)) for name in WANTED} == dict.fromkeys(WANTED, 1)


def test_a_commit_published_meanwhile_is_fetched_whole(site, environment):
    first = fetch(MODEL, environment=environment)
    site.commit, site.files["config.json"] = "d" * 40, b'{"model_type": "paligemma", "new": 1}'
    second = fetch(MODEL, environment=environment)
    assert second.path.name == "d" * 40 and b"new" in (second.path / "config.json").read_bytes()
    assert second.path != first.path and len(site.downloads(SHARD)) == 1


def says(failed, *texts: str, error: str = "WeightsError") -> None:
    assert failed.error == error
    for text in texts:
        assert text in failed.message, failed.message
    assert "secret" not in failed.message + failed.log


def test_a_token_that_is_refused(site, environment):
    site.token = "good"
    failed = fetch(MODEL, environment=environment | {"HF_TOKEN": "hf_secret"})
    says(failed, "config.init=hf://org/model: the Hub refuses the token. Set HF_TOKEN", "settings/tokens")


def test_a_licence_without_a_token(site, environment):
    site.licence_accepted = False
    failed = fetch(MODEL, environment=environment)
    says(
        failed, "there is no token. Accept the licence at https://huggingface.co/org/model, and set HF_TOKEN"
    )


def test_a_licence_that_the_account_has_not_accepted(site, environment):
    site.licence_accepted = False
    failed = fetch(NPZ, environment=environment | {"HF_TOKEN": "hf_secret"})
    says(
        failed, "Accept the licence at https://huggingface.co/org/model with the account that the token is of"
    )


def test_a_repository_that_is_not_there(site, environment):
    failed = fetch("fetch_model('hf://org/modell')", environment=environment)
    says(
        failed,
        "there is no https://huggingface.co/org/modell, or it is private",
        "There is: org/model.",
        "HF_TOKEN",
    )
    failed = fetch("fetch_model('hf://org/modell')", environment=environment | {"HF_TOKEN": "hf_secret"})
    says(failed, "there is no https://huggingface.co/org/modell")


def test_a_revision_that_is_not_there(site, environment):
    failed = fetch("fetch_model('hf://org/model@v1.1')", environment=environment)
    says(failed, "org/model has no revision v1.1", "There are: v1.0, ...")


def test_a_file_that_is_not_there(site, environment):
    failed = fetch(
        "fetch_file('hf://org/model/tokeniser.model', field='config.tokenizer')", environment=environment
    )
    says(failed, "config.tokenizer=hf://org/model/tokeniser.model", "tokenizer.model", error="ConfigError")


def test_a_repository_without_safetensors_names_what_it_has(site, environment):
    site.files = {"pt_224.npz": WEIGHTS, "README.md": b"x"}
    failed = fetch(MODEL, environment=environment)
    says(failed, "org/model is no transformers folder", "hf://org/model/FILE", "pt_224.npz")


def test_no_network_at_all(environment):
    failed = fetch(MODEL, environment=environment | {"HF_ENDPOINT": closed_port()})
    says(failed, "cannot be reached from this host", "give the local path", "Connection refused")


def test_a_hub_that_is_ill(site, environment):
    site.status = 500
    says(fetch(MODEL, environment=environment), "the Hub answered with HTTP 500. Try again later")


def test_a_missing_package(environment):
    failed = fetch(MODEL, environment=environment, prelude="sys.modules['huggingface_hub'] = None")
    says(failed, "pip install 'pgdist[hub]'")


def test_a_disk_that_is_known_to_be_too_small(site, environment):
    small = "import shutil; shutil.disk_usage = lambda path: type('Usage', (), {'free': 1000})"
    failed = fetch(MODEL, environment=environment, prelude=small)
    says(failed, "no space left for it in", "605.1 kB are needed, 1.0 kB are free", "set HF_HOME")
    assert not site.downloads(SHARD)


def test_a_disk_that_turns_out_to_be_too_small(site, environment):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    failed = fetch(MODEL, environment=environment, prelude=limit)
    says(failed, "no space left for it in", "File too large", "set HF_HOME to a folder on a larger disk")
    assert (fetch(MODEL, environment=environment).path / SHARD).read_bytes() == WEIGHTS


def test_a_cache_that_cannot_be_written(site, environment, tmp_path):
    (tmp_path / "hf").write_text("no folder")
    failed = fetch(MODEL, environment=environment)
    says(failed, "config.init=hf://org/model:", str(tmp_path / "hf"))


def test_a_server_that_never_answers_is_given_up(site, environment):
    site.silent = True
    prelude = "from pgdist.hub import huggingface; huggingface._TIMEOUT = 1"
    failed = fetch(MODEL, environment=environment, prelude=prelude)
    says(failed, "cannot be reached from this host", "timed out")


def test_a_read_only_cache_that_is_complete_serves(site, environment, tmp_path):
    first = fetch(MODEL, environment=environment)
    (tmp_path / "file").touch()  # root may write to folders that are read-only; into files nobody can
    blocked = environment | {"PGDIST_CACHE": str(tmp_path / "file")}
    assert fetch(MODEL, environment=blocked).path == first.path
