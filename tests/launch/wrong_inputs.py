"""A folder of sound inputs, and the ways in which the tests spoil it.

`write_inputs` makes what `launch.train` and `launch.predict` need: a config file, a tokenizer, weights, eight
examples with their images, and `run/`, a finished run. Each other function takes that folder and makes one
thing in it wrong, or returns a function that does.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import sentencepiece
from PIL import Image

from launch.command_line import load_config
from pgdist import weights
from pgdist.models.paligemma import parameter_shapes
from pgdist.models.presets import preset
from pgdist.parameters import flatten

Spoil = Callable[[Path], None]

TOKENIZER = Path(__file__).parents[2] / "assets" / "tiny_tokenizer.model"
EXAMPLES = 8


@dataclasses.dataclass(frozen=True)
class Case:
    """A command line, what its inputs suffer before, its exit code, and what it must say (a regex)."""

    command: str
    code: int
    message: str
    spoil: Spoil = lambda folder: None


CONFIG = """
from pgdist.config import default_config

def get_config():
    c = default_config()
    c.model.preset = "tiny"
    c.model.image_dtype = c.model.text_dtype = c.frozen_dtype = "float32"
    c.init = "weights.npz"
    c.tokenizer = "tokenizer.model"
    c.data.train = "train.jsonl"
    c.data.text_length = 16
    c.eval.max_new_tokens = 2
    c.batch_size = 4
    c.steps = 2
    return c
"""


def write_inputs(folder: Path) -> None:
    """Fills the folder."""
    (folder / "config.py").write_text(CONFIG)
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    random = np.random.default_rng(0)
    shapes = flatten(parameter_shapes(preset("tiny")))
    arrays = {name: 0.02 * random.normal(size=leaf.shape) for name, leaf in shapes.items()}
    weights.save(folder / "weights.npz", arrays, dtype=jnp.bfloat16)
    for i in range(EXAMPLES):
        Image.new("RGB", (8, 6), (30 * i, 0, 0)).save(folder / f"{i}.png")
    lines = [example(image=f"{i}.png") for i in range(EXAMPLES)]
    (folder / "train.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "run").mkdir()
    config = json.loads(load_config(str(folder / "config.py")).to_json())
    (folder / "run" / "config.json").write_text(json.dumps(config))
    shutil.copy(folder / "weights.npz", folder / "run" / "model.npz")
    (folder / "answers.jsonl").write_text("the answers of yesterday\n")


def example(**fields: object) -> str:
    """One line of a JSONL, with a prefix and a suffix unless they are given as None."""
    fields = {"prefix": "caption en", "suffix": "a red circle", **fields}
    return json.dumps({name: value for name, value in fields.items() if value is not None})


def content(name: str, text: str | bytes) -> Spoil:
    """The file holds something else."""
    return lambda folder: _write(folder / name, text)


def missing(name: str) -> Spoil:
    """The file is not there."""
    return lambda folder: (folder / name).unlink()


def cut_short(name: str) -> Spoil:
    """The file ends in its middle."""
    return lambda folder: _write(
        folder / name, (folder / name).read_bytes()[: -(folder / name).stat().st_size // 2]
    )


def line(number: int, text: str | bytes) -> Spoil:
    """That line of train.jsonl, from 1, is something else."""

    def spoil(folder: Path) -> None:
        lines = (folder / "train.jsonl").read_bytes().splitlines()
        lines[number - 1] = text.encode() if isinstance(text, str) else text
        (folder / "train.jsonl").write_bytes(b"".join(one + b"\n" for one in lines))

    return spoil


def config_line(text: str) -> Spoil:
    """config.py has that line too, as its line 15."""
    return lambda folder: _write(
        folder / "config.py", CONFIG.replace("    return c", f"    {text}\n    return c")
    )


def number_in_weights(value: float) -> Spoil:
    """One of the numbers of llm/final_norm/scale is that one."""

    def spoil(folder: Path) -> None:
        def change(header_and_numbers: bytes) -> bytes:
            return header_and_numbers[:-2] + np.array(value, jnp.bfloat16).tobytes()

        _change_member(folder / "weights.npz", "llm/final_norm/scale.npy", change)

    return spoil


def pickled_array_in_weights(folder: Path) -> None:
    """One of the arrays holds Python objects."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.array([{}], object), allow_pickle=True)
    _change_member(folder / "weights.npz", "llm/final_norm/scale.npy", lambda _: stream.getvalue())


def array_missing_in_weights(folder: Path) -> None:
    """The weights lack one array."""
    _change_member(folder / "weights.npz", "img/head/bias.npy", lambda _: None)


def tokenizer_too_large(folder: Path) -> None:
    """The tokenizer has more tokens than the model."""
    tokens = [f"<extra{i}>" for i in range(preset("tiny").text.vocab_size)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle"]),
        model_writer=model,
        model_type="char",
        vocab_size=len(tokens) + 20,
        hard_vocab_limit=False,
        user_defined_symbols=["\n", *tokens],
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "minloglevel": 2},
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def both(*spoils: Spoil) -> Spoil:
    """Several things are wrong."""

    def spoil(folder: Path) -> None:
        for one in spoils:
            one(folder)

    return spoil


def bad_images(folder: Path) -> None:
    """Images that cannot be used lie beside the good ones."""
    (folder / "cut.jpg").write_bytes(_jpeg()[:-200])
    (folder / "empty.png").touch()
    (folder / "bomb.png").write_bytes(_png_of_size(40_000))
    (folder / "text.png").write_text("hello")
    (folder / "folder.png").mkdir()
    (folder / "link.png").symlink_to("/etc/hostname")


def _write(path: Path, text: str | bytes) -> None:
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def _change_member(path: Path, name: str, change: Callable[[bytes], bytes | None]) -> None:
    """Writes the npz anew with `change(content)` of that member; without it, if that is None."""
    with zipfile.ZipFile(path) as file:
        members = {entry: file.read(entry) for entry in file.namelist()}
    members[name] = change(members[name])
    with zipfile.ZipFile(path, "w") as file:
        for entry, stored in members.items():
            if stored is not None:
                file.writestr(entry, stored)


def _jpeg() -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(stream, "JPEG")
    return stream.getvalue()


def _png_of_size(size: int) -> bytes:
    """A PNG of a hundred bytes that says it is size x size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
