"""Objects of Google Cloud Storage as local files: one, or a JSONL with the images that it names.

An object is fetched when its file is not there or is not the one that was checked against the checksum that the
bucket tells now; what was fetched before is left alone, so that going on after an interruption costs a listing. A
file appears when it is whole. A bucket that is public needs no credentials.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging as python_logging
import os
import posixpath
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import fsspec.asyn
from absl import logging

from pgdist import files  # noqa: F401  sets how fsspec opens buckets
from pgdist.errors import UserError
from pgdist.hub import cache, failures
from pgdist.hub.failures import Asked, Trouble
from pgdist.hub.names import BucketName

_READ = "https://www.googleapis.com/auth/devstorage.read_only"
_AT_ONCE = 16  # an image is small, and asking for it takes longer than sending it
_REPORT_EVERY = 30.0  # seconds
_FIRST_ANSWER = 15.0  # seconds until the first answer must have come
_HOST = "storage.googleapis.com"

_Info = Mapping[str, Any]  # what gcsfs says of an object


class _DamagedError(Exception):
    """What came is not what the bucket says it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Found:
    """An object, and the access by which it was found; None where the network is down."""

    bucket: Any  # gcsfs.core.GCSFileSystem
    info: _Info


def fetch_file(asked: Asked, name: BucketName) -> Path:
    """The local copy of the object."""
    _require_library(asked)
    with cache.lock(f"gs://{name.bucket}"):
        _fetch_named(asked, name)
    return cache.of_object(name.bucket, name.path)


def fetch_examples(asked: Asked, name: BucketName) -> Path:
    """The local copy of a JSONL, with those of the images that it names and the bucket has."""
    _require_library(asked)
    with cache.lock(f"gs://{name.bucket}"):
        found = _fetch_named(asked, name)
        path = cache.of_object(name.bucket, name.path)
        if found is None:
            if not cache.is_marked(path, _WITH_IMAGES):
                raise asked.failure(
                    f"{_HOST} cannot be reached from this host, and not all images are in the cache {path.parent}. "
                    "Try again, or give a local path."
                )
            return path
        try:
            _fetch_images(asked, name, found.bucket, _images_named(path))
        except Exception as error:
            raise _failed(asked, name, error) from error
        cache.mark(path, _WITH_IMAGES)
    return path


_WITH_IMAGES = "all of its images"


def _fetch_named(asked: Asked, name: BucketName) -> _Found | None:
    """None where the network is down and the object is in the cache already."""
    target = cache.of_object(name.bucket, name.path)
    try:
        found = _find(name)
        if not _is_here(target, found.info):
            size = found.info["size"]
            cache.check_space(asked, size, where=target.parent, variable=cache.VARIABLE)
            logging.info("%s: fetching %s into %s", asked.name, cache.size_text(size), target)
            _fetch(found.bucket, found.info, target)
        return found
    except UserError:
        raise
    except Exception as error:  # of gcsfs, aiohttp, google.auth: no common type
        if _is_network(error) and target.is_file():
            logging.warning("%s: %s cannot be reached; using the copy in %s.", asked.name, _HOST, target)
            return None
        raise _failed(asked, name, error) from error


def _find(name: BucketName) -> _Found:
    """With the host's credentials where it has any; without, where these are refused and nobody's are enough."""
    refusal: Exception | None = None
    for options in _ways_in():
        bucket = _open(options)
        try:
            # gcsfs by itself goes on trying for half a minute where nobody answers.
            path = f"{name.bucket}/{name.path}"
            info = fsspec.asyn.sync(bucket.loop, bucket._info, path, timeout=_FIRST_ANSWER)
        except Exception as error:
            if not _is_refusal(error):
                raise
            refusal = refusal or error
            continue
        if info["type"] != "file":
            raise FileNotFoundError(name.path)
        return _Found(bucket=bucket, info=info)
    raise refusal


def _open(options: Mapping[str, Any]) -> Any:
    """Over HTTPS alone: gcsfs's other class asks for each bucket's kind by gRPC, long where a firewall drops that."""
    from gcsfs.core import GCSFileSystem

    return GCSFileSystem(**options)


def _ways_in() -> Iterator[dict[str, Any]]:
    """gcsfs finds credentials by itself, but takes half a minute to find that there are none."""
    import google.auth

    if "token" in fsspec.config.conf["gcs"]:
        yield {}
        return
    if not os.environ.get("STORAGE_EMULATOR_HOST"):
        with contextlib.suppress(google.auth.exceptions.GoogleAuthError):
            credentials, _ = google.auth.default(scopes=[_READ])
            yield {"token": credentials}
    yield {"token": "anon"}


def _images_named(path: Path) -> list[str]:
    """Paths relative to the JSONL's folder, each once, and none that leaves it; broken lines name none."""
    found: dict[str, None] = {}
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line.decode("utf-8-sig"))
                value = record.get("image") if isinstance(record, dict) else None
                for image in value if isinstance(value, list) else [value]:
                    if isinstance(image, str) and _stays_inside(image):
                        found[posixpath.normpath(image)] = None
    return list(found)


def _stays_inside(image: str) -> bool:
    path = posixpath.normpath(image)
    return (
        bool(image)
        and path != "."
        and not path.startswith(("/", "../"))
        and path != ".."
        and "\0" not in path
    )


def _fetch_images(asked: Asked, name: BucketName, bucket: Any, images: Collection[str]) -> None:
    folder, local_folder = posixpath.dirname(name.path), cache.of_object(name.bucket, name.path).parent
    paths = {posixpath.join(name.bucket, folder, image): local_folder / image for image in images}
    infos = _infos(bucket, paths)
    for path in paths.keys() - infos.keys():
        with contextlib.suppress(OSError):
            paths[path].unlink()  # gone from the bucket: every host shall see the same
    wanted = {path: info for path, info in infos.items() if not _is_here(paths[path], info)}
    if len(infos) < len(paths):
        logging.warning("%s: %d of %d images are not there.", asked.name, len(paths) - len(infos), len(paths))
    if wanted:
        needed = sum(info["size"] for info in wanted.values())
        cache.check_space(asked, needed, where=local_folder, variable=cache.VARIABLE)
        logging.info(
            "%s: fetching %d images, %s, into %s",
            asked.name,
            len(wanted),
            cache.size_text(needed),
            local_folder,
        )
        _fetch_all(asked, bucket, wanted, paths)


def _fetch_all(asked: Asked, bucket: Any, wanted: Mapping[str, _Info], paths: Mapping[str, Path]) -> None:
    reported = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        running = [pool.submit(_fetch_image, bucket, info, paths[path]) for path, info in wanted.items()]
        try:
            for count, done in enumerate(concurrent.futures.as_completed(running), start=1):
                done.result()
                if time.monotonic() - reported > _REPORT_EVERY:
                    reported = time.monotonic()
                    logging.info("%s: %d of %d images", asked.name, count, len(running))
        finally:
            pool.shutdown(cancel_futures=True)


def _fetch_image(bucket: Any, info: _Info, target: Path) -> None:
    # Between the listing and now, or a name that is a file in the bucket and a folder, too: missing, to the reader.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError):
        _fetch(bucket, info, target)


def _infos(bucket: Any, paths: Iterable[str]) -> dict[str, _Info]:
    """{path: info} of those that are there; by listing their folders, for one request tells of thousands."""
    wanted = set(paths)
    found: dict[str, _Info] = {}
    for folder in sorted({posixpath.dirname(path) for path in wanted}):
        here = {path for path in wanted if posixpath.dirname(path) == folder}
        try:
            listing = bucket.ls(folder, detail=True)
        except FileNotFoundError:
            continue
        except Exception as error:
            if not _is_refusal(error):
                raise
            listing = _infos_one_by_one(bucket, here)  # a public bucket may show objects and no listing
        found |= {info["name"]: info for info in listing if info["name"] in here and info["type"] == "file"}
    return found


def _infos_one_by_one(bucket: Any, paths: Iterable[str]) -> list[_Info]:
    def info_of(path: str) -> list[_Info]:
        try:
            return [bucket.info(path)]
        except Exception as error:
            if isinstance(error, FileNotFoundError) or _is_refusal(error):
                return []
            raise

    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        return [info for found in pool.map(info_of, paths) for info in found]


def _fetch(bucket: Any, info: _Info, target: Path) -> None:
    """Copies one object; _DamagedError where twice in a row something else came than the bucket has."""
    for attempt in range(2):
        target.parent.mkdir(parents=True, exist_ok=True)
        # A name that fits in any file system, and the same next time: what an interruption leaves is written over.
        partial = target.with_name(f".{hashlib.sha256(target.name.encode()).hexdigest()[:16]}.partial")
        try:
            bucket.get_file(info["name"], os.fspath(partial))
            checksum = _checksum(info)
            if partial.stat().st_size == info["size"] and cache.has_checksum(partial, checksum):
                os.replace(partial, target)
                cache.mark(target, checksum)
                return
        finally:
            partial.unlink(missing_ok=True)
        if attempt == 0:
            info = bucket.info(info["name"])  # it may have been replaced
    raise _DamagedError(info["name"])


def _is_here(target: Path, info: _Info) -> bool:
    return cache.is_marked(target, _checksum(info))


def _checksum(info: _Info) -> str:
    """MD5; CRC32C of objects that were put together from parts; else what tells one content from the next."""
    if info.get("md5Hash"):
        return f"md5:{info['md5Hash']}"
    if info.get("crc32c") and _has_crc32c():
        return f"crc32c:{info['crc32c']}"
    return f"generation:{info.get('generation')} {info.get('etag')}"


def _has_crc32c() -> bool:
    with contextlib.suppress(ImportError):
        import google_crc32c  # noqa: F401

        return True
    return False


def _require_library(asked: Asked) -> None:
    try:
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise failures.package_missing(asked, extra="gcs", error=error) from error
    # It logs a traceback for each of its attempts; what fails at last is raised as well.
    python_logging.getLogger("gcsfs").setLevel(python_logging.CRITICAL)


def _is_refusal(error: Exception) -> bool:
    """For want of permission, or of good credentials."""
    import gcsfs.retry
    import google.auth.exceptions

    if isinstance(error, gcsfs.retry.HttpError):
        return str(error.code) in ("401", "403")
    if isinstance(error, google.auth.exceptions.TransportError):
        return False
    return isinstance(error, google.auth.exceptions.GoogleAuthError) or str(error).startswith("Forbidden")


def _is_network(error: Exception) -> bool:
    import aiohttp
    import google.auth.exceptions
    import requests

    kinds = (
        aiohttp.ClientError,
        requests.RequestException,
        google.auth.exceptions.TransportError,
        TimeoutError,
    )
    return isinstance(error, kinds)


def _failed(asked: Asked, name: BucketName, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    if isinstance(error, FileNotFoundError):
        return asked.failed(_nothing_there(name))
    if isinstance(error, _DamagedError):
        return asked.failed(failures.damaged(str(error)))
    if _is_refusal(error):
        return asked.failed(
            Trouble(
                happened=f"this host may not read it: {' '.join(str(error).split())[:300]}",
                remedy="It needs the role Storage Object Viewer, by its service account or by `gcloud auth "
                "application-default login`; a name that is not there looks the same to those who may not list.",
            )
        )
    if _is_network(error):
        return asked.failed(failures.unreachable(_HOST, error))
    return asked.failed(
        failures.local_trouble(error, folder=cache.folder(), variable=cache.VARIABLE)
        or failures.unknown(error)
    )


def _nothing_there(name: BucketName) -> Trouble:
    folder, known = posixpath.join(name.bucket, posixpath.dirname(name.path)), []
    with contextlib.suppress(Exception):
        for options in _ways_in():
            listing = _open(options).ls(folder, detail=True)
            known = [posixpath.basename(info["name"]) for info in listing if info["type"] == "file"]
            break
    hint = failures.nearest(posixpath.basename(name.path), known)
    return Trouble(happened=f"gs://{name.bucket} has no object {name.path}", remedy=f"Mend the name.{hint}")
