"""Names taken apart, paths left alone, and what is said of names that mean nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgdist import hub
from pgdist.errors import ConfigError, DataError, UserError, WeightsError
from pgdist.hub import names
from pgdist.hub.failures import Asked
from pgdist.hub.names import BucketName, HubName, KaggleName


def asked(name: str) -> Asked:
    return Asked(name=name, field="config.x", error=ConfigError)


@pytest.mark.parametrize(
    ("name", "repo", "revision", "path"),
    [
        ("hf://google/paligemma-3b-pt-224", "google/paligemma-3b-pt-224", "main", None),
        ("hf://google/paligemma-3b-pt-224/", "google/paligemma-3b-pt-224", "main", None),
        ("hf://a/b@v1.0", "a/b", "v1.0", None),
        ("hf://a/b@v1.0/", "a/b", "v1.0", None),
        ("hf://a/b/c.npz", "a/b", "main", "c.npz"),
        ("hf://a/b@float16/c/d.npz", "a/b", "float16", "c/d.npz"),
        ("hf://a/b@refs/pr/7", "a/b", "refs/pr/7", None),
        ("hf://a/b@refs/pr/7/c@d.npz", "a/b", "refs/pr/7", "c@d.npz"),
        ("hf://a/b/c@d.npz", "a/b", "main", "c@d.npz"),
    ],
)
def test_names_of_the_hub(name, repo, revision, path):
    assert names.hub_name(asked(name)) == HubName(repo=repo, revision=revision, path=path)


@pytest.mark.parametrize(
    ("rest", "version", "path"),
    [
        ("c.npz", None, "c.npz"),
        ("3/c.npz", 3, "c.npz"),
        ("3/c/d.npz", 3, "c/d.npz"),
        ("c/d.npz", None, "c/d.npz"),
    ],
)
def test_names_of_kaggle(rest, version, path):
    found = names.kaggle_name(asked(f"kaggle://google/paligemma/jax/pt-224/{rest}"))
    assert found == KaggleName(
        owner="google", model="paligemma", framework="jax", variation="pt-224", version=version, path=path
    )


def test_names_of_buckets():
    found = names.bucket_name(asked("gs://longcap100/a b/data_train90.jsonl"))
    assert found == BucketName(bucket="longcap100", path="a b/data_train90.jsonl")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "hf://google",
            "hf://ORG/REPO[@REVISION] or hf://ORG/REPO[@REVISION]/FILE, for instance hf://google/pali",
        ),
        ("hf://", "hf://ORG/REPO"),
        ("hf:///b", "hf://ORG/REPO"),
        ("hf://a/b@", "hf://ORG/REPO"),
        ("hf://a/b@refs/pr", "hf://ORG/REPO"),
        ("hf://a/b/../c", "hf://ORG/REPO"),
        ("hf://a/..", "hf://ORG/REPO"),
        ("hf://a b/c", "hf://ORG/REPO"),
        (
            "kaggle://google/paligemma",
            "kaggle://OWNER/MODEL/FRAMEWORK/VARIATION[/VERSION]/FILE, for instance kaggle",
        ),
        ("kaggle://google/paligemma/jax/pt-224", "/FILE, for instance"),
        ("kaggle://google/paligemma/jax/pt-224/3", "/FILE, for instance"),
        ("kaggle://google/paligemma/jax/pt-224/0/c.npz", "[/VERSION]"),
        ("kaggle://google/paligemma/jax//c.npz", "VARIATION"),
        ("kaggle://google/paligemma/jax/pt-224/../c.npz", "/FILE"),
        ("gs://bucket", "gs://BUCKET/OBJECT, without any of"),
        ("gs://bucket/", "gs://BUCKET/OBJECT"),
        ("gs://bucket/a/../b", "gs://BUCKET/OBJECT"),
        ("gs://bucket/*.jsonl", "for instance gs://big_vision/paligemma_tokenizer.model"),
        ("s3://bucket/a", "expected a local path, hf://"),
        ("https://huggingface.co/google/paligemma-3b-pt-224", "expected a local path, hf://"),
    ],
)
def test_a_name_that_means_nothing_is_told_what_does(name, expected):
    with pytest.raises(ConfigError) as raised:
        hub.fetch_file(name, field="config.tokenizer")
    assert str(raised.value).startswith(f"config.tokenizer={name}: expected ") and expected in str(
        raised.value
    )


def test_each_kind_has_its_error():
    with pytest.raises(WeightsError, match=r"^config.init=s3://a/b: expected a local path, hf://ORG/REPO"):
        hub.fetch_model("s3://a/b")
    with pytest.raises(WeightsError, match="^config.init=hf://a: expected hf://ORG/REPO"):
        hub.fetch_model("hf://a")
    with pytest.raises(
        DataError, match="^config.data.train=hf://a/b: expected a local path or gs://BUCKET/OBJECT"
    ):
        hub.fetch_examples("hf://a/b", field="config.data.train")
    with pytest.raises(ConfigError, match=r"whole repository; expected one file of it"):
        hub.fetch_file("hf://a/b", field="config.tokenizer")
    assert all(issubclass(error, UserError) for error in (WeightsError, DataError, ConfigError))


@pytest.mark.parametrize("path", ["", "a/b.npz", "/no/such/file", "gs:/a", "C:\\a", "hf:a/b"])
def test_a_path_stays_what_it_is(path):
    assert hub.fetch_model(path) == path
    assert hub.fetch_file(path, field="config.x") == Path(path)
    assert hub.fetch_examples(path, field="config.x") == Path(path)


def test_a_home_folder_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert hub.fetch_model("~/a.npz") == "/home/me/a.npz"
    assert hub.fetch_file("~/t.model", field="config.tokenizer") == Path("/home/me/t.model")
    assert hub.fetch_examples("~/a.jsonl", field="config.data.train") == Path("/home/me/a.jsonl")


def test_a_model_in_a_bucket_keeps_its_name():
    assert hub.fetch_model("gs://bucket/folder/") == "gs://bucket/folder/"
