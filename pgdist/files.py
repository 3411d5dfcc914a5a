"""Folders of runs that may be a bucket, gs://bucket/run: their paths, and a local folder that is copied into one.

A bucket is no file system: nothing can be appended or renamed there, and programs that write TensorBoard files or
an npz know local files alone. So what a run writes besides checkpoints goes to a local folder, and a `Mirror`
copies what has changed. Checkpoints go to the bucket by themselves. Needs no JAX.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import functools
import logging as python_logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import fsspec
from absl import logging
from etils import epath

from pgdist.errors import ConfigError

INTERVAL = 30.0  # seconds between two looks for what has changed

_SHARE_OF_TIME = 0.05  # that copying may take: large files are copied less often
_COPIES_AT_ONCE = 8
_BLOCK = 8 * 2**20  # bytes

# Here and not in a function, for whoever opens a bucket first: JAX's compilation cache may. A listing that is
# remembered hides what other processes write, and cuts files that have grown.
fsspec.config.conf["gcs"] = {"use_listings_cache": False, "block_size": 4 * _BLOCK} | fsspec.config.conf.get(
    "gcs", {}
)

_Stamp = tuple[int, int]  # (time of change in ns, size)


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether it is no path of this machine's file systems."""
    return bool(re.match(r"\w+://", os.fspath(path)))


def folder(path: str | os.PathLike[str]) -> epath.Path:
    """The folder of a run, `~` resolved; nothing is looked at yet.

    Raises ConfigError for a URL that is not gs://, or has characters that would be read as more than a name, and
    where the package for gs:// is missing.
    """
    text = os.fspath(path)
    if not is_url(text):
        return epath.Path(os.path.expanduser(text))
    scheme, _, name = text.partition("://")
    if scheme != "gs":
        raise ConfigError(
            f"--workdir={text}: expected a local folder or gs://BUCKET/FOLDER, found {scheme}://. Mount it, or use a "
            "bucket of Google Cloud Storage."
        )
    if not name.strip("/") or re.search(r"[#?*\[\]\x00-\x1f\x7f]", name):
        raise ConfigError(f"--workdir={text}: expected gs://BUCKET/FOLDER, without any of # ? * [ ] in it.")
    prepare_buckets(f"--workdir={text}")
    return epath.Path(text.rstrip("/"))


@contextlib.contextmanager
def blaming(path: epath.Path) -> Iterator[None]:
    """What goes wrong with a bucket, with advice."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # of gcsfs, aiohttp, google.auth: no common type
        found = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"--workdir={path}: cannot be read and written ({type(error).__name__}: {found[:500]}). Does the bucket "
            "exist, and may this host use it? It needs the role Storage Object User, by its service account or by "
            "`gcloud auth application-default login`, and a way to storage.googleapis.com."
        ) from error


def names_in(path: str | os.PathLike[str]) -> list[str]:
    """What is in a folder, local or in a bucket, sorted; nothing where there is none."""
    if is_url(path):
        prepare_buckets(os.fspath(path))
        return sorted(_names_in(epath.Path(path)))
    found = os.path.expanduser(path)
    return sorted(os.listdir(found)) if os.path.isdir(found) else []


def write_text(path: epath.Path, text: str) -> None:
    """Replaces the file as a whole: nobody ever reads half of it."""
    if is_url(path):
        path.write_text(text)  # an object appears when it is whole
        return
    replacement = path.parent / f".{path.name}.{os.getpid()}.tmp"
    replacement.write_text(text)
    os.replace(replacement, path)


def create_text(path: epath.Path, text: str) -> bool:
    """Writes a file that is not there yet; False where it is. Of several who try at once one succeeds."""
    try:
        if is_url(path):
            bucket = fsspec.filesystem("gcs")
            bucket.pipe_file(os.fspath(path), text.encode(), mode="create")
        else:
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
    except FileExistsError:
        return False
    return True


class LocalFolder:
    """A folder that needs no copying; takes the calls that a `Mirror` takes."""

    def __init__(self, path: Path) -> None:
        self.local = path

    def fetch(self, *, skip: Collection[str] = ()) -> None:
        """See `Mirror`; what is here is here."""

    def fetch_file(self, name: str) -> None:
        """See `Mirror`."""

    def start(self) -> None:
        """See `Mirror`."""

    def flush(self) -> None:
        """See `Mirror`."""

    def close(self) -> None:
        """See `Mirror`."""


class Mirror:
    """A local folder whose files are copied to a remote one as they change, and vanish there when they do here.

    One process writes a remote file; several may mirror different files to one folder. Names that begin with a
    dot or end in .tmp or .partial are not copied: they are being written.
    """

    def __init__(self, remote: epath.Path, *, interval: float = INTERVAL) -> None:
        self.remote = remote
        self.local = Path(tempfile.mkdtemp(prefix=f"pgdist_{re.sub(r'[^-.a-zA-Z0-9]+', '_', remote.name)}_"))
        self._interval = interval
        self._copied: dict[str, _Stamp] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        # Not when nobody refers to the mirror any more: somebody may read a file that it has fetched.
        self._remove_local = functools.partial(shutil.rmtree, self.local, ignore_errors=True)
        atexit.register(self._remove_local)

    def fetch(self, *, skip: Collection[str] = ()) -> None:
        """Copies what is in the remote folder here; ConfigError where that fails.  skip: names in it to leave."""
        with blaming(self.remote):
            names = [name for name in _names_in(self.remote) if name not in skip]
            files = [file for name in names for file in _files_below(self.remote / name, name)]
            with concurrent.futures.ThreadPoolExecutor(_COPIES_AT_ONCE) as pool:
                list(pool.map(self._fetch, files))

    def fetch_file(self, name: str) -> None:
        """Copies one file here unless there is one already; ConfigError where that fails."""
        with blaming(self.remote):
            if not (self.local / name).exists() and (self.remote / name).exists():
                self._fetch(name)

    def start(self) -> None:
        """Copies in the background from now on."""
        self._thread = threading.Thread(target=self._run, daemon=True, name="mirror")
        self._thread.start()

    def flush(self) -> None:
        """Returns when all that has changed is copied; ConfigError where that fails."""
        with self._lock, blaming(self.remote):
            found = {name: _stamp(path) for name, path in self._files().items()}
            changed = [name for name, stamp in found.items() if stamp and self._copied.get(name) != stamp]
            with concurrent.futures.ThreadPoolExecutor(_COPIES_AT_ONCE) as pool:
                # The stamp is of before: what changes while it is copied is copied again.
                for name, _ in zip(changed, pool.map(self._copy, changed), strict=True):
                    self._copied[name] = found[name]
            for name in self._copied.keys() - found.keys():
                (self.remote / name).unlink(missing_ok=True)
                del self._copied[name]

    def close(self) -> None:
        """`flush`, then removes the local folder; keeps it, and says so, where not all could be copied."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self.flush()
        except ConfigError as error:
            atexit.unregister(self._remove_local)
            raise ConfigError(f"{error} What could not be copied lies in {self.local}.") from error
        self._remove_local()

    def _run(self) -> None:
        pause, complained = self._interval, ""
        while not self._end.wait(pause):
            started = time.monotonic()
            try:
                self.flush()
                complained = ""
            except ConfigError as error:
                if str(error) != complained:
                    logging.warning("%s It is tried again.", error)
                complained = str(error)
            pause = max(self._interval, (time.monotonic() - started) / _SHARE_OF_TIME)

    def _files(self) -> dict[str, Path]:
        paths = (path for path in self.local.rglob("*") if path.is_file() and not _is_unfinished(path.name))
        return {path.relative_to(self.local).as_posix(): path for path in paths}

    def _fetch(self, name: str) -> None:
        target = self.local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        with (self.remote / name).open("rb") as source, partial.open("wb") as file:
            shutil.copyfileobj(source, file, _BLOCK)
        os.replace(partial, target)
        self._copied[name] = _stamp(target)

    def _copy(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), (self.local / name).open("rb") as source:
            if not is_url(self.remote):  # buckets have no folders
                (self.remote / name).parent.mkdir(parents=True, exist_ok=True)
            with (self.remote / name).open("wb") as file:
                shutil.copyfileobj(source, file, _BLOCK)


def open_folder(path: str | os.PathLike[str]) -> LocalFolder | Mirror:
    """A folder to write into with a local path; for a URL one that is copied there."""
    found = folder(path)
    return Mirror(found) if is_url(found) else LocalFolder(Path(found))


@functools.cache
def prepare_buckets(wanted: str) -> None:
    """To be called before the first use of gs://; ConfigError, of what was `wanted`, where the package is missing."""
    try:
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{wanted}: gs:// needs a package that is not installed ({error}): pip install 'pgdist[gcs]'."
        ) from error
    # etils would take TensorFlow where it happens to be installed.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # It logs a traceback for each of its attempts; what fails at last is raised as well.
    python_logging.getLogger("gcsfs").setLevel(python_logging.CRITICAL)


def _names_in(path: epath.Path) -> list[str]:
    try:
        # A folder's own marker is listed, too.
        return [child.name for child in path.iterdir() if child != path]
    except FileNotFoundError:
        return []


def _files_below(path: epath.Path, name: str) -> Iterator[str]:
    """The file itself, or those in the folder, named relative to the folder that `name` is in."""
    if not path.is_dir():
        yield name
        return
    for child in _names_in(path):
        yield from _files_below(path / child, f"{name}/{child}")


def _stamp(path: Path) -> _Stamp | None:
    """None for a file that has gone."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size


def _is_unfinished(name: str) -> bool:
    return name.startswith(".") or name.endswith((".tmp", ".partial"))
