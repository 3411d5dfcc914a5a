"""Image files with one prompt for all of them, as a source of examples: those who only ask have no JSONL."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence

from pgdist.data.jsonl import Record
from pgdist.errors import DataError

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif")  # of `pgdist.data.images.FORMATS`


def find_images(names: Sequence[str]) -> list[str]:
    """The files that are meant: a folder stands for the images in it and in its folders, sorted by name.

    Raises DataError for a name that is not there, and for a folder without images.
    """
    if missing := [name for name in names if not os.path.exists(name)]:
        raise DataError(f"--images: no such file: {', '.join(missing)}")
    return [path for name in names for path in (_images_in(name) if os.path.isdir(name) else [name])]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSource:
    """Example `i` is image `i`, of which nothing has been read yet; see `pgdist.data.loader.Source`."""

    images: tuple[str, ...]
    prompt: str
    path: str = "--images"  # what messages call it
    root: str = "."  # what the names of images are relative to

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        image = self.images[index]
        return Record(
            image=image,
            image_name=image,
            prefix=self.prompt,
            suffix=None,
            suffixes=(),
            extra={},
            file=self.path,
            line=0,
        )

    def prefix_of(self, index: int) -> str:
        """See `pgdist.data.loader.Source`."""
        return self.prompt

    @property
    def sha256(self) -> str:
        """Of names and sizes: reading all of the images takes long."""
        listed = [(image, os.path.getsize(image)) for image in self.images]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _images_in(folder: str) -> list[str]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [os.path.join(parent, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.lower().endswith(_ENDINGS) and os.path.isfile(path)]
    if not found:
        raise DataError(f"--images={folder}: no image in this folder: expected {', '.join(_ENDINGS)} files")
    return sorted(found)
