"""Answers for a list of images and prompts, in Python and without a data set."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from pgdist.data.tokenizer import Tokenizer
from pgdist.decode import generate
from pgdist.decode.decoder import _decode
from pgdist.errors import ConfigError, DataError
from pgdist.mesh import make_mesh
from pgdist.models import PaliGemma
from tests.models.small import SMALL, random_parameters, with_text

TOKENIZER = Path(__file__).parents[2] / "assets" / "tiny_tokenizer.model"
PROMPTS = ["caption en", "count circles", "detect red square", "caption en", "detect blue circle"]


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(TOKENIZER)


@functools.cache
def model() -> PaliGemma:
    return PaliGemma(with_text(SMALL["paligemma2"], vocab_size=tokenizer().vocab_size))


@functools.cache
def parameters() -> dict:
    params = random_parameters(model().config, seed=0)
    params["llm"]["embedder"]["input_embedding"] *= 0.3
    return params


def random_images(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 40, 60, 3), np.uint8))


def answer(images, prompts, **options) -> list[str]:
    mesh = make_mesh(devices=jax.devices()[:1])
    options = {"max_new_tokens": 4, "batch_size": 2, "mesh": mesh} | options
    return generate(model(), parameters(), images=images, prompts=prompts, tokenizer=tokenizer(), **options)


@functools.cache
def answers() -> list[str]:
    """Of five images, two at a time."""
    return answer(random_images(5), PROMPTS)


def test_answers_come_in_the_order_of_the_images():
    assert len(answers()) == 5
    assert len(set(answers())) == 5
    assert answer(random_images(5)[::-1], PROMPTS[::-1]) == answers()[::-1]


def test_the_batch_size_and_the_mesh_change_no_answer():
    assert answer(random_images(5), PROMPTS, batch_size=3) == answers()
    assert answer(random_images(5), PROMPTS, mesh=make_mesh(data=2, fsdp=4)) == answers()


def test_one_prompt_serves_all_images():
    assert answer(random_images(5)[::3], PROMPTS[0]) == answers()[::3]


def test_files_bytes_pil_images_and_arrays_are_the_same_image(tmp_path):
    pixels = random_images(1)[0]
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    forms = [path, str(path), path.read_bytes(), Image.fromarray(pixels), Image.open(path), pixels]
    assert answer(forms, PROMPTS[0]) == answers()[:1] * len(forms)


def test_a_photograph_is_turned_upright_from_a_file_and_from_pil(tmp_path):
    path = tmp_path / "turned.png"
    turned = Image.fromarray(random_images(1)[0]).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 270 degrees
    turned.save(path, exif=exif)
    assert answer([path, Image.open(path)], PROMPTS[0]) == answers()[:1] * 2


def test_prompts_of_nearly_the_same_length_share_a_program():
    answers()
    programs = _decode._cache_size()
    answer(random_images(2), ["caption en", "detect red square and blue circle"])
    assert _decode._cache_size() == programs


def test_a_config_will_do_for_a_model_and_no_image_for_images():
    found = generate(
        model().config, parameters(), images=[], prompts="caption en", tokenizer=tokenizer(), max_new_tokens=4
    )
    assert found == []


def test_a_prompt_that_is_too_long_is_named():
    with pytest.raises(
        DataError, match=r"Prompt 1 \('detect red square and blue circle'\) is longer than 5 tokens"
    ):
        answer(random_images(2), ["caption en", "detect red square and blue circle"], max_prompt_tokens=5)


def test_prompts_that_do_not_match_the_images_are_refused():
    with pytest.raises(DataError, match="3 images but 2 prompts"):
        answer(random_images(3), PROMPTS[:2])


@pytest.mark.parametrize("image", ["missing.png", Path("missing.png"), Image.new("RGB", (8, 8))])
def test_an_image_in_no_list_is_refused(image):
    with pytest.raises(DataError, match="images: expected a list of images, found one, a "):
        answer(image, PROMPTS)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("missing.png", r"Image 1 \(missing.png\): no such file"),
        (b"GIF", "Image 1: not a JPEG"),
        (np.zeros((8, 8), np.float32), r"Image 1: expected an array uint8\[H, W, 3\], found float32\[8, 8\]"),
        (None, "Image 1: expected a path"),
    ],
)
def test_an_image_that_cannot_be_read_is_named(image, message):
    with pytest.raises(DataError, match=message):
        answer([random_images(1)[0], image], PROMPTS[0])


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"batch_size": 0}])
def test_sizes_below_one_are_refused(options):
    with pytest.raises(ConfigError, match="at least 1"):
        answer(random_images(1), PROMPTS[0], **options)
