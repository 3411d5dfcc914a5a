"""Image files to square RGB arrays, exact to the closed-form triangle filter.

Pillow decodes and filters. Every channel is resized in float32 (Pillow's mode F) and rounded once: its 8-bit
filter rounds twice and is off by up to a whole level, JPEG's `draft` and `reducing_gap` by far more. An
image's declared size is looked at before a pixel is decoded, so a small file cannot ask for gigabytes.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

import numpy as np

# Importing a plugin registers its format, which Image.open(formats=...) does not do for all of these. MPO is
# the JPEG of many phones; JPEG's plugin hands it on.
from PIL import GifImagePlugin, Image, JpegImagePlugin, MpoImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401

from pgdist.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")

# 8192 x 8192 pixels: above any photograph or scanned page, and 256 MiB when decoded to RGB.
MAX_PIXELS = 2**26

# EXIF tag 0x0112, orientation: what turns the stored image upright (EXIF 2.32, section 4.6.4).
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(DataError):
    """An image that cannot be used; `reason` says why in a few words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def load_image(path_or_bytes: str | os.PathLike[str] | bytes, *, size: int) -> np.ndarray:
    """Reads an image and resizes it to uint8[size, size, 3], RGB.

    JPEG (RGB, grey, CMYK), PNG (grey, 16-bit grey, palette, alpha), WebP and a GIF's first frame. EXIF
    rotation is applied, grey is stacked to three channels, alpha is dropped (the colours under it stay),
    16-bit grey is scaled by 1/257. The aspect ratio is not kept. Resizing is bilinear with antialiasing and
    at most 0.5/255 (one rounding) from the closed form. Raises BadImage. Safe to call from several threads.
    """
    if isinstance(path_or_bytes, bytes):
        return _decode(io.BytesIO(path_or_bytes), byte_count=len(path_or_bytes), size=size)
    path = Path(path_or_bytes)
    try:
        status = path.stat()
        # Opening a pipe or a device could wait for ever.
        if stat.S_ISDIR(status.st_mode):
            raise BadImage("a directory, not an image file")
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("not a regular file")
        with path.open("rb") as file:
            return _decode(file, byte_count=status.st_size, size=size)
    except FileNotFoundError as error:
        raise BadImage("no such file") from error
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from error


def _decode(file: io.IOBase, *, byte_count: int, size: int) -> np.ndarray:
    if byte_count == 0:
        raise BadImage("the file is empty")
    try:
        with Image.open(file, formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise BadImage(_too_large(f"{image.width} x {image.height} pixels"))
            orientation = _orientation(image)
            image.load()
            resized = _resize(image, size=size)
    except (BadImage, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImage("not a JPEG, PNG, WebP or GIF image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(_too_large("more pixels than Pillow opens")) from error
    # Pillow's decoders raise whatever a broken file makes them raise: OSError, SyntaxError, struct.error,
    # ValueError ...
    except Exception as error:
        raise BadImage(f"cannot be decoded, truncated or damaged: {error}") from error
    # Turning the small square is the same as turning the large original: the filter is separable and
    # symmetric.
    turn = _UPRIGHT.get(orientation)
    return resized if turn is None else np.asarray(Image.fromarray(resized).transpose(turn))


def _too_large(found: str) -> str:
    return f"too large: {found}, at most {MAX_PIXELS:,} pixels are decoded"


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    # Damaged EXIF does not make a sound picture unusable.
    except Exception:
        return 1


def _resize(image: Image.Image, *, size: int) -> np.ndarray:
    """Filters each channel in float32 and rounds once: uint8[size, size, 3]."""
    channels = [
        np.asarray(channel.resize((size, size), Image.Resampling.BILINEAR))
        for channel in _float_channels(image)
    ]
    rounded = [np.clip(np.rint(channel), 0, 255).astype(np.uint8) for channel in channels]
    return np.stack(rounded * 3 if len(rounded) == 1 else rounded, axis=-1)


def _float_channels(image: Image.Image):
    """The channels in mode F on the scale 0 to 255, one at a time: one for grey, else red, green, blue."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion to 8 bits clips instead of scaling
        yield Image.fromarray(np.asarray(image, np.float32) / 257)
    elif image.mode in ("1", "L", "LA", "La"):
        yield image.convert("L").convert("F")
    else:
        image.info.pop(
            "transparency", None
        )  # a palette's alpha, which Pillow would warn about before dropping it
        for channel in image.convert("RGB").split():
            yield channel.convert("F")
