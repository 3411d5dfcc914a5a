"""Models on Kaggle, one file of an archive at a time, by kagglehub and in its cache.

kagglehub goes on where an earlier download ended and compares MD5 at the end; a file that it has marked as complete
is taken as it is. It does not start again by itself when a connection breaks off, waits for ever, knows no locks and
writes to standard output: that is mended here. Where Kaggle does not answer, the newest version in the cache is used.
"""

from __future__ import annotations

import contextlib
import functools
import logging as python_logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from pgdist.errors import UserError
from pgdist.hub import cache, failures
from pgdist.hub.failures import Asked, Trouble
from pgdist.hub.names import KaggleName

_TIMEOUT = (10.0, 60.0)  # seconds to connect, and between two pieces of an answer
_ATTEMPTS = 5  # in a row without a byte more
_PAGES = 8  # of a listing; a variation has a handful of files
_VARIABLE = "KAGGLEHUB_CACHE"
_SETTINGS = "https://www.kaggle.com/settings/api"
_CREDENTIALS = "KAGGLE_API_TOKEN, or KAGGLE_USERNAME and KAGGLE_KEY,"

# Kaggle's and Colab's notebooks mount models instead of downloading them, which kagglehub does there by itself.
_NOTEBOOKS = ("KAGGLE_KERNEL_RUN_TYPE", "TBE_RUNTIME_ADDR")


def fetch(asked: Asked, name: KaggleName) -> Path:
    """The local path of the file."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import kagglehub
            from kagglehub.cache import Cache  # noqa: F401  not in versions before 1.0
    except ImportError as error:
        raise failures.package_missing(asked, extra="hub", error=error) from error
    with _quiet(), _patient_requests(), cache.lock(f"kaggle://{name.owner}/{name.model}/{_variation(name)}"):
        if any(variable in os.environ for variable in _NOTEBOOKS):
            try:
                return Path(kagglehub.model_download(str(_handle(name)), path=name.path))
            except Exception as error:
                raise _failed(asked, name, error) from error
        return _cached(name, name.version) or _fetch_file(asked, name)


def _fetch_file(asked: Asked, name: KaggleName) -> Path:
    try:
        version = name.version or _newest_version(name)
    except Exception as error:  # of requests, kagglesdk and kagglehub: no common type
        if found := next(filter(None, (_cached(name, version) for version in _cached_versions(name))), None):
            logging.warning(
                "%s: Kaggle did not give it (%s); using %s.", asked.name, type(error).__name__, found
            )
            return found
        raise _failed(asked, name, error) from error
    if found := _cached(name, version):
        return found
    sizes = _file_sizes(name, version)
    if sizes and name.path not in sizes:
        raise asked.failed(_no_such_file(name, version, sizes))
    return _download(asked, name, version, sizes.get(name.path))


def _download(asked: Asked, name: KaggleName, version: int, size: int | None) -> Path:
    from kagglehub.cache import Cache

    target = Path(Cache().get_path(_handle(name, version), name.path))
    have = _size(target)
    if size is not None and have >= size:
        target.unlink()  # whole, but nobody got to comparing it: kagglehub would believe it
        have = 0
    if size is not None:
        cache.check_space(asked, size - have, where=target.parent, variable=_VARIABLE)
    logging.info(
        "%s: fetching version %d, %s, into %s%s",
        asked.name,
        version,
        "of unknown size" if size is None else cache.size_text(size),
        target,
        f", of which {cache.size_text(have)} are there" if have else "",
    )
    return _download_in_pieces(asked, name, version, target)


def _download_in_pieces(asked: Asked, name: KaggleName, version: int, target: Path) -> Path:
    import kagglehub
    from kagglehub.exceptions import DataCorruptionError

    failed_attempts, came_damaged, have = 0, False, _size(target)
    while True:
        try:
            return Path(kagglehub.model_download(str(_handle(name, version)), path=name.path))
        except DataCorruptionError as error:
            if came_damaged:
                raise asked.failed(failures.damaged(name.path)) from error
            came_damaged = True
            logging.warning("%s: it came damaged; fetching again.", asked.name)
        except Exception as error:
            failed_attempts = 0 if _size(target) > have else failed_attempts + 1
            if not _is_network(error) or failed_attempts >= _ATTEMPTS:
                raise _failed(asked, name, error) from error
            logging.info(
                "%s: the connection broke off; going on at %s.", asked.name, cache.size_text(_size(target))
            )
            time.sleep(2.0**failed_attempts)
        have = _size(target)


def _cached(name: KaggleName, version: int | None) -> Path | None:
    """The file where it is complete."""
    from kagglehub.cache import Cache

    found = Cache().load_from_cache(_handle(name, version), name.path) if version else None
    return Path(found) if found else None


def _cached_versions(name: KaggleName) -> list[int]:
    """Newest first."""
    from kagglehub.cache import Cache

    if name.version:
        return []
    with contextlib.suppress(OSError):
        names = [path.name for path in Path(Cache().get_path(_handle(name, 1))).parent.iterdir()]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)
    return []


def _newest_version(name: KaggleName) -> int:
    from kagglesdk.models.types.model_api_service import ApiGetModelInstanceRequest

    with _models() as models:
        request = _addressed(ApiGetModelInstanceRequest(), name)
        return models.get_model_instance(request).version_number


def _file_sizes(name: KaggleName, version: int) -> Mapping[str, int]:
    """{path: bytes} of all files, or nothing where Kaggle does not list them: the download then says why."""
    from kagglesdk.models.types.model_api_service import ApiListModelInstanceVersionFilesRequest

    sizes: dict[str, int] = {}
    with contextlib.suppress(Exception), _models() as models:
        request = _addressed(ApiListModelInstanceVersionFilesRequest(), name)
        request.version_number = version
        for _ in range(_PAGES):
            answer = models.list_model_instance_version_files(request)
            sizes |= {file.name: file.size for file in answer.files}
            if not answer.next_page_token:
                return sizes
            request.page_token = answer.next_page_token
    return {}


def _variations(name: KaggleName) -> list[str]:
    """FRAMEWORK/VARIATION of each that the model has."""
    from kagglehub.enum import enum_to_str
    from kagglesdk.models.types.model_api_service import ApiGetModelRequest

    with contextlib.suppress(Exception), _models() as models:
        request = ApiGetModelRequest()
        request.owner_slug, request.model_slug = name.owner, name.model
        instances = models.get_model(request).instances
        return [f"{enum_to_str(instance.framework)}/{instance.slug}" for instance in instances]
    return []


@contextlib.contextmanager
def _models() -> Iterator[Any]:
    """Kaggle's interface for models, with the user's credentials."""
    from kagglehub.clients import build_kaggle_client

    with build_kaggle_client() as client:
        yield client.models.model_api_client


def _addressed(request: Any, name: KaggleName) -> Any:
    request.owner_slug, request.model_slug = name.owner, name.model
    request.framework, request.instance_slug = _handle(name).framework_enum(), name.variation
    return request


def _handle(name: KaggleName, version: int | None = None) -> Any:
    from kagglehub.handle import ModelHandle

    return ModelHandle(
        owner=name.owner,
        model=name.model,
        framework=name.framework,
        variation=name.variation,
        version=version or name.version,
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _is_network(error: Exception) -> bool:
    import requests

    return isinstance(error, requests.RequestException) and not isinstance(error, requests.HTTPError)


def _failed(asked: Asked, name: KaggleName, error: Exception) -> UserError:
    from kagglehub.config import get_cache_folder

    if _is_network(error):
        return asked.failed(failures.unreachable("Kaggle", error))
    here = failures.local_trouble(error, folder=get_cache_folder(), variable=_VARIABLE)
    return asked.failed(here or _remote_trouble(name, error))


def _remote_trouble(name: KaggleName, error: Exception) -> Trouble:
    match _status(error):
        case 401 | 403 if _has_no_credentials():
            return Trouble(
                happened="Kaggle gives it to known accounts only, and there are no credentials",
                remedy=f"Accept the licence at {_page(name)}, make a token at {_SETTINGS}, and set KAGGLE_API_TOKEN to "
                "it (or KAGGLE_USERNAME and KAGGLE_KEY).",
            )
        case 401:
            return Trouble(
                happened="Kaggle refuses the credentials",
                remedy=f"Set {_CREDENTIALS} to what {_SETTINGS} gives.",
            )
        case 403:
            return Trouble(
                happened="the account may not have it",
                remedy=f"Accept the licence at {_page(name)} with the account that the credentials are of. If the page "
                f"is not there, mend the name.{failures.nearest(_variation(name), _variations(name))}",
            )
        case 404:
            return _nothing_there(name)
        case None:
            return _without_answer(name, error)
        case status:
            return Trouble(
                happened=f"Kaggle answered with HTTP {status}",
                remedy="Try again later, or give a local path.",
            )


def _nothing_there(name: KaggleName) -> Trouble:
    variations = _variations(name)
    if variations and _variation(name).lower() not in map(str.lower, variations):
        hint = failures.nearest(_variation(name), variations)
        return Trouble(
            happened=f"{name.owner}/{name.model} has no {_variation(name)} on Kaggle",
            remedy=f"Mend the name.{hint}",
        )
    if name.version is not None and variations:
        with contextlib.suppress(Exception):
            newest = _newest_version(name)
            if newest < name.version:
                return Trouble(
                    happened=f"there is no version {name.version}; the newest is {newest}",
                    remedy="Mend the name.",
                )
    what = f"{name.path} in {_variation(name)} of {name.owner}/{name.model}"
    if not variations:
        what = f"{name.owner}/{name.model}"
    return Trouble(happened=f"there is no {what} on Kaggle", remedy=f"Mend the name; see {_page(name)}.")


def _without_answer(name: KaggleName, error: Exception) -> Trouble:
    try:
        _handle(name).framework_enum()
    except ValueError:
        known = [one.partition("/")[0] for one in _variations(name)] or ["jax", "flax", "keras", "pyTorch"]
        return Trouble(
            happened=f"Kaggle knows no framework {name.framework}",
            remedy=f"Mend the name.{failures.nearest(name.framework, known)}",
        )
    return failures.unknown(error)


def _no_such_file(name: KaggleName, version: int, sizes: Mapping[str, int]) -> Trouble:
    return Trouble(
        happened=f"version {version} of {_variation(name)} has no file {name.path}",
        remedy=f"Mend the name.{failures.nearest(name.path, sizes)}",
    )


def _status(error: Exception) -> int | None:
    """Kaggle also says in the body what the status would be."""
    response = getattr(error, "response", None)
    if response is None:
        return None
    if response.status_code < 400:
        with contextlib.suppress(Exception):
            return int(response.json()["code"])
    return response.status_code


def _has_no_credentials() -> bool:
    from kagglehub.config import get_kaggle_credentials

    with contextlib.suppress(Exception):
        return get_kaggle_credentials() is None
    return False


def _variation(name: KaggleName) -> str:
    return f"{name.framework}/{name.variation}"


def _page(name: KaggleName) -> str:
    return f"https://www.kaggle.com/models/{name.owner}/{name.model}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on standard output, where commands print their answers, and a progress bar on terminals alone."""
    import kagglehub.clients

    logger = python_logging.getLogger("kagglehub")
    level, bar = logger.level, kagglehub.clients.tqdm
    logger.setLevel(python_logging.ERROR)
    kagglehub.clients.tqdm = functools.partial(bar, disable=None)  # None: where it is no terminal
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        kagglehub.clients.tqdm = bar


@contextlib.contextmanager
def _patient_requests() -> Iterator[None]:
    """Requests that name no timeout have one: kagglesdk names none, and would wait for a dead network for ever."""
    import requests

    send = requests.Session.send

    @functools.wraps(send)
    def send_with_timeout(session: Any, request: Any, **options: Any) -> Any:
        options.setdefault("timeout", _TIMEOUT)
        return send(session, request, **options)

    requests.Session.send = send_with_timeout
    try:
        yield
    finally:
        requests.Session.send = send
