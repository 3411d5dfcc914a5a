"""Models, files and data by name: what hf://, kaggle:// and gs:// stand for is fetched once, and a local path then on.

A plain path stays what it is. Each host keeps what it has fetched (the libraries of the Hub and of Kaggle in their
own caches, buckets in pgdist's), checks it against the published checksum once, and goes on with it where the network
is down. Of several processes of one host one fetches and the others wait. Needs no JAX.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from pgdist import files
from pgdist.errors import ConfigError, DataError, WeightsError
from pgdist.hub import buckets, huggingface, kaggle, names
from pgdist.hub.failures import Asked

__all__ = ["fetch_examples", "fetch_file", "fetch_model"]

_MODELS = f"a local path, {names.HUB_MODEL}, {names.HUB_FILE}, {names.KAGGLE_FILE} or {names.BUCKET_FILE}"
_FILES = f"a local path, {names.HUB_FILE}, {names.KAGGLE_FILE} or {names.BUCKET_FILE}"
_EXAMPLES = f"a local path or {names.BUCKET_FILE}"


def fetch_model(name: str) -> str:
    """The local path of a model: a transformers folder or one file; a gs:// name as it is, for it is read in parts.

    WeightsError where it cannot be had. A local path is not looked at.
    """
    asked = Asked(name=name, field="config.init", error=WeightsError)
    match _scheme(asked):
        case "hf" | "kaggle":
            return str(_fetch_published(asked))
        case "gs":
            return name
        case "":
            return os.path.expanduser(name)
    raise asked.failure(f"expected {_MODELS}.")


def fetch_file(name: str, *, field: str) -> Path:
    """The local path of one file; ConfigError, beginning with `field`, where it cannot be had."""
    asked = Asked(name=name, field=field, error=ConfigError)
    match _scheme(asked):
        case "hf":
            wanted = names.hub_name(asked)
            if wanted.path is None:
                raise asked.failure(
                    f"this is a whole repository; expected one file of it, as {names.HUB_FILE}."
                )
            return _fetch_published(asked)
        case "kaggle":
            return _fetch_published(asked)
        case "gs":
            return buckets.fetch_file(asked, names.bucket_name(asked))
        case "":
            return Path(os.path.expanduser(name))
    raise asked.failure(f"expected {_FILES}.")


def fetch_examples(name: str, *, field: str) -> Path:
    """The local path of a JSONL, with the images that it names beside it; DataError where it cannot be had.

    Records that are broken, images that are not there and paths that leave the JSONL's folder are left for the
    reader to find, which says in which line they are.
    """
    asked = Asked(name=name, field=field, error=DataError)
    match _scheme(asked):
        case "gs":
            return buckets.fetch_examples(asked, names.bucket_name(asked))
        case "":
            return Path(os.path.expanduser(name))
    raise asked.failure(f"expected {_EXAMPLES}; examples from elsewhere must be copied to one of these.")


@functools.cache  # a process that asks again means the same revision
def _fetch_published(asked: Asked) -> Path:
    if _scheme(asked) == "hf":
        return huggingface.fetch(asked, names.hub_name(asked))
    return kaggle.fetch(asked, names.kaggle_name(asked))


def _scheme(asked: Asked) -> str:
    """ "" for a local path."""
    return asked.name.partition("://")[0] if files.is_url(asked.name) else ""
