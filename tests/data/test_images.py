"""Images against an independent closed form, in every format, and files that are none."""

from __future__ import annotations

import concurrent.futures
import io
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, features

from pgdist.data.images import MAX_PIXELS, BadImage, load_image
from tests.data.pictures import triangle_resize

# One rounding to a level, and float32 arithmetic on values up to 255.
TOLERANCE = 0.5 + 1e-3


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def noise(height: int, width: int, channels: int = 3, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """Another gradient in every channel, so that a turned or swapped picture is another one."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / width, 255 * y / height, 255 * (x + 2 * y) / (width + 2 * height)], -1).astype(
        np.uint8
    )


def worst(found: np.ndarray, pixels: np.ndarray) -> float:
    return float(np.abs(found - triangle_resize(pixels, found.shape[0])).max())


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (480, 640, 224),
        (640, 480, 448),
        (37, 53, 224),
        (300, 100, 224),
        (1, 1, 56),
        (2, 1000, 64),
        (1000, 3, 56),
        (224, 224, 224),
        (225, 223, 224),
    ],
)
def test_resize_is_the_closed_form_up_to_one_rounding(height, width, size):
    pixels = noise(height, width, seed=height)
    found = load_image(encode(Image.fromarray(pixels), "PNG"), size=size)
    assert found.shape == (size, size, 3) and found.dtype == np.uint8
    assert worst(found, pixels) <= TOLERANCE


def test_an_image_of_the_right_size_is_unchanged():
    pixels = noise(64, 64)
    np.testing.assert_array_equal(load_image(encode(Image.fromarray(pixels), "PNG"), size=64), pixels)


def test_checkerboard_that_an_unfiltered_resize_would_alias_becomes_grey():
    board = np.indices((512, 512)).sum(axis=0) % 2 * 255
    found = load_image(encode(Image.fromarray(board.astype(np.uint8)), "PNG"), size=64)
    assert np.abs(found.astype(float) - 127.5).max() <= 1.5


def test_jpeg_is_decoded_at_full_size_before_it_is_resized():
    content = encode(Image.fromarray(noise(800, 600)), "JPEG", quality=90)
    decoded = np.asarray(Image.open(io.BytesIO(content)))
    assert worst(load_image(content, size=56), decoded) <= TOLERANCE


def test_grey_is_stacked_to_three_channels():
    pixels = noise(40, 30, 1)
    for format in ("PNG", "JPEG"):
        content = encode(Image.fromarray(pixels[..., 0]), format)
        decoded = np.asarray(Image.open(io.BytesIO(content)))[..., None]
        found = load_image(content, size=56)
        assert worst(found[..., :1], decoded) <= TOLERANCE
        assert (found == found[..., :1]).all()


def test_16_bit_grey_is_scaled_by_257():
    pixels = np.random.default_rng(0).integers(0, 2**16, (60, 80), dtype=np.uint16)
    content = encode(Image.fromarray(pixels), "PNG")
    assert Image.open(io.BytesIO(content)).mode.startswith("I")
    assert worst(load_image(content, size=56)[..., :1], pixels[..., None] / 257) <= TOLERANCE


def test_16_bit_grey_keeps_black_and_white():
    for value, level in ((0, 0), (65535, 255), (257, 1), (32896, 128)):
        content = encode(Image.fromarray(np.full((8, 8), value, np.uint16)), "PNG")
        assert (load_image(content, size=8) == level).all()


def test_black_and_white_png_is_0_and_255():
    board = np.indices((16, 16)).sum(axis=0) % 2 == 0
    found = load_image(encode(Image.fromarray(board), "PNG"), size=16)
    np.testing.assert_array_equal(found[..., 0], board * 255)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_alpha_is_dropped_and_the_colours_under_it_stay(format):
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    rgba = noise(30, 40, 4)
    found = load_image(encode(Image.fromarray(rgba), format, **options), size=56)
    assert worst(found, rgba[..., :3]) <= TOLERANCE


def test_grey_with_alpha_is_its_grey():
    grey_alpha = noise(30, 40, 2)
    found = load_image(encode(Image.fromarray(grey_alpha, mode="LA"), "PNG"), size=56)
    assert worst(found, np.repeat(grey_alpha[..., :1], 3, axis=-1)) <= TOLERANCE


@pytest.mark.parametrize("transparency", [None, 0, bytes(range(256))])
def test_palette_colours_are_resized_not_their_numbers(transparency):
    image = Image.fromarray(noise(40, 50)).quantize(256)
    options = {} if transparency is None else {"transparency": transparency}
    found = load_image(encode(image, "PNG", **options), size=56)
    palette = np.asarray(image.getpalette()).reshape(-1, 3)
    assert worst(found, palette[np.asarray(image)]) <= TOLERANCE


def test_cmyk_jpeg_becomes_rgb():
    rgb = smooth(60, 80)
    content = encode(Image.fromarray(rgb).convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(content)).mode == "CMYK"
    # JPEG's own loss, a few levels; an inverted or unconverted picture is off by more than a hundred.
    assert worst(load_image(content, size=56), rgb) <= 12


def test_webp_lossless_is_exact():
    rgb = noise(50, 70)
    assert worst(load_image(encode(Image.fromarray(rgb), "WEBP", lossless=True), size=56), rgb) <= TOLERANCE


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_first_frame_of_an_animation_is_used(format):
    frames = [Image.new("RGB", (20, 10), name) for name in ("red", "blue", "green")]
    options = {"lossless": True} if format == "WEBP" else {}
    content = encode(frames[0], format, save_all=True, append_images=frames[1:], duration=100, **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert (load_image(content, size=8) == (255, 0, 0)).all()


def test_multi_picture_jpeg_of_phones_is_its_first_picture():
    frames = [Image.new("RGB", (32, 32), name) for name in ("red", "blue")]
    content = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert np.abs(load_image(content, size=8).astype(int) - (254, 0, 0)).max() <= 2


# What each EXIF orientation asks for, as numpy operations on [H, W, C], independent of Pillow's names.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    content = encode(Image.fromarray(smooth(40, 70)), format, exif=exif, **options)
    decoded = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert worst(load_image(content, size=48), UPRIGHT[orientation](decoded)) <= TOLERANCE


def test_senseless_or_damaged_exif_leaves_the_picture_as_it_is():
    image = Image.fromarray(smooth(40, 70))
    plain = load_image(encode(image, "JPEG"), size=48)
    for exif in (b"Exif\0\0broken", b"Exif\0\0II*\0\xff\xff\xff\xff", struct.pack(">6sH", b"Exif\0\0", 99)):
        np.testing.assert_array_equal(load_image(encode(image, "JPEG", exif=exif), size=48), plain)
    exif = Image.Exif()
    exif[0x0112] = 77
    np.testing.assert_array_equal(load_image(encode(image, "JPEG", exif=exif), size=48), plain)


def png_header(width: int, height: int) -> bytes:
    """A sound PNG header that promises width x height pixels, with hardly any data behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


def jpeg_header(width: int, height: int) -> bytes:
    content = encode(Image.new("RGB", (16, 16)), "JPEG")
    start = content.index(b"\xff\xc0") + 5
    return content[:start] + struct.pack(">HH", height, width) + content[start + 4 :]


def gif_header(width: int, height: int) -> bytes:
    content = encode(Image.new("P", (16, 16)), "GIF")
    return content[:6] + struct.pack("<HH", width, height) + content[10:]


@pytest.mark.parametrize(
    "content",
    [
        png_header(40_000, 40_000),
        png_header(12_000, 12_000),
        png_header(2**31 - 1, 2**31 - 1),
        png_header(MAX_PIXELS + 1, 1),
        jpeg_header(65_000, 65_000),
        gif_header(65_535, 65_535),
    ],
    ids=["png", "png-between-pillow's-limits", "png-largest", "png-one-too-many", "jpeg", "gif"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_is_refused_before_it_is_decoded(content, monkeypatch):
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadImage, match="too large: .* at most 67,108,864 pixels"):
        load_image(content, size=56)


def test_largest_allowed_image_gets_to_the_decoder():
    with pytest.raises(BadImage, match="truncated or damaged"):
        load_image(png_header(8192, 8192), size=56)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP"])
def test_truncated_file_is_refused(format):
    content = encode(Image.fromarray(noise(200, 200)), format)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(BadImage, match="truncated or damaged|not a JPEG"):
            load_image(content[: int(share * len(content))], size=56)


def test_files_that_are_no_images_say_what_they_are(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("not an image at all")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.tiff")
    for name, reason in {
        "empty.png": "empty",
        "text.jpg": "not a JPEG, PNG, WebP or GIF",
        "folder.jpg": "a directory",
        "pipe.jpg": "not a regular file",
        "dangling.jpg": "no such file",
        "missing.jpg": "no such file",
        "picture.tiff": "not a JPEG, PNG, WebP or GIF",
        "text.jpg/inner.jpg": "Not a directory",
        "x" * 300: "File name too long",
    }.items():
        with pytest.raises(BadImage, match=reason):
            load_image(tmp_path / name, size=56)


def test_bytes_path_text_and_path_object_give_the_same(tmp_path):
    content = encode(Image.fromarray(noise(30, 40)), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(content)
    expected = load_image(content, size=56)
    for one in (path, str(path)):
        np.testing.assert_array_equal(load_image(one, size=56), expected)


def test_the_ending_of_a_name_does_not_matter(tmp_path):
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encode(Image.fromarray(noise(30, 40)), "PNG"))
    assert load_image(path, size=56).shape == (56, 56, 3)


def test_many_threads_give_what_one_gives():
    formats = ["JPEG", "PNG", "WEBP", "GIF"]
    contents = [encode(Image.fromarray(noise(90, 120, seed=i)), formats[i % 4]) for i in range(24)]
    expected = [load_image(content, size=56) for content in contents]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for found, one in zip(
            pool.map(lambda c: load_image(c, size=56), contents * 4), expected * 4, strict=True
        ):
            np.testing.assert_array_equal(found, one)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    format=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP"]),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    share=st.floats(0.2, 1),
)
def test_a_damaged_file_gives_a_picture_or_bad_image_and_nothing_else(format, changes, share):
    content = bytearray(encode(Image.fromarray(smooth(24, 32)), format))
    for place, byte in changes:
        content[int(place * len(content))] = byte
    try:
        found = load_image(bytes(content[: int(share * len(content))]), size=16)
    except BadImage as error:
        assert error.reason
    else:
        assert found.shape == (16, 16, 3) and found.dtype == np.uint8


def test_webp_is_compiled_into_this_pillow():
    assert features.check("webp")
