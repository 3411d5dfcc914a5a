"""A workdir such as a run leaves behind, drawn and computed, for the tests of the report."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from pgdist.telemetry import JsonlWriter

STEPS = 64
EVALUATED = (0, 16, 32, 48, 64)
CAPTIONS = (
    ("a red circle above a blue square", "a red circle", "a red circle near a square"),
    ("a green triangle left of a yellow circle", "a green circle", "a green triangle left of a circle"),
    ("two blue squares below a red triangle", "two squares", "two blue squares below a red triangle"),
    ("a yellow square right of a green circle", "a square", "a yellow square left of a green circle"),
)


def draw_scene(index: int, *, size: int = 56) -> Image.Image:
    image = Image.new("RGB", (size, size), (244, 242, 236))
    pen = ImageDraw.Draw(image)
    colors = ("#d33a2c", "#2b59c3", "#2f9e44", "#e8b021")
    pen.ellipse((6, 4 + 3 * index, 26, 24 + 3 * index), fill=colors[index % 4])
    pen.rectangle((30, 26, 48, 44), fill=colors[(index + 1) % 4])
    return image


def data_uri(image: Image.Image) -> str:
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()


def write_lines(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_workdir(workdir: Path) -> Path:
    """Fills `workdir` with every file that the report reads; images lie in a data folder beside it."""
    data = workdir.parent / "data"
    (data / "images").mkdir(parents=True, exist_ok=True)
    workdir.mkdir(parents=True, exist_ok=True)
    for index in range(len(CAPTIONS)):
        draw_scene(index).save(data / "images" / f"scene_{index:03}.png")
    _write_config(workdir, data=data)
    _write_metrics(workdir)
    _write_parameters(workdir)
    _write_examples(workdir)
    for step in EVALUATED:
        _write_predictions(workdir, step=step)
    write_lines(
        workdir / "bad_records.jsonl",
        [{"file": "data/train.jsonl", "line": 17, "reason": "images/a.png: the file is empty"}],
    )
    return workdir


def _write_config(workdir: Path, *, data: Path) -> None:
    config = {
        "seed": 0,
        "steps": STEPS,
        "batch_size": 8,
        "init": "assets/tiny.npz",
        "model": {"preset": "tiny", "image_dtype": "float32", "remat": "none"},
        "data": {
            "train": str(data / "train.jsonl"),
            "validation": str(data / "validation.jsonl"),
            "prefix": None,
        },
        "optimizer": {"name": "sgd", "learning_rate": 0.03},
        "schedule": {"name": "cosine", "warmup": 0.1},
        "trainable": [["llm/layers/attn/.*", 1.0], [".*", 0.0]],
        "eval": {"every": 16, "metric": "exact_match"},
    }
    environment = {
        "pgdist": "0.1.0",
        "python": "3.11.7",
        "jax": {"version": "0.10.2", "devices": 8, "platform": "cpu"},
    }
    (workdir / "config.json").write_text(json.dumps(config, indent=2))
    (workdir / "env.json").write_text(json.dumps(environment))


def _write_metrics(workdir: Path) -> None:
    writer = JsonlWriter(workdir / "metrics.jsonl")
    for step in range(STEPS + 1):
        if step in EVALUATED:
            writer.write(step, _validation_metrics(step))
        if step > 0:
            writer.write(step, _training_metrics(step))
    writer.close()


def _validation_metrics(step: int) -> dict[str, float]:
    done = step / STEPS
    return {
        "validation/loss": 2.6 * math.exp(-3 * done) + 0.15,
        "validation/token_accuracy": 0.4 + 0.55 * done,
        "validation/exact_match": 0.875 * done**2,
        "time/evaluation_seconds": 1.4,
    }


def _training_metrics(step: int) -> dict[str, float]:
    noise = math.sin(7.3 * step) * math.cos(2.1 * step)
    return {
        "train/loss": 2.5 * math.exp(-3.2 * step / STEPS) * (1 + 0.2 * noise) + 0.1,
        "train/learning_rate": 0.03 * min(1, step / 6) * (1 + math.cos(math.pi * step / STEPS)) / 2,
        "train/grad_norm": 1.2 + 0.5 * noise,
        "train/examples_per_second": 41 + 3 * noise,
        "train/tokens_per_second": (41 + 3 * noise) * 128,
        "train/masked_rows": int(step == 9),
        "train/truncated_rows": 0,
        "time/step_seconds": 6.0 if step == 1 else 0.195 - 0.01 * noise,
        "time/data_wait_seconds": 0.004,
        "time/host_wait_seconds": 0.001,
        "train/tokens_per_second_per_device": (41 + 3 * noise) * 16,
        "train/mfu": 0.583 + 0.01 * noise,
        "memory/peak_bytes": int(12.5 * 2**30),
        "time/checkpoint_seconds": 0.05 if step % 16 == 0 else 0.0,
    }


def _write_parameters(workdir: Path) -> None:
    shapes = {
        "img/embedding/kernel": (14, 14, 3, 64),
        "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel": (2, 64, 4, 16),
        "llm/embedder/input_embedding": (2176, 64),
        "llm/final_norm/scale": (64,),
        "llm/layers/attn/q_einsum/w": (2, 4, 64, 16),
        "llm/layers/attn/kv_einsum/w": (2, 2, 1, 64, 16),
    }
    rows = []
    for name, shape in shapes.items():
        trainable = "/attn/" in name
        rows.append(
            {
                "name": name,
                "shape": shape,
                "dtype": "float32" if trainable else "bfloat16",
                "trainable": trainable,
                "lr_scale": 1.0 if trainable else 0.0,
                "decay": False,
                "sharding": "replicated" if len(shape) == 1 else "fsdp on 0",
                "bytes": math.prod(shape) * (4 if trainable else 2),
            }
        )
    (workdir / "parameters.json").write_text(json.dumps(rows))


def _write_examples(workdir: Path) -> None:
    rows = []
    for index, (caption, *_) in enumerate(CAPTIONS[:3]):
        words = ["▁" + word for word in caption.split()]
        suffix = [*words[:3], "<loc0123>", "<loc0456>", *words[3:]] if index == 1 else words
        pieces = ["<bos>", "relate", "▁en", "\n", *suffix, "<eos>"]
        learned = [0] * 4 + [1] * (len(suffix) + 1)
        padding = 32 - len(pieces)
        rows.append(
            {
                "image": data_uri(draw_scene(index)),
                "prefix": "relate en",
                "suffix": caption,
                "pieces": pieces + ["<pad>"] * padding,
                "mask_ar": learned + [0] * padding,
                "mask_loss": learned + [0] * padding,
                "mask_input": [1] * len(pieces) + [0] * padding,
            }
        )
    write_lines(workdir / "examples.jsonl", rows)


def _write_predictions(workdir: Path, *, step: int) -> None:
    rows = []
    for index, (truth, early, late) in enumerate(CAPTIONS):
        text = early if step < 20 else late if step < 60 else truth
        rows.append(
            {
                "index": index,
                "image": f"images/scene_{index:03}.png",
                "prefix": "relate en",
                "suffix": truth,
                "prediction": text,
                "score": {"exact_match": float(text == truth)},
            }
        )
    write_lines(workdir / "predictions" / f"step_{step:06}.jsonl", rows)


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    return write_workdir(tmp_path / "run")
