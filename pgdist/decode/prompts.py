"""Images and prompts given in Python, as the padded global batches that a decoder takes."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from PIL import Image, ImageOps

from pgdist.data.images import BadImage, load_image
from pgdist.data.text import EncodedText, encode_example, prompt_bucket
from pgdist.data.tokenizer import Tokenizer
from pgdist.decode.decoder import Decoder
from pgdist.errors import DataError
from pgdist.mesh import batch_sharding, host_rows

ImageInput = str | os.PathLike | bytes | Image.Image | np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """See `pgdist.decode.decoder.Batch`."""

    arrays: Mapping[str, np.ndarray]


def prompt_batches(
    decoder: Decoder,
    images: Sequence[ImageInput],
    prompts: str | Sequence[str],
    *,
    tokenizer: Tokenizer,
    max_tokens: int,
) -> Iterator[PromptBatch]:
    """This process's rows of each global batch; the last is filled up with rows of weight 0 and index -1.

    images: their places in the list are the examples' ids.  prompts: one for all images, or one for each.
    Raises DataError, at once, for a prompt longer than max_tokens, a number of prompts that does not fit, and one
    image that is in no list; for an image that cannot be read, when its turn comes.
    """
    if isinstance(images, str | os.PathLike | bytes | Image.Image):
        raise DataError(f"images: expected a list of images, found one, a {type(images).__name__}.")
    if isinstance(prompts, str):
        prompts = [prompts] * len(images)
    if len(prompts) != len(images):
        raise DataError(
            f"{len(images)} images but {len(prompts)} prompts: give one prompt, or one for each image."
        )
    texts = _encode_prompts(tokenizer, prompts, max_tokens=max_tokens)
    size = decoder.model.config.image.image_size
    if jax.process_count() > 1:
        # An image that cannot be read must stop all processes, not only the one that decodes it.
        for number, image in enumerate(images):
            _read_image(image, size=size, number=number)
    return _batches(
        images,
        texts,
        image_size=size,
        batch_size=decoder.batch_size,
        rows=host_rows(batch_sharding(decoder.mesh), decoder.batch_size),
    )


def _encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[str], *, max_tokens: int
) -> dict[str, np.ndarray]:
    """text, mask_ar, mask_input int32[n, P]; P is the longest prompt's length, rounded up to a bucket."""
    encoded: list[EncodedText] = []
    for number, prompt in enumerate(prompts):
        text = encode_example(tokenizer, prefix=prompt, suffix=None, length=max_tokens)
        if text.truncated:
            shown = f"{prompt[:80]!r}{'...' if len(prompt) > 80 else ''}"
            raise DataError(
                f"Prompt {number} ({shown}) is longer than {max_tokens} tokens with its start and separator: "
                "shorten it, or raise max_prompt_tokens."
            )
        encoded.append(text)
    longest = max((int(text.mask_input.sum()) for text in encoded), default=1)
    length = prompt_bucket(longest, limit=max_tokens)
    rows = {name: [getattr(text, name) for text in encoded] for name in ("text", "mask_ar", "mask_input")}
    return {name: np.array(row, np.int32).reshape(-1, max_tokens)[:, :length] for name, row in rows.items()}


def _batches(
    images: Sequence, texts: Mapping[str, np.ndarray], *, image_size: int, batch_size: int, rows: np.ndarray
) -> Iterator[PromptBatch]:
    """This process's rows of each global batch; the last is filled up with rows of weight 0 and index -1."""
    for start in range(0, len(images), batch_size):
        index = np.where(start + rows < len(images), start + rows, -1)
        real = index >= 0
        image = np.zeros((len(rows), image_size, image_size, 3), np.uint8)
        for row in np.flatnonzero(real):
            image[row] = _read_image(images[index[row]], size=image_size, number=int(index[row]))
        arrays = {
            "image": image,
            # Index -1 repeats the last prompt in the filling rows: any would do, nobody reads their answers.
            **{name: array[index] for name, array in texts.items()},
            "weight": real.astype(np.float32),
            "index": index,
        }
        yield PromptBatch(arrays=arrays)


def _read_image(image: object, *, size: int, number: int) -> np.ndarray:
    """uint8[size, size, 3]; DataError with the image's place in the list, and its path if it has one."""
    try:
        return load_image(_as_file(image), size=size)
    except BadImage as error:
        name = f" ({os.fspath(image)})" if isinstance(image, str | os.PathLike) else ""
        raise DataError(f"Image {number}{name}: {error.reason}.") from error


def _as_file(image: object) -> str | os.PathLike | bytes:
    """The image as a path or encoded bytes; pixels become a PNG, so that all go through the same resize."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise BadImage(f"expected an array uint8[H, W, 3], found {image.dtype}{list(image.shape)}")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        if not isinstance(image, str | os.PathLike | bytes):
            found = type(image).__name__
            raise BadImage(f"expected a path, bytes, a PIL image or a uint8 array, found {found}")
        return image
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("CMYK", "YCbCr", "LAB", "HSV", "F"):  # PNG has no such modes
        upright = upright.convert("RGB")
    file = io.BytesIO()
    upright.save(file, format="PNG", compress_level=0)
    return file.getvalue()
