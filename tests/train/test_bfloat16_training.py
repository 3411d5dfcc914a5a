"""The demo in bfloat16 beside the demo in float32: 200 steps on the same examples."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from launch.command_line import load_config
from pgdist.finetune import finetune
from tests.tiny_runs import ROOT, losses, read_jsonl
from tools import make_demo_data

STEPS, WINDOW = 200, 10
# A token that is all but certain has a loss of exp(-margin), so that a margin off by e changes it by the share e.
# Losses end at exp(-5), and a logit of that size is off by 8 roundings of 2^-9 (see test_dtypes): 5 * 8 * 2^-9 = 0.078.
# Another order of the examples changes the same means by up to 0.27.
BAND = 0.08


def run_demo(dtype: str, *, data: Path, workdir: Path) -> tuple[np.ndarray, float]:
    """(loss of each step, share of the held-out scenes that are described exactly at the end)."""
    config = load_config(str(ROOT / "configs/demo.py"))
    config.update_from_flattened_dict(
        {
            "model.image_dtype": dtype,
            "model.text_dtype": dtype,
            "init": str(ROOT / "assets/tiny.npz"),
            "tokenizer": str(ROOT / "assets/tiny_tokenizer.model"),
            "data.train": str(data / "train.jsonl"),
            "data.validation": str(data / "validation.jsonl"),
            "steps": STEPS,
            "eval.every": 0,
            "export": False,
        }
    )
    finetune(config, workdir=workdir, devices=jax.devices()[:2])
    *_, last = (row for row in read_jsonl(workdir / "metrics.jsonl") if "validation/exact_match" in row)
    by_step = losses(workdir)
    return np.array([by_step[step] for step in sorted(by_step)]), last["validation/exact_match"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bfloat16_follows_float32_through_the_demo(tmp_path):
    flags = ["--task=relations", "--train=2048", "--validation=96", f"--out={tmp_path / 'data'}"]
    make_demo_data.main(flags)

    (found, found_score), (expected, expected_score) = (
        run_demo(dtype, data=tmp_path / "data", workdir=tmp_path / dtype) for dtype in ("bfloat16", "float32")
    )

    found, expected = (loss.reshape(-1, WINDOW).mean(axis=1) for loss in (found, expected))
    assert expected[0] > 100 * expected[-1]  # it learns
    np.testing.assert_allclose(found, expected, rtol=BAND)
    assert not np.array_equal(found, expected)
    # Four scenes of 96: that many are near the edge at any time.
    assert expected_score >= 0.9 and abs(found_score - expected_score) <= 4 / 96
