"""Times the training step of a config on the devices here: random weights and examples, every suffix as long as fits.

    python tools/bench/measured_step.py --config=configs/demo.py [--fake_devices=8] [--config.FIELD=VALUE ...]

Prints one line of JSON: seconds a step (the median), examples a second, MFU where the chip's peak is known, the
memory of the fullest device at most (null on a CPU), and the seconds that compiling took. `train_step.py --measure`
makes a table of it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import time
import typing
import zlib
from typing import Any

from absl import flags
from ml_collections import config_flags

from launch import entry, membership

if typing.TYPE_CHECKING:
    import jax

    from pgdist.parts import StepInputs
    from pgdist.train.state import TrainState

_CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
_STEPS = flags.DEFINE_integer("steps", 10, "That are timed.", lower_bound=1)
_WARM_UP = 2


def main() -> None:
    """Prints the line."""
    entry.require("config")
    answers = membership.join_job()
    import jax

    from pgdist.chips import peak_flops
    from pgdist.config import check_values
    from pgdist.parts import Parts

    config = _CONFIG.value
    check_values(config)
    parts = Parts(config)
    inputs = parts.step_inputs()
    started = time.perf_counter()
    step = parts.train_step.lower(inputs.state, inputs.frozen, inputs.batch).compile()
    compile_seconds = time.perf_counter() - started
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (inputs.state, inputs.frozen, dict(inputs.batch)))
    make_inputs = functools.partial(_random_inputs, inputs, vocab_size=parts.model.config.text.vocab_size)
    state, frozen, batch = jax.jit(make_inputs, out_shardings=shardings)()
    seconds = []
    for _ in range(_WARM_UP + _STEPS.value):
        started = time.perf_counter()
        state, _ = step(state, frozen, batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[_WARM_UP:])
    flops = parts.flops_per_example
    peak = peak_flops(parts.mesh.devices.flat[0])
    memory = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    found = {
        "devices": f"{parts.mesh.size} x {parts.mesh.devices.flat[0].device_kind}",
        "seconds": median,
        "examples_per_second": config.batch_size / median,
        "mfu": None if peak is None else flops * config.batch_size / median / peak / parts.mesh.size,
        "memory_bytes": None if None in memory else max(memory),
        "compile_seconds": compile_seconds,
    }
    print(json.dumps(found), file=answers, flush=True)


def random_leaf(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """A small array of its shape and dtype, for `jax.tree_util.tree_map_with_path`; the path is its seed."""
    import jax

    key = jax.random.key(zlib.crc32(jax.tree_util.keystr(path).encode()))
    return 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)


def _random_inputs(inputs: StepInputs, *, vocab_size: int) -> tuple[TrainState, Any, dict[str, jax.Array]]:
    """Small weights, no optimizer state yet, and texts of which all but the first token is scored."""
    import jax
    import jax.numpy as jnp

    shapes = {name: leaf.shape for name, leaf in inputs.batch.items()}
    batch = {name: jnp.ones(leaf.shape, leaf.dtype) for name, leaf in inputs.batch.items()}
    batch |= {name: jnp.zeros(shapes[name], jnp.float32) for name in ("truncated", "stop")}
    batch["image"] = jax.random.randint(jax.random.key(0), shapes["image"], 0, 256).astype(jnp.uint8)
    batch["text"] = jax.random.randint(jax.random.key(1), shapes["text"], 0, vocab_size)
    state = dataclasses.replace(
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), inputs.state),
        trainable=jax.tree_util.tree_map_with_path(random_leaf, inputs.state.trainable),
    )
    return state, jax.tree_util.tree_map_with_path(random_leaf, inputs.frozen), batch


if __name__ == "__main__":
    entry.run(main, name="measured_step", usage=__doc__)
