"""Loading and converting weights at full size: time and memory, beside numpy's on the same file.

    python tools/bench/weights.py --folder=/tmp/weights          # a 3B file in float16, 5.8 GB, is written there
    python tools/bench/weights.py --folder=/tmp/weights --preset=tiny

Rows of the table:
  numpy      reads every byte of the file once and casts each block to bfloat16, in one thread
  load       the same file on 8 simulated devices, fsdp=8, attention float32, the rest bfloat16: time over numpy's, and
             peak memory beyond the process's own before it, in final arrays + so many times the largest array
  load x 2   by two processes of 4 devices: the share of the file that each has read, by the kernel's count
  convert    npz -> transformers -> npz: peak memory of each process, and whether the bytes are the same
Each is a process of its own. What is written is removed at the end, but for the file itself with --keep.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
_TILE = 2**24  # random numbers, repeated: what they are matters to nobody


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="where there is room for three times the file"
    )
    parser.add_argument("--preset", default="paligemma-3b-224")
    parser.add_argument("--keep", action="store_true", help="leave the file for the next run")
    parser.add_argument("--only", nargs="*", default=["load", "two", "convert"], help="load, two, convert")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / f"{arguments.preset}.f16.npz"
    if not path.exists():
        _run("write", path, arguments.preset)
    try:
        print(f"{path.name}: {path.stat().st_size / 1e9:.2f} GB")
        if "load" in arguments.only:
            _compare_loading(path, arguments.preset)
        if "two" in arguments.only:
            _load_with_two(path, arguments.preset)
        if "convert" in arguments.only:
            _convert(path, arguments.folder)
    finally:
        if not arguments.keep:
            path.unlink()


def _compare_loading(path: Path, preset: str) -> None:
    for _ in (1, 2):  # in turns: the machine's mood changes
        numpy_seconds = _run("numpy", path, preset)["seconds"]
        found = _run("load", path, preset)
        print(f"numpy     {numpy_seconds:6.1f} s")
        print(
            f"load      {found['seconds']:6.1f} s = {found['seconds'] / numpy_seconds:.2f} x numpy; memory "
            f"{found['peak'] / 1e9:.2f} GB = final arrays ({found['final'] / 1e9:.2f} GB) + "
            f"{(found['peak'] - found['final']) / found['largest']:.2f} x the largest ({found['largest'] / 1e9:.2f} GB)"
        )


def _load_with_two(path: Path, preset: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [_start("load", path, preset, address, str(index)) for index in range(2)]
    for index, process in enumerate(processes):
        found = _result(process)
        print(
            f"load x 2  {found['seconds']:6.1f} s; process {index} has read {found['read'] / 1e9:.2f} GB = "
            f"{found['read'] / path.stat().st_size:.1%} of the file"
        )


def _convert(path: Path, folder: Path) -> None:
    directory, back = folder / "transformers", folder / "back.npz"
    try:
        for source, target in ((path, directory), (directory, back)):
            found = _run("convert", source, str(target))
            print(
                f"convert   {found['seconds']:6.1f} s to {target.name}; memory {found['peak_total'] / 1e9:.2f} GB"
            )
        print(
            "convert   there and back: "
            + ("the same bytes" if filecmp.cmp(path, back, False) else "DIFFERENT")
        )
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        back.unlink(missing_ok=True)


def _run(task: str, *arguments: object) -> dict[str, float]:
    return _result(_start(task, *arguments))


def _start(task: str, *arguments: object) -> subprocess.Popen[str]:
    devices = 4 if len(arguments) > 2 else 8
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, __file__, "--task", task, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def _result(process: subprocess.Popen[str]) -> dict[str, float]:
    out, _ = process.communicate(timeout=1800)
    if process.returncode:
        sys.exit(f"{' '.join(process.args)} ended with {process.returncode}")
    return json.loads(out.splitlines()[-1])


def _task_write(path: str, preset: str) -> dict[str, float]:
    import numpy as np

    from pgdist.models.presets import PRESETS, parameter_shapes
    from pgdist.parameters import flatten
    from pgdist.weights.npz_writer import NpzWriter

    tile = (0.02 * np.random.default_rng(0).standard_normal(_TILE, dtype=np.float32)).astype(np.float16)
    with NpzWriter(path) as writer:
        for name, leaf in flatten(parameter_shapes(PRESETS[preset])).items():
            writer.write(name, np.resize(tile, leaf.shape))
    return {}


def _task_numpy(path: str, preset: str) -> dict[str, float]:
    import ml_dtypes
    import numpy as np

    started = time.perf_counter()
    size = 2**24
    np.seterr(invalid="ignore")  # the headers between the arrays are no numbers
    with open(path, "rb", buffering=0) as file:
        while data := file.read(size):
            np.frombuffer(data[: len(data) // 2 * 2], np.float16).astype(ml_dtypes.bfloat16)
    return {"seconds": time.perf_counter() - started}


def _task_load(path: str, preset: str, address: str = "", index: str = "0") -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from pgdist import weights
    from pgdist.mesh import make_mesh, parameter_shardings
    from pgdist.models.presets import PRESETS, parameter_shapes
    from pgdist.parameters import flatten

    if address:
        jax.distributed.initialize(address, 2, int(index))
    shapes = flatten(parameter_shapes(PRESETS[preset]))
    mesh = make_mesh(data=1, fsdp=8)
    expected = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if "/attn/" in name else jnp.bfloat16)
        for name, leaf in shapes.items()
    }
    jax.block_until_ready(jax.device_put(jnp.zeros(8)))
    before, already_read = _memory("VmRSS"), _bytes_read()
    started = time.perf_counter()
    arrays = weights.load(path, expected=expected, shardings=parameter_shardings(mesh, shapes))
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "peak": _memory("VmHWM") - before,
        "final": sum(array.nbytes for array in arrays.values()),
        "largest": max(array.nbytes for array in arrays.values()),
        "read": _bytes_read() - already_read,
    }


def _task_convert(source: str, target: str) -> dict[str, float]:
    from pgdist import weights

    started = time.perf_counter()
    weights.convert(source, target)
    return {"seconds": time.perf_counter() - started, "peak_total": _memory("VmHWM")}


def _memory(field: str) -> int:
    """Bytes of this process, resident: VmRSS now, VmHWM at most so far."""
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return 1024 * int(line.split()[1])


def _bytes_read() -> int:
    """What this process has asked the kernel for, whether a disk had to move or not."""
    return int(next(line for line in open("/proc/self/io") if line.startswith("rchar")).split()[1])


if __name__ == "__main__":
    if "--task" in sys.argv:
        task, *arguments = sys.argv[2:]
        print(json.dumps(globals()[f"_task_{task}"](*arguments)))
    else:
        main()
