"""A training step beside transformers' on this machine's CPU: same weights, same batch, same frozen set, same SGD.

    python tools/bench/transformers_step.py [--sizes tiny small medium] [--devices 1 2 4] [--json=FILE]

Needs torch and transformers (docs/development.md). Both compute in float32 on the same cores, in turns, in one process:
transformers with its default attention, its logits of text positions only, and no gradient of what is frozen; pgdist
on so many simulated devices, each of which takes its rows of the batch. A line for each: median seconds of a step, its
ratio to transformers', and seconds of all cores together. On a machine that does other things too, bind it to one core
(`taskset -c 0`), where both can be compared by the latter. The losses of each step must agree, or there is no line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import torch

from pgdist.config import default_config
from pgdist.mesh import batch_sharding, make_mesh, parameter_shardings, put_batch
from pgdist.models import PaliGemma, PaliGemmaConfig
from pgdist.models.remat import REMAT_POLICIES
from pgdist.parameters import flatten, learning_rate_scales, unflatten
from pgdist.train.optimizer import make_optimizer, make_schedule
from pgdist.train.state import init_state, state_shardings
from pgdist.train.step import make_train_step
from tests.models.small import flat_shapes, random_batch, random_parameters
from tests.parity.conversion import build_transformers
from tools.bench.models import FOR_CPU

TRAINABLE = (("llm/layers/attn/.*", 1.0), (".*", 0.0))
TRAINED_BY_TRANSFORMERS = "language_model.layers."  # and "self_attn"
RATE = 0.01
TOLERANCE = 1e-4  # relative, between the losses of a step: float32 over some tens of layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """A model, and a batch of rows of so many tokens, a third of them prefix."""

    model: PaliGemmaConfig
    batch: int
    text_length: int


SIZES = {
    "tiny": Size(model=FOR_CPU["tiny"], batch=64, text_length=24),
    "small": Size(model=FOR_CPU["small"], batch=16, text_length=64),
    "medium": Size(model=FOR_CPU["medium"], batch=8, text_length=64),
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=SIZES)
    parser.add_argument("--devices", nargs="*", type=int, default=[1, 2, 4], help="of pgdist, simulated")
    parser.add_argument("--remat", default="dots", choices=REMAT_POLICIES, help="of pgdist")
    parser.add_argument("--rounds", type=int, default=9, help="of one step each")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(options.devices))
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    print(f"{cores} cores for each; torch {torch.__version__}, jax {jax.__version__}")
    rows = []
    for name in options.sizes:
        size = _with_remat(SIZES[name], options.remat)
        rows += compare(name, size, devices=options.devices, rounds=options.rounds)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def compare(name: str, size: Size, *, devices: list[int], rounds: int) -> list[dict[str, object]]:
    """The lines of one size."""
    flat = flatten(random_parameters(size.model, seed=0))
    parameters = sum(array.size for array in flat.values())
    print(f"{name}: {parameters / 1e6:.1f} M parameters, {size.batch} examples of {size.text_length} tokens")
    batch = _batch(size)
    steps = {"transformers": _transformers_step(size, flat, batch)}
    steps |= {f"pgdist, {count} devices": _pgdist_step(size, flat, batch, count) for count in devices}
    seconds: dict[str, list[float]] = {which: [] for which in steps}
    cpu_seconds: dict[str, list[float]] = {which: [] for which in steps}
    for turn in range(rounds + 2):
        losses = {}
        for which, step in steps.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            losses[which] = step()
            if turn >= 2:  # the first ones compile, and fill caches
                seconds[which].append(time.perf_counter() - started)
                cpu_seconds[which].append(time.process_time() - cpu_started)
        expected = losses["transformers"]
        if any(abs(loss / expected - 1) > TOLERANCE for loss in losses.values()):
            sys.exit(f"{name}, step {turn}: the losses differ: {losses}")
    medians = {which: statistics.median(taken) for which, taken in seconds.items()}
    rows = []
    for which, median in medians.items():
        ratio = median / medians["transformers"]
        row = {"size": name, "which": which, "seconds": median, "ratio": ratio}
        row |= {"least": min(seconds[which]), "most": max(seconds[which])}
        row |= {"cpu_seconds": statistics.median(cpu_seconds[which])}
        print(
            f"  {which:<20} {median:8.3f} s a step ({row['least']:.3f} to {row['most']:.3f}), {ratio:5.2f} x "
            f"transformers; {row['cpu_seconds']:.3f} s of all cores",
            flush=True,
        )
        rows.append(row)
    return rows


def _with_remat(size: Size, policy: str) -> Size:
    image = dataclasses.replace(size.model.image, remat=policy)
    text = dataclasses.replace(size.model.text, remat=policy)
    return dataclasses.replace(size, model=PaliGemmaConfig(image=image, text=text))


def _batch(size: Size) -> dict[str, np.ndarray]:
    prefix = size.text_length // 3
    suffixes = [size.text_length - prefix - row % 4 for row in range(size.batch)]
    prefixes = [prefix] * size.batch
    batch = random_batch(size.model, prefixes=prefixes, suffixes=suffixes, length=size.text_length, seed=0)
    return batch | {"stop": np.zeros(size.batch, np.float32)}


def _pgdist_step(
    size: Size, flat: dict[str, np.ndarray], batch: dict[str, np.ndarray], count: int
) -> Callable[[], float]:
    config = default_config()
    config.optimizer.learning_rate, config.schedule.name, config.schedule.warmup = RATE, "constant", 0.0
    shapes = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in flat_shapes(size.model).items()}
    scales = learning_rate_scales(shapes, TRAINABLE)
    mesh = make_mesh(data=count, fsdp=1, devices=jax.devices()[:count])
    placement = parameter_shardings(mesh, shapes)
    optimizer = make_optimizer(config, scales=scales, decayed=set())

    def trained(values: dict) -> dict:
        return unflatten({name: value for name, value in values.items() if scales[name]})

    shardings = state_shardings(optimizer, trained(placement), trained(shapes), mesh)
    step = make_train_step(
        PaliGemma(size.model),
        optimizer,
        make_schedule(config),
        mesh=mesh,
        shardings=shardings,
        parameters=placement,
    )
    arrays = {name: jax.device_put(array, placement[name]) for name, array in flat.items()}
    frozen = unflatten({name: array for name, array in arrays.items() if not scales[name]})
    state = init_state(optimizer, trained(arrays), shardings)
    placed = put_batch(batch, sharding=batch_sharding(mesh), batch_size=size.batch)

    def run() -> float:
        nonlocal state
        state, metrics = step(state, frozen, placed)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return run


def _transformers_step(
    size: Size, flat: dict[str, np.ndarray], batch: dict[str, np.ndarray]
) -> Callable[[], float]:
    model = build_transformers(size.model, flat, attention="sdpa").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = TRAINED_BY_TRANSFORMERS in name and "self_attn" in name
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=RATE)
    length = size.text_length - 1
    prefix = ((0, 0), (size.model.image.num_tokens, 0))
    pixels = (batch["image"].astype(np.float32) / 127.5 - 1.0).transpose(0, 3, 1, 2)
    inputs = {
        "input_ids": np.pad(batch["text"][:, :-1], prefix, constant_values=size.model.text.vocab_size),
        "attention_mask": np.pad(batch["mask_input"][:, :-1], prefix, constant_values=1),
        "token_type_ids": np.pad(batch["mask_ar"][:, :-1], prefix),
    }
    inputs = {key: torch.from_numpy(array).long() for key, array in inputs.items()}
    inputs["pixel_values"] = torch.from_numpy(np.ascontiguousarray(pixels))
    targets = torch.from_numpy(batch["text"][:, 1:]).long()
    scored = torch.from_numpy(batch["mask_loss"][:, 1:]).float()

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = model(**inputs, logits_to_keep=length, use_cache=False).logits
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = ((each.view_as(scored) * scored).sum(1) / scored.sum(1)).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


if __name__ == "__main__":
    main()
