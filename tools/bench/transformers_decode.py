"""Answers beside those of transformers' `generate`: same weights, same images and prompts, greedy, as many tokens.

    python tools/bench/transformers_decode.py [--sizes small medium] [--batch_sizes 1 8 32] [--json=FILE]
    taskset -c 0 python tools/bench/transformers_decode.py --cpu_seconds      on a machine that does other things too
    python tools/bench/transformers_decode.py --device=cuda --presets paligemma-3b-224

Needs torch and transformers (docs/development.md). On a CPU both compute in float32 on the same cores, on a GPU in
bfloat16, in turns, in one process: transformers with its default cache and attention (SDPA), pgdist on one device by
`pgdist.decode.Decoder`. Neither ends an answer early: transformers is told of no end-of-sequence token, pgdist of one
that no vocabulary has. `tokens/s` is of whole calls, images and prompts included, `first` of calls that ask for one
token, `ms a token` what each of the others takes; x is transformers' time over pgdist's. `same` is the share of tokens
that agree: in float32 all, but where two are as likely to within rounding, after which a row's answers may differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # of a GPU, which torch needs too

import jax
import numpy as np
import torch
import transformers

from pgdist import backend_flags
from pgdist.mesh import make_mesh
from pgdist.models import PaliGemmaConfig
from pgdist.models.paligemma import compute_dtype
from pgdist.models.presets import PRESETS
from pgdist.parameters import flatten, unflatten
from tests.models.small import PAD, random_parameters
from tests.parity.conversion import build_transformers
from tools.bench import table
from tools.bench.decode import Task, add_task_options, median_seconds
from tools.bench.models import FOR_CPU

LEAST_AGREEMENT = 0.9  # of tokens in float32; answers to another question would agree in none
_COLUMNS = (
    ("tokens/s", "theirs_tokens_per_second", 1, ",.1f"), ("pgdist", "tokens_per_second", 1, ",.1f"),
    ("x", "tokens_per_second_ratio", 1, ".2f"),
    ("first ms", "theirs_first_token_seconds", 1e3, ",.1f"), ("pgdist", "first_token_seconds", 1e3, ",.1f"),
    ("x", "first_token_seconds_ratio", 1, ".2f"),
    ("ms a token", "theirs_token_seconds", 1e3, ",.2f"), ("pgdist", "token_seconds", 1e3, ",.2f"),
    ("x", "token_seconds_ratio", 1, ".2f"), ("same %", "agreement", 100, ".1f"),
)  # fmt: skip


def main() -> None:
    """Prints the table."""
    options = _options()
    if options.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    backend_flags.apply("cpu" if options.device == "cpu" else "gpu")
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    dtype = "float32" if options.device == "cpu" else "bfloat16"
    print(
        f"{options.device}, {dtype}, {cores} cores; prompts of {options.prompt_tokens} tokens beside the image's, "
        f"{options.new_tokens} new ones; transformers {transformers.__version__}, torch {torch.__version__}, "
        f"jax {jax.__version__}"
    )
    print(table.heading(_COLUMNS))
    sizes = {name: FOR_CPU[name] for name in options.sizes} | {
        name: PRESETS[name] for name in options.presets
    }
    rows = []
    for name, config in sizes.items():
        flat = flatten(random_parameters(config, seed=0))
        for batch_size in options.batch_sizes:
            task = Task(
                batch_size=batch_size, prompt_tokens=options.prompt_tokens, new_tokens=options.new_tokens
            )
            found = compare(config, flat, task, dtype=dtype, options=options)
            rows.append({"size": name, "dtype": dtype, "cores": cores, **dataclasses.asdict(task), **found})
            print(table.line(_COLUMNS, f"{name}, batch {batch_size}", rows[-1]), flush=True)
            if dtype == "float32" and found["agreement"] < LEAST_AGREEMENT:
                sys.exit("the answers differ")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def compare(
    config: PaliGemmaConfig,
    flat: dict[str, np.ndarray],
    task: Task,
    *,
    dtype: str,
    options: argparse.Namespace,
) -> dict[str, float]:
    """The figures of one task; those of transformers begin with "theirs_"."""
    theirs = transformers_calls(config, flat, task, device=options.device, dtype=dtype)
    ours = pgdist_calls(config, flat, task, dtype=dtype)
    agreement = np.mean(np.array(ours["all"]()) == theirs["all"]())
    calls = {("theirs_", name): call for name, call in theirs.items()}
    calls |= {("", name): call for name, call in ours.items()}
    clock = time.process_time if options.cpu_seconds else time.perf_counter
    seconds = median_seconds(calls, rounds=options.rounds, clock=clock)
    found: dict[str, float] = {}
    for side in ("theirs_", ""):
        speed = task.speed({name: seconds[side, name] for name in ("first", "all")})
        found |= {side + figure: value for figure, value in speed.items()}
    found["tokens_per_second_ratio"] = found["tokens_per_second"] / found["theirs_tokens_per_second"]
    for figure in ("first_token_seconds", "token_seconds"):
        found[f"{figure}_ratio"] = found[f"theirs_{figure}"] / found[figure]
    return found | {"agreement": float(agreement)}


def pgdist_calls(
    config: PaliGemmaConfig, flat: dict[str, np.ndarray], task: Task, *, dtype: str
) -> dict[str, Callable[[], Any]]:
    """See `Task.calls`."""
    config = PaliGemmaConfig(
        image=dataclasses.replace(config.image, dtype=dtype),
        text=dataclasses.replace(config.text, dtype=dtype),
    )
    mesh = make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])
    params = {
        name: jax.device_put(array.astype(compute_dtype(config, name) or array.dtype), mesh.devices.flat[0])
        for name, array in flat.items()
    }
    return task.calls(config, unflatten(params), mesh)


def transformers_calls(
    config: PaliGemmaConfig, flat: dict[str, np.ndarray], task: Task, *, device: str, dtype: str
) -> dict[str, Callable[[], np.ndarray]]:
    """As `pgdist_calls`; the calls return tokens, int[B, N]."""
    model = build_transformers(config, flat, attention="sdpa").to(device, getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    arrays = task.batch(config).arrays
    image_tokens = ((0, 0), (config.image.num_tokens, 0))
    pixels = (arrays["image"].astype(np.float32) / 127.5 - 1.0).transpose(0, 3, 1, 2)
    tokens = np.pad(arrays["text"], image_tokens, constant_values=config.text.vocab_size)
    inputs = {
        "input_ids": torch.from_numpy(tokens).long(),
        "attention_mask": torch.from_numpy(np.ones_like(tokens)).long(),
        "token_type_ids": torch.from_numpy(np.zeros_like(tokens)).long(),
        "pixel_values": torch.from_numpy(np.ascontiguousarray(pixels)).to(model.dtype),
    }

    def call(new_tokens: int) -> np.ndarray:
        placed = {name: tensor.to(device) for name, tensor in inputs.items()}
        answers = model.generate(**placed, max_new_tokens=new_tokens, do_sample=False, pad_token_id=PAD)
        return answers[:, tokens.shape[1] :].cpu().numpy()

    return {"first": lambda: call(1), "all": lambda: call(task.new_tokens)}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="*", choices=FOR_CPU, default=[], metavar="NAME")
    parser.add_argument("--presets", nargs="*", choices=PRESETS, default=[], metavar="NAME")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found)
    parser.add_argument(
        "--cpu_seconds", action="store_true", help="those of all cores together, not the clock's"
    )
    add_task_options(parser, batch_sizes=[1, 8, 32])
    options = parser.parse_args()
    if not (options.sizes or options.presets):
        options.sizes = ["small", "medium"]
    return options


if __name__ == "__main__":
    main()
