"""Images small enough for a page that holds its own pixels: as the model sees them, square, as data URIs."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from pgdist.data.images import BadImage, load_image

THUMBNAIL_PIXELS = 224  # of a side, at most
_MOST_CHARACTERS = 200  # of what is wrong with an image
_MOST_PNG_BYTES = 40_000  # above it is a photograph, of which a JPEG is a tenth


def thumbnail(path: str | os.PathLike[str]) -> str:
    """The image as a data URI; raises BadImage.

    A side is never longer than the file's own longer one: enlarging is left to whoever shows it.
    """
    pixels = load_image(path, size=_size(path))
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG", optimize=True)
    if encoded.tell() > _MOST_PNG_BYTES:
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "JPEG", quality=85)
        return _data_uri("jpeg", encoded)
    return _data_uri("png", encoded)


def find_thumbnail(name: str, *, folders: Sequence[Path]) -> tuple[str | None, str]:
    """The `thumbnail` of an image by its path in the first of the folders that has it; or None and why not."""
    if not name:
        return None, "no image is named"
    candidates = [folder / name for folder in folders]
    try:
        return thumbnail(next((path for path in candidates if path.is_file()), candidates[0])), ""
    except (BadImage, OSError, ValueError) as error:  # ValueError: a name that no file system takes
        return None, str(error)[:_MOST_CHARACTERS]


def _size(path: str | os.PathLike[str]) -> int:
    try:
        with Image.open(path) as image:
            return min(THUMBNAIL_PIXELS, max(image.size))
    except Exception:  # whatever is wrong with it, load_image says it better
        return THUMBNAIL_PIXELS


def _data_uri(kind: str, encoded: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}"
