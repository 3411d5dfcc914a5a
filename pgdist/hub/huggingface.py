"""Repositories of Hugging Face's Hub, by huggingface_hub and in its cache, checked against the Hub's checksums.

The library resumes a download that is cut and keeps the files that are whole; it compares sizes alone, so that
checksums are compared here. Where the Hub does not answer, what is in the cache is used if it is complete.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import glob
import json
import logging as python_logging
import os
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from absl import logging

from pgdist.errors import UserError
from pgdist.hub import cache, failures
from pgdist.hub.failures import Asked, Trouble
from pgdist.hub.names import HubName

# What a transformers folder of PaliGemma is made of; never the same weights in another format.
_WANTED = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "preprocessor_config.json", "processor_config.json", "chat_template.json", "chat_template.jinja",
)  # fmt: skip

_TIMEOUT = 10.0  # seconds until the Hub must have answered, of which it needs less than one
_ATTEMPTS = 4  # of a download that breaks off, each of which the library resumes five times by itself
_READERS = 4  # files whose checksums are computed at once
_VARIABLE = "HF_HOME"


def fetch(asked: Asked, name: HubName) -> Path:
    """The local snapshot folder, or the one file in it."""
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise failures.package_missing(asked, extra="hub", error=error) from error
    with _quiet(), cache.lock(f"hf://{name.repo}"):
        folder = _fetch_folder(asked, name)
    return folder / name.path if name.path else folder


def _fetch_folder(asked: Asked, name: HubName) -> Path:
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True, timeout=_TIMEOUT)
    except Exception as error:  # of the library, httpx or the network
        return _cached_folder(asked, name, error)
    wanted = _wanted_files(asked, name, {file.rfilename: file for file in info.siblings})
    folder = _download(asked, name, info.sha, wanted)
    if folder.name != info.sha:  # somebody has published meanwhile
        return _fetch_folder(asked, name)
    if broken := _damaged_files(folder, wanted):
        logging.warning("%s: %s came damaged; fetching again.", asked.name, ", ".join(broken))
        folder = _download(asked, name, info.sha, wanted)
        if broken := _damaged_files(folder, wanted):
            raise asked.failed(failures.damaged(", ".join(broken)))
    return folder


def _wanted_files(asked: Asked, name: HubName, there: dict[str, Any]) -> dict[str, Any]:
    """{path: what the Hub says of it}"""
    if name.path:
        if name.path not in there:
            raise asked.failed(_no_such_file(name, there))
        return {name.path: there[name.path]}
    wanted = {
        path: file
        for path, file in there.items()
        if "/" not in path and any(fnmatchcase(path, pattern) for pattern in _WANTED)
    }
    if "config.json" not in wanted or not any(path.endswith(".safetensors") for path in wanted):
        raise asked.failure(
            f"{name.repo} is no transformers folder: it lacks config.json or *.safetensors. Name one file of it, as "
            f"hf://{name.repo}/FILE.{failures.nearest('.npz', there)}"
        )
    return wanted


def _download(asked: Asked, name: HubName, commit: str, wanted: dict[str, Any]) -> Path:
    from huggingface_hub import constants, snapshot_download, try_to_load_from_cache

    missing = [
        path
        for path in wanted
        if not isinstance(try_to_load_from_cache(name.repo, path, revision=commit), str)
    ]
    if missing:
        needed = sum(wanted[path].size or 0 for path in missing)
        where = Path(constants.HF_HUB_CACHE)
        cache.check_space(asked, needed, where=where, variable=_VARIABLE)
        logging.info(
            "%s: fetching %d files, %s, into %s", asked.name, len(missing), cache.size_text(needed), where
        )
    for left in reversed(range(_ATTEMPTS)):
        try:
            # By the revision's name, not by the commit: the cache then knows without a network what it stands for.
            return Path(
                snapshot_download(name.repo, revision=name.revision, etag_timeout=_TIMEOUT, **_patterns(name))
            )
        except Exception as error:
            if not left or not _has_broken_off(error):
                raise _failed(asked, name, error, wanted) from error
            logging.info("%s: the connection broke off; going on.", asked.name)
            time.sleep(2.0 ** (_ATTEMPTS - left - 1))
    raise AssertionError("unreachable")


def _has_broken_off(error: Exception) -> bool:
    """A connection that was there and ended: it may be there again. Not one that could not be made."""
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError) or hasattr(error, "response"):
        return False
    return isinstance(error, HTTPError) or "Consistency check failed" in str(error)


def _damaged_files(folder: Path, wanted: dict[str, Any]) -> list[str]:
    """Those whose bytes are not the published ones; they are removed."""
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        whole = pool.map(lambda path: _is_whole(folder / path, wanted[path]), wanted)
        broken = [path for path, is_whole in zip(wanted, whole, strict=True) if not is_whole]
    for path in broken:
        (folder / path).resolve().unlink(missing_ok=True)  # the snapshot has links to it
        (folder / path).unlink(missing_ok=True)
    return broken


def _is_whole(path: Path, published: Any) -> bool:
    checksum = f"sha256:{published.lfs.sha256}" if published.lfs else f"git:{published.blob_id}"
    if cache.is_marked(path, checksum):
        return True
    if published.blob_id is not None and not cache.has_checksum(path, checksum):
        return False
    cache.mark(path, checksum)
    return True


def _cached_folder(asked: Asked, name: HubName, error: Exception) -> Path:
    """What is in the cache, if it is all that is needed; otherwise raises what kept the Hub from being asked."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(name.repo, revision=name.revision, local_files_only=True, **_patterns(name))
        )
    except Exception:  # LocalEntryNotFoundError of some versions, others of others
        raise _failed(asked, name, error, {}) from error
    if not _is_complete(folder, name):
        raise _failed(asked, name, error, {}) from error
    logging.warning(
        "%s: the Hub did not give it (%s); using the copy in %s.", asked.name, type(error).__name__, folder
    )
    return folder


def _is_complete(folder: Path, name: HubName) -> bool:
    if name.path:
        return (folder / name.path).exists()
    weights = {"model.safetensors"}
    if (folder / "model.safetensors.index.json").exists():
        weights = set(
            json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()
        )
    return all((folder / path).exists() for path in ("config.json", *weights))


def _patterns(name: HubName) -> dict[str, list[str]]:
    if name.path:
        return {"allow_patterns": [glob.escape(name.path)]}
    return {"allow_patterns": list(_WANTED), "ignore_patterns": ["*/*"]}  # not what is in folders


def _failed(asked: Asked, name: HubName, error: Exception, there: dict[str, Any]) -> UserError:
    from huggingface_hub import constants

    here = failures.local_trouble(error, folder=constants.HF_HUB_CACHE, variable=_VARIABLE)
    return asked.failed(here or _remote_trouble(name, error, there))


def _remote_trouble(name: HubName, error: Exception, there: dict[str, Any]) -> Trouble:
    from huggingface_hub import constants, errors

    page = f"https://huggingface.co/{name.repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return _gated(page)
    if isinstance(error, errors.RevisionNotFoundError):
        hint = failures.nearest(name.revision, _revisions(name))
        return Trouble(
            happened=f"{name.repo} has no revision {name.revision}",
            remedy=f"Give a branch, a tag or a whole commit after @.{hint}",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return _no_such_repo(name, page)
    if isinstance(error, errors.EntryNotFoundError) and status is not None:
        return _no_such_file(name, there)
    if status == 401:
        return Trouble(
            happened="the Hub refuses the token",
            remedy=f"{_about_tokens()}, or unset it: {page} may need none.",
        )
    if status == 403:
        return _gated(page)
    if status is not None:
        return Trouble(
            happened=f"the Hub answered with HTTP {status}", remedy="Try again later, or give a local path."
        )
    if isinstance(error, (errors.HTTPError, ConnectionError, errors.LocalEntryNotFoundError)):
        return failures.unreachable(constants.ENDPOINT, error.__cause__ or error)
    return failures.unknown(error)


def _gated(page: str) -> Trouble:
    from huggingface_hub import get_token

    remedy = f"Accept the licence at {page}"
    if get_token() is None:
        return Trouble(
            happened="it is given to known accounts only, and there is no token",
            remedy=f"{remedy}, and {_about_tokens('set')}.",
        )
    return Trouble(
        happened="the token's account may not have it",
        remedy=f"{remedy} with the account that the token is of; a fine-grained token also needs leave to read public "
        "gated repositories.",
    )


def _no_such_repo(name: HubName, page: str) -> Trouble:
    from huggingface_hub import HfApi, get_token

    org, _, repo = name.repo.partition("/")
    found: list[str] = []
    with contextlib.suppress(Exception):
        found = [model.id for model in HfApi().list_models(author=org, search=repo[:9], limit=100)]
    hint = failures.nearest(name.repo, found)
    private = f" If it is private, {_about_tokens('set')}." if get_token() is None else ""
    return Trouble(happened=f"there is no {page}, or it is private", remedy=f"Mend the name.{hint}{private}")


def _no_such_file(name: HubName, there: dict[str, Any]) -> Trouble:
    return Trouble(
        happened=f"{name.repo} has no file {name.path} at revision {name.revision}",
        remedy=f"Mend the name.{failures.nearest(name.path or '', there)}",
    )


def _revisions(name: HubName) -> list[str]:
    from huggingface_hub import HfApi

    with contextlib.suppress(Exception):
        refs = HfApi().list_repo_refs(name.repo)
        return [ref.name for ref in (*refs.branches, *refs.tags)]
    return []


def _about_tokens(verb: str = "Set") -> str:
    return f"{verb} HF_TOKEN to a token from https://huggingface.co/settings/tokens"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Progress bars on terminals alone, and no warnings with signed URLs of what the library then mends by itself."""
    from huggingface_hub import utils

    logger = python_logging.getLogger("huggingface_hub")
    level = logger.level
    chosen = "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ or utils.are_progress_bars_disabled()
    hides_bars = not chosen and not sys.stderr.isatty()
    if hides_bars:
        utils.disable_progress_bars()
    logger.setLevel(python_logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if hides_bars:
            utils.enable_progress_bars()
