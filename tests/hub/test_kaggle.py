"""Files of Kaggle's models: what is fetched, how downloads end well, and what is said where they do not."""

from __future__ import annotations

import random
import socket

import pytest

from tests.hub.conftest import WEIGHTS
from tests.hub.fetching import fetch, finish_fetch, start_fetch

VARIATION = "kaggle://google/paligemma/jax/variation"
FILE = "pt_224.f16.npz"
MODEL = f"fetch_model('{VARIATION}/{FILE}')"
CACHED = "kagglehub/models/google/paligemma/jax/variation"


def downloads(site) -> int:
    return len(site.downloads(FILE))


def test_one_file_of_the_newest_version_is_fetched(site, environment, tmp_path):
    found = fetch(MODEL, environment=environment)
    assert found.path == tmp_path / CACHED / "2" / FILE and found.path.read_bytes() == WEIGHTS
    assert f"{VARIATION}/{FILE}: fetching version 2, 300.0 kB, into {found.path}" in found.log
    assert "%|" not in found.log  # progress bars are for terminals
    assert [path.name for path in found.path.parent.iterdir()] == [FILE]


def test_an_older_version_is_fetched(site, environment):
    call = f"fetch_file('{VARIATION}/1/old.npz', field='config.x')"
    assert fetch(call, environment=environment).path.read_bytes() == WEIGHTS[:1000]


def test_a_second_fetch_downloads_nothing_and_a_fixed_version_asks_nothing(site, environment):
    first = fetch(MODEL, environment=environment)
    assert fetch(MODEL, environment=environment).path == first.path and downloads(site) == 1
    site.requests.clear()
    fixed = fetch(f"fetch_model('{VARIATION}/2/{FILE}')", environment=environment)
    assert fixed.path == first.path and not site.requests


def test_a_download_that_is_cut_goes_on_where_it_was(site, environment):
    block = 2**20  # what the library writes at once
    site.archives[2][FILE] = random.Random(1).randbytes(5 * block)
    site.cut[FILE] = 1
    found = fetch(MODEL, environment=environment)
    assert found.path.read_bytes() == site.archives[2][FILE]
    assert [request.range for request in site.downloads(FILE)] == [None, None, f"bytes={2 * block}-"]
    assert "the connection broke off; going on at 2.1 MB" in found.log


def test_a_download_that_a_killed_process_began_is_gone_on_with(site, environment, tmp_path):
    begun = tmp_path / CACHED / "2" / FILE
    begun.parent.mkdir(parents=True)
    begun.write_bytes(WEIGHTS[:1000])
    assert fetch(MODEL, environment=environment).path.read_bytes() == WEIGHTS
    assert site.downloads(FILE)[-1].range == "bytes=1000-"


def test_a_whole_file_that_nobody_has_checked_is_not_believed(site, environment, tmp_path):
    begun = tmp_path / CACHED / "2" / FILE
    begun.parent.mkdir(parents=True)
    begun.write_bytes(WEIGHTS[::-1])
    assert fetch(MODEL, environment=environment).path.read_bytes() == WEIGHTS


def test_damaged_bytes_are_fetched_again(site, environment):
    site.damaged[FILE] = 1
    assert fetch(MODEL, environment=environment).path.read_bytes() == WEIGHTS


def test_damaged_bytes_are_refused_and_removed(site, environment, tmp_path):
    site.damaged[FILE] = 2
    failed = fetch(MODEL, environment=environment)
    assert failed.error == "WeightsError"
    assert f"config.init={VARIATION}/{FILE}: {FILE} came damaged, twice" in failed.message
    assert not (tmp_path / CACHED / "2" / FILE).exists()


def without_network(environment: dict[str, str]) -> dict[str, str]:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    return environment | {"HTTP_PROXY": url, "http_proxy": url}


def test_the_cache_serves_where_there_is_no_network(site, environment):
    first = fetch(MODEL, environment=environment)
    second = fetch(MODEL, environment=without_network(environment))
    assert second.path == first.path
    assert "Kaggle did not give it (ProxyError); using" in second.log


def test_two_processes_download_once(site, environment):
    processes = [start_fetch(MODEL, environment=environment) for _ in range(2)]
    found = [finish_fetch(process) for process in processes]
    assert found[0].path == found[1].path and downloads(site) == 1


def says(failed, *texts: str, error: str = "WeightsError") -> None:
    assert failed.error == error
    for text in texts:
        assert text in failed.message, failed.message
    assert "secret" not in failed.message + failed.log and "Signature" not in failed.message + failed.log


TOKEN = {"KAGGLE_API_TOKEN": "secret"}


def test_a_token_that_is_refused(site, environment):
    site.token = "good"
    failed = fetch(MODEL, environment=environment | TOKEN)
    says(
        failed,
        "Kaggle refuses the credentials. Set KAGGLE_API_TOKEN, or KAGGLE_USERNAME and KAGGLE_KEY",
        "settings",
    )


def test_a_token_that_is_known(site, environment):
    site.token = "secret"
    assert fetch(MODEL, environment=environment | TOKEN).path.read_bytes() == WEIGHTS
    assert site.requests[0].authorization == "Bearer secret"
    assert site.downloads(FILE)[0].authorization is None


def test_a_licence_without_credentials(site, environment):
    site.licence_accepted = False
    failed = fetch(MODEL, environment=environment)
    says(
        failed,
        "there are no credentials",
        "https://www.kaggle.com/models/google/paligemma",
        "KAGGLE_API_TOKEN",
    )


def test_a_licence_that_the_account_has_not_accepted(site, environment):
    site.licence_accepted = False
    failed = fetch(MODEL, environment=environment | {"KAGGLE_USERNAME": "me", "KAGGLE_KEY": "secret"})
    says(failed, "Accept the licence at https://www.kaggle.com/models/google/paligemma with the account")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (f"{VARIATION}/pt_224.f17.npz", "version 2 of jax/variation has no file pt_224.f17.npz"),
        (f"{VARIATION}/pt_224.f17.npz", "There are: pt_224.f16.npz, pt_224.f32.npz."),
        (f"{VARIATION}/7/{FILE}", "there is no version 7; the newest is 2"),
        (
            f"{VARIATION}s/{FILE}",
            "google/paligemma has no jax/variations on Kaggle. Mend the name. There is: jax/var",
        ),
        (f"kaggle://google/gemma/jax/variation/{FILE}", "there is no google/gemma on Kaggle"),
        (f"kaggle://google/paligemma/jaxx/variation/{FILE}", "Kaggle knows no framework jaxx"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(site, environment, name, said):
    says(fetch(f"fetch_file('{name}', field='config.x')", environment=environment), said, error="ConfigError")


def test_no_network_at_all(site, environment):
    failed = fetch(MODEL, environment=without_network(environment))
    says(failed, "Kaggle cannot be reached from this host", "give the local path")


def test_a_kaggle_that_is_ill(site, environment):
    site.status = 503
    says(fetch(MODEL, environment=environment), "Kaggle answered with HTTP 503. Try again later")


def test_a_missing_package(environment):
    failed = fetch(MODEL, environment=environment, prelude="sys.modules['kagglehub'] = None")
    says(failed, "pip install 'pgdist[hub]'")


def test_credentials_that_cannot_be_read(site, environment, tmp_path):
    (tmp_path / ".kaggle").mkdir()
    (tmp_path / ".kaggle/kaggle.json").write_text('{"username": "me", "key": "secret"')
    says(fetch(MODEL, environment=environment), "Invalid Kaggle credentials file at")


def test_a_disk_that_is_known_to_be_too_small(site, environment):
    small = "import shutil; shutil.disk_usage = lambda path: type('Usage', (), {'free': 1000})"
    failed = fetch(MODEL, environment=environment, prelude=small)
    says(failed, "300.0 kB are needed, 1.0 kB are free", "set KAGGLEHUB_CACHE")
    assert downloads(site) == 0


def test_a_disk_that_turns_out_to_be_too_small(site, environment):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    failed = fetch(MODEL, environment=environment, prelude=limit)
    says(failed, "no space left for it in", "File too large")
    assert fetch(MODEL, environment=environment).path.read_bytes() == WEIGHTS


def test_a_server_that_never_answers_is_given_up(site, environment):
    site.silent = True
    failed = fetch(
        MODEL, environment=environment, prelude="from pgdist.hub import kaggle; kaggle._TIMEOUT = (1, 1)"
    )
    says(failed, "Kaggle cannot be reached from this host", "timed out")
