"""How fast the devices here decode: tokens a second, time to the first one, share of the memory's bandwidth.

    python tools/bench/decode.py                                                  the tiny model
    python tools/bench/decode.py --presets paligemma-3b-224 --dtype=bfloat16 --batch_sizes 1 32 128 --json=FILE
    python tools/bench/decode.py --presets tiny --fake_devices=8

Random weights, images and prompts, greedy, by `pgdist.decode.Decoder`; all answers are of --new_tokens, for the
end-of-sequence token is one that no vocabulary has. `tokens/s` is of whole calls, images and prompts included, `first`
of calls that ask for one token, `ms a token` what each of the others takes. Such a step must read the decoder's
weights and the keys and values so far: their bytes on a device, over that time, are its rate, shown beside what the
memory gives at most. That is the maker's figure (`pgdist.chips`); on a CPU a dot product's, measured here and shared by
its devices. Medians of --rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np
from jax.sharding import Mesh

from launch.entry import simulate_devices
from pgdist import backend_flags
from pgdist.chips import memory_bandwidth
from pgdist.decode import Decoder
from pgdist.decode.prompts import PromptBatch
from pgdist.mesh import make_mesh
from pgdist.models import PaliGemma, PaliGemmaConfig
from pgdist.models.presets import PRESETS, preset
from pgdist.parameters import unflatten
from tests.models.small import random_batch
from tools.bench import table
from tools.bench.measured_step import random_leaf

NEVER = -1  # an id that no token has
_COLUMNS = (
    ("tokens/s", "tokens_per_second", 1, ",.1f"), ("first ms", "first_token_seconds", 1e3, ",.1f"),
    ("ms a token", "token_seconds", 1e3, ",.2f"), ("MB read", "step_bytes", 1e-6, ",.1f"),
    ("GB/s", "bytes_per_second", 1e-9, ",.1f"), ("of GB/s", "memory_bandwidth", 1e-9, ",.1f"),
    ("share %", "bandwidth_share", 100, ".1f"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is asked for: an answer of `new_tokens` to each of `batch_size` prompts of `prompt_tokens`."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int

    def batch(self, config: PaliGemmaConfig) -> PromptBatch:
        """Random images and prompts."""
        rows = range(self.batch_size)
        arrays = random_batch(
            config,
            prefixes=[self.prompt_tokens for _ in rows],
            suffixes=[0 for _ in rows],
            length=self.prompt_tokens,
            seed=0,
        )
        return PromptBatch(arrays=arrays | {"index": np.array(rows)})

    def calls(
        self, config: PaliGemmaConfig, params: Any, mesh: Mesh
    ) -> dict[str, Callable[[], list[list[int]]]]:
        """By what they return: "first", the first token of each answer; "all"."""
        batch = self.batch(config)

        def call(new_tokens: int) -> list[list[int]]:
            decoder = _make_decoder(config, mesh, batch_size=self.batch_size, new_tokens=new_tokens)
            return [each.answers[0].tokens for each in decoder.decode_batches(params, [batch])]

        return {"first": lambda: call(1), "all": lambda: call(self.new_tokens)}

    def speed(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Of how long each of the calls takes."""
        return {
            "tokens_per_second": self.batch_size * self.new_tokens / seconds["all"],
            "first_token_seconds": seconds["first"],
            "token_seconds": (seconds["all"] - seconds["first"]) / (self.new_tokens - 1),
        }


def median_seconds(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Of each call, made in turns, for the machine's mood changes; the first turn compiles and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            started = clock()
            call()
            seconds[name].append(clock() - started)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


def measure(config: PaliGemmaConfig, task: Task, params: Any, mesh: Mesh, *, rounds: int) -> dict[str, float]:
    """The figures of a task but for those of the memory's limit."""
    speed = task.speed(median_seconds(task.calls(config, params, mesh), rounds=rounds))
    read = step_bytes(config, params, task, devices=mesh.size)
    return {**speed, "step_bytes": read, "bytes_per_second": read / speed["token_seconds"]}


def step_bytes(config: PaliGemmaConfig, params: Any, task: Task, *, devices: int) -> float:
    """What a device must read for a token of each row: its part of the decoder, and the keys and values of its rows,
    half of the new tokens' among them.
    """
    weights = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(params["llm"])
    )
    text = config.text
    slots = config.image.num_tokens + task.prompt_tokens + task.new_tokens / 2
    features = 2 * text.depth * text.num_kv_heads * text.head_dim
    return weights + task.batch_size / devices * slots * features * np.dtype(text.dtype).itemsize


def _make_decoder(config: PaliGemmaConfig, mesh: Mesh, *, batch_size: int, new_tokens: int) -> Decoder:
    return Decoder(
        model=PaliGemma(config), mesh=mesh, batch_size=batch_size, max_new_tokens=new_tokens, eos_id=NEVER
    )


def describe_params(config: PaliGemmaConfig, mesh: Mesh) -> Any:
    """The nested tree of jax.ShapeDtypeStruct: where decoding wants parameters, in the dtypes that it computes in."""
    return unflatten(_make_decoder(config, mesh, batch_size=mesh.size, new_tokens=1).parameters())


def random_params(described: Any) -> Any:
    """Small arrays as described."""
    make = jax.jit(
        lambda: jax.tree_util.tree_map_with_path(random_leaf, described),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, described),
    )
    return make()


def measured_bandwidth() -> float:
    """Bytes/s that the cores of this machine read together: the fastest of several dot products of 512 MiB."""
    vector = np.ones(2**27, np.float32)
    calls = {str(turn): lambda: np.dot(vector, vector) for turn in range(7)}
    return vector.nbytes / min(median_seconds(calls, rounds=1).values())


def main() -> None:
    """Prints the table."""
    options = _options()
    if options.fake_devices:
        simulate_devices(options.fake_devices)
    backend_flags.apply(backend_flags.find_kind())
    mesh = make_mesh()
    device = mesh.devices.flat[0]
    limit = memory_bandwidth(device)
    if limit is None and device.platform == "cpu":
        limit = measured_bandwidth() / mesh.size
    dtype = options.dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    print(f"{mesh.size} x {device.device_kind}, mesh {dict(mesh.shape)}, {dtype}")
    print(table.heading(_COLUMNS))
    rows = []
    for name in options.presets:
        config = preset(name, image_dtype=dtype, text_dtype=dtype)
        params = random_params(describe_params(config, mesh))
        for batch_size in options.batch_sizes:
            task = Task(
                batch_size=-(-batch_size // mesh.size) * mesh.size,
                prompt_tokens=options.prompt_tokens,
                new_tokens=options.new_tokens,
            )
            found = measure(config, task, params, mesh, rounds=options.rounds)
            if limit is not None:
                share = found["bytes_per_second"] / limit
                found |= {"memory_bandwidth": limit, "bandwidth_share": share}
            found |= {"preset": name, "dtype": dtype, "devices": mesh.size, "kind": device.device_kind}
            rows.append(dataclasses.asdict(task) | found)
            print(table.line(_COLUMNS, f"{name}, batch {task.batch_size}", rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def add_task_options(parser: argparse.ArgumentParser, *, batch_sizes: list[int]) -> None:
    """Those that say what is asked for, and how often."""
    parser.add_argument("--batch_sizes", nargs="*", type=int, default=batch_sizes)
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=128, help="at least 2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the numbers")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="*", choices=PRESETS, default=["tiny"], metavar="NAME")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="by default float32 on a CPU, else bfloat16"
    )
    parser.add_argument("--fake_devices", type=int, default=0, help="of the CPU")
    add_task_options(parser, batch_sizes=[1, 8, 32])
    return parser.parse_args()


if __name__ == "__main__":
    main()
