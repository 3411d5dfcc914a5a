"""What a training step costs, as a table over cases: compiled for TPUs that are not here, or measured on what is here.

    python tools/bench/train_step.py                                       all cases; a minute or more each
    python tools/bench/train_step.py --cases v5e-224 v5e-448 --json=FILE
    python tools/bench/train_step.py --cases v5e-224 --against=HEAD~3      beside another revision
    python tools/bench/train_step.py --cases v5e-224 --with="--config.model.remat=full"      beside other settings
    python tools/bench/train_step.py --config=configs/demo.py --measure    steps of a config, on the devices here
    python tools/bench/train_step.py --config=configs/demo.py --measure --fake_devices=8

Compiling needs pgdist[plan]; --python names an interpreter that has it. Cycles, bytes and memory are the compiler's, of
one chip; `links` is the time in which those bytes pass, `larger` the larger of that and of compute, and `exposed` the
bytes over which no compute is scheduled (`launch.train --compile_only`). A line begins with ! where a kernel is not
charged or a loop's length not known: its cycles are too few. What is measured has random weights and examples.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.bench import table

ROOT = Path(__file__).parents[2]
ATTENTION, ALL = (("llm/layers/attn/.*", 1.0), (".*", 0.0)), ((".*", 1.0),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A config and the TPUs that it is compiled for; attention alone trains, by SGD, unless all does, by AdamW."""

    topology: str
    preset: str
    rows: int  # a chip
    mesh: tuple[int, int]  # data, fsdp
    trains_all: bool = False
    remat: str = "dots"

    def config_file(self) -> str:
        """Python that a config of these fields comes from."""
        fields = {
            "model.preset": self.preset,
            "model.image_dtype": "bfloat16",
            "model.text_dtype": "bfloat16",
            "model.remat": self.remat,
            "frozen_dtype": "bfloat16",
            "batch_size": self.rows * self.mesh[0] * self.mesh[1],
            "data.text_length": 128,
            "mesh.data": self.mesh[0],
            "mesh.fsdp": self.mesh[1],
            "trainable": ALL if self.trains_all else ATTENTION,
            "optimizer.name": "adamw" if self.trains_all else "sgd",
        }
        return (
            "from pgdist.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"
            f"    config.update_from_flattened_dict({fields!r})\n    return config\n"
        )


def _large(preset: str) -> Case:
    return Case(topology="v5e:16x16", preset=preset, rows=1, mesh=(2, 128), trains_all=True, remat="full")


CASES = {
    "v5e-224": Case(topology="v5e:4x4", preset="paligemma-3b-224", rows=8, mesh=(1, 16)),
    "v5e-448": Case(topology="v5e:4x4", preset="paligemma-3b-448", rows=4, mesh=(1, 16)),
    "v5e-896": Case(topology="v5e:4x4", preset="paligemma-3b-896", rows=1, mesh=(1, 16)),
    "v5e-224-all": Case(topology="v5e:4x4", preset="paligemma-3b-224", rows=8, mesh=(1, 16), trains_all=True),
    "v5e-256-chips": Case(topology="v5e:16x16", preset="paligemma-3b-224", rows=4, mesh=(16, 16)),
    "v6e-224": Case(topology="v6e:4x4", preset="paligemma-3b-224", rows=8, mesh=(1, 16)),
    "v5e-10b-all": _large("paligemma2-10b-224"),
    "v5e-28b-all": _large("paligemma2-28b-224"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A checkout and what is added to its command lines."""

    name: str
    root: Path
    overrides: Sequence[str] = ()


# Of the table: heading, width, format of what is found in a row.
_COLUMNS = {
    "compile": (
        ("M cycles", "cycles", 1e-6, ",.1f"), ("compute ms", "compute_seconds", 1e3, ",.1f"),
        ("links ms", "link_seconds", 1e3, ",.1f"), ("larger ms", "larger_seconds", 1e3, ",.1f"),
        ("MFU %", "mfu", 100, ".1f"), ("results GB", "result_bytes", 1e-9, ".3f"),
        ("exposed GB", "exposed_bytes", 1e-9, ".3f"), ("GiB", "memory_bytes", 2**-30, ".2f"),
    ),
    "measure": (
        ("ms a step", "seconds", 1e3, ",.1f"), ("examples/s", "examples_per_second", 1, ",.1f"),
        ("MFU %", "mfu", 100, ".1f"), ("GiB", "memory_bytes", 2**-30, ".2f"),
        ("compile s", "compile_seconds", 1, ".1f"),
    ),
}  # fmt: skip


def main() -> None:
    """Prints the table."""
    options = _options()
    task = "measure" if options.measure else "compile"
    print(table.heading(_COLUMNS[task]))
    rows = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        variants = [Variant(name="", root=ROOT)]
        if options.against:
            root = stack.enter_context(_checkout(options.against, folder / "other"))
            variants.append(Variant(name=options.against, root=root))
        if options.other:
            variants.append(Variant(name=options.other, root=ROOT, overrides=shlex.split(options.other)))
        for name, config, topology in _chosen(options, folder):
            for variant in variants:
                row = _run(task, config, topology, variant, options, folder / "dump")
                rows.append({"case": name, "variant": variant.name, **row})
                print(_line(task, f"{'  beside ' + variant.name if variant.name else name}", row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--config", type=Path, help="a config file, instead of cases")
    parser.add_argument("--topology", help="of --config, if it is to be compiled")
    parser.add_argument("--against", metavar="REVISION", help="of git, beside this checkout")
    parser.add_argument("--with", dest="other", metavar="FLAGS", help="of launch.train, beside none")
    parser.add_argument("--measure", action="store_true", help="run the steps, on the devices here")
    parser.add_argument("--fake_devices", type=int, default=0, help="of the CPU, to measure on")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    if options.config is not None and not (options.measure or options.topology):
        parser.error("--config needs --topology, or --measure")
    if options.config is None and (options.topology or options.fake_devices):
        parser.error("--topology and --fake_devices are for --config")
    return options


def _chosen(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Path, str | None]]:
    """(name, config file, topology) of each case."""
    if options.config is not None:
        yield options.config.stem, options.config.resolve(), options.topology
        return
    for name in options.cases:
        path = folder / f"{name}.py"
        path.write_text(CASES[name].config_file())
        yield name, path, CASES[name].topology


@contextlib.contextmanager
def _checkout(revision: str, folder: Path) -> Iterator[Path]:
    """The revision's files in a folder, as long as they are needed."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), revision], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def _run(
    task: str, config: Path, topology: str | None, variant: Variant, options: argparse.Namespace, dump: Path
) -> dict[str, Any]:
    """The figures of one case; {"error": ...} where there are none."""
    if task == "measure":
        command = [str(ROOT / "tools/bench/measured_step.py")]
        command += [f"--fake_devices={options.fake_devices}"] * bool(options.fake_devices)
    else:
        command = ["-m", "launch.train", "--compile_only", f"--topology={topology}", f"--dump={dump}"]
    done = subprocess.run(
        [options.python, *command, f"--config={config}", *variant.overrides],
        cwd=variant.root,
        env=os.environ | {"PYTHONPATH": str(variant.root)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [""])[-1], "code": done.returncode}
    if task == "measure":
        return json.loads(done.stdout.splitlines()[-1])
    found = json.loads((dump / "train_step.json").read_text())
    compiled, estimated = found["compiled"], found["estimated"]
    return {
        **compiled,
        **estimated,
        "result_bytes": sum(each["nbytes"] for each in compiled["collectives"].values()),
        "exposed_bytes": sum(each["sent"] for each in compiled["exposed"]),
    }


def _line(task: str, name: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"  {name:<32}  {row['error']}"
    invalid = row.get("uncharged_kernels") or row.get("loops_of_unknown_length")
    return table.line(_COLUMNS[task], f"{'!' if invalid else ' '} {name}", row)


if __name__ == "__main__":
    main()
