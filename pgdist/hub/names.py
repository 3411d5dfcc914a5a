"""Names of what can be fetched, taken apart: hf://ORG/REPO, kaggle://OWNER/MODEL/..., gs://BUCKET/OBJECT."""

from __future__ import annotations

import dataclasses
import re

from pgdist.hub.failures import Asked

HUB_MODEL = "hf://ORG/REPO[@REVISION]"
HUB_FILE = "hf://ORG/REPO[@REVISION]/FILE"
KAGGLE_FILE = "kaggle://OWNER/MODEL/FRAMEWORK/VARIATION[/VERSION]/FILE"
BUCKET_FILE = "gs://BUCKET/OBJECT"

_HUB_EXAMPLE = "hf://google/paligemma-3b-pt-224"
_KAGGLE_EXAMPLE = "kaggle://google/paligemma/jax/paligemma-3b-pt-224/paligemma-3b-pt-224.f16.npz"
_BUCKET_EXAMPLE = "gs://big_vision/paligemma_tokenizer.model"

_WORD = re.compile(r"[\w.-]+")
_REVISION = re.compile(r"[\w.-]+|refs/\w+/[\w.-]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubName:
    """A repository of Hugging Face's Hub, or one file in it."""

    repo: str  # ORG/REPO
    revision: str  # a branch, a tag or a commit
    path: str | None  # None: all that a transformers folder needs


@dataclasses.dataclass(frozen=True, kw_only=True)
class KaggleName:
    """One file of a model on Kaggle."""

    owner: str
    model: str
    framework: str
    variation: str
    version: int | None  # None: the newest
    path: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketName:
    """An object in a bucket of Google Cloud Storage."""

    bucket: str
    path: str


def hub_name(asked: Asked) -> HubName:
    """Raises the error of `asked` for what is no such name."""
    org, _, rest = _after_scheme(asked).partition("/")
    repo, at, rest = re.fullmatch(r"([^/@]*)(@?)(.*)", rest, re.DOTALL).groups()
    revision = "main"
    if at:
        parts = rest.split("/")
        length = 3 if parts[0] == "refs" else 1  # refs/pr/7
        revision, rest = "/".join(parts[:length]), "/".join(["", *parts[length:]]).rstrip("/")
    path = rest.strip("/") or None
    if not (_are_words(org, repo) and _REVISION.fullmatch(revision) and (path is None or _is_inside(path))):
        raise _malformed(asked, f"{HUB_MODEL} or {HUB_FILE}", _HUB_EXAMPLE)
    return HubName(repo=f"{org}/{repo}", revision=revision, path=path)


def kaggle_name(asked: Asked) -> KaggleName:
    """Raises the error of `asked` for what is no such name."""
    head, rest = _after_scheme(asked).split("/")[:4], _after_scheme(asked).split("/")[4:]
    version = int(rest.pop(0)) if rest and rest[0].isdecimal() else None
    path = "/".join(rest).strip("/")
    if len(head) < 4 or not _are_words(*head) or version == 0 or not _is_inside(path):
        raise _malformed(asked, KAGGLE_FILE, _KAGGLE_EXAMPLE)
    owner, model, framework, variation = head
    return KaggleName(
        owner=owner, model=model, framework=framework, variation=variation, version=version, path=path
    )


def bucket_name(asked: Asked) -> BucketName:
    """Raises the error of `asked` for what is no such name."""
    bucket, _, path = _after_scheme(asked).partition("/")
    if not _are_words(bucket) or not _is_inside(path) or re.search(r"[#?*\[\]\x00-\x1f\x7f]", path):
        raise _malformed(asked, f"{BUCKET_FILE}, without any of # ? * [ ] in it", _BUCKET_EXAMPLE)
    return BucketName(bucket=bucket, path=path)


def _after_scheme(asked: Asked) -> str:
    return asked.name.partition("://")[2]


def _are_words(*parts: str) -> bool:
    return all(_WORD.fullmatch(part) and part.strip(".") for part in parts)


def _is_inside(path: str) -> bool:
    return all(part not in ("", ".", "..") for part in path.split("/"))


def _malformed(asked: Asked, expected: str, example: str) -> Exception:
    return asked.failure(f"expected {expected}, for instance {example}.")
