"""What the data tests expect of pictures, independent of Pillow."""

from __future__ import annotations

import numpy as np


def colour(i: int) -> tuple[int, int, int]:
    """The colour that fills the image of example i."""
    return i % 256, 2 * i % 256, 255 - i % 256


def triangle_resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """The closed form in float64: [H, W, C] to [size, size, C].

    Output i lies at c = (i + 1/2) * n / size of n input pixels, whose centres are at x + 1/2; its weights are
    max(0, 1 - |x + 1/2 - c| / s), s = max(1, n / size), normalised over the pixels that exist.
    """

    def weights(n: int) -> np.ndarray:
        scale = n / size
        centres = (np.arange(size) + 0.5) * scale
        distance = np.abs(np.arange(n) + 0.5 - centres[:, None])
        triangle = np.maximum(0, 1 - distance / max(1, scale))
        return triangle / triangle.sum(axis=1, keepdims=True)

    height, width, _ = pixels.shape
    return np.einsum(
        "yh,xw,hwc->yxc", weights(height), weights(width), pixels.astype(np.float64), optimize=True
    )
