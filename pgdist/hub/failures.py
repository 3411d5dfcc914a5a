"""What goes wrong when something is fetched, said as: what was asked for, what happened, what to do.

The libraries raise many types, with URLs and headers in their messages. Here are the causes that all of them share;
what only one of them knows is beside its calls.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches

from pgdist.errors import UserError

# EFBIG: a limit on file sizes (ulimit -f), which some clusters set.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "KAGGLE_API_TOKEN", "KAGGLE_KEY")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What somebody wants: the name as it was written, where, and the type of what is raised if it cannot be had."""

    name: str
    field: str
    error: type[UserError]

    def failure(self, text: str) -> UserError:
        """The error to raise."""
        return self.error(f"{self.field}={self.name}: {text}")

    def failed(self, trouble: Trouble) -> UserError:
        """The error to raise."""
        return self.failure(f"{trouble.happened}. {trouble.remedy}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trouble:
    """happened: a sentence without its full stop.  remedy: sentences."""

    happened: str
    remedy: str


def package_missing(asked: Asked, *, extra: str, error: ImportError) -> UserError:
    """For a library that is not installed; extra: of pgdist, which brings it."""
    return asked.failure(
        f"this needs a package that is not installed ({error}): pip install 'pgdist[{extra}]'."
    )


def damaged(where: str) -> Trouble:
    """For bytes that are not those that were published."""
    return Trouble(
        happened=f"{where} came damaged, twice: its checksum is not the published one",
        remedy="It was removed. Start again, or give a local path; a proxy on the way may change what it passes on.",
    )


def unreachable(host: str, error: BaseException) -> Trouble:
    """For a network that does not lead there."""
    return Trouble(
        happened=f"{host} cannot be reached from this host, and there is no complete copy in its cache "
        f"({_described(error)})",
        remedy="If this host has no way out, download it elsewhere and give the local path; or try again later.",
    )


def local_trouble(error: BaseException, *, folder: str | os.PathLike[str], variable: str) -> Trouble | None:
    """What this machine's disk did; None for another cause.  variable: the one that says where the cache is."""
    for cause in _causes(error):
        number = getattr(cause, "errno", None)
        full = number in _NO_SPACE or "No space left on device" in str(cause)
        if full:
            return no_space(folder=folder, variable=variable, found=str(os.strerror(number or errno.ENOSPC)))
        if isinstance(cause, OSError) and number in _NO_ACCESS:
            return Trouble(
                happened=f"the cache {folder} cannot be written ({os.strerror(number)})",
                remedy=f"Set {variable} to a folder that can.",
            )
    return None


def no_space(*, folder: str | os.PathLike[str], variable: str, found: str) -> Trouble:
    """For a disk that is full, or will be."""
    return Trouble(
        happened=f"no space left for it in {folder} ({found})",
        remedy=f"Make room there, or set {variable} to a folder on a larger disk.",
    )


def unknown(error: BaseException) -> Trouble:
    """For what nobody foresaw."""
    return Trouble(
        happened=f"it cannot be fetched ({_described(error)})", remedy="Try again, or give a local path."
    )


def nearest(name: str, candidates: Iterable[str]) -> str:
    """ " There are: X, Y." with the likeliest of the candidates, or "" where there are none."""
    known = sorted(set(candidates))
    close = get_close_matches(name, known, n=3, cutoff=0.4) or known[:8]
    more = ", ..." if len(known) > len(close) else ""
    return f" There {'is' if len(known) == 1 else 'are'}: {', '.join(close)}{more}." if close else ""


def _described(error: BaseException) -> str:
    """On one line, with neither a token nor a signed URL in it."""
    text = " ".join(str(error).split()) or ("no answer in time" if isinstance(error, TimeoutError) else "")
    text = re.sub(r"\?[\w.%-]+=[^\s'\")]*", "?...", text)
    for secret in filter(None, map(os.environ.get, _SECRETS)):
        text = text.replace(secret, "***")
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        yield current
        seen.append(current)
        current = current.__cause__ or current.__context__
