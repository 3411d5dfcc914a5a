"""A training run as a source: what a checkpoint holds of the model, over the weights that the run began with.

The run's own files say what belongs together: config.json names the base and how it was fitted, parameters.json has
every array's shape. The trained arrays are read where Orbax keeps them, box by box (its format is OCDBT with zarr 3).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore
from etils import epath
from orbax.checkpoint import v1 as ocp

from pgdist import files
from pgdist.errors import WeightsError
from pgdist.models.presets import config_of
from pgdist.parameters import flatten, unflatten
from pgdist.weights import boxes, fitting
from pgdist.weights.array_info import ArrayInfo
from pgdist.weights.boxes import Box
from pgdist.weights.pieces import ModelArray, whole_piece
from pgdist.weights.source import Opener, Source
from pgdist.weights.stored import Block, blaming, damaged

_CONFIG, _PARAMETERS, _CHECKPOINTS = "config.json", "parameters.json", "checkpoints"
_STEP = re.compile(r"(.+)@(\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunName:
    """A run's folder, and one of its checkpoints' steps; None is the newest."""

    folder: str
    step: int | None


def run_name(name: str) -> RunName | None:
    """The run that `WORKDIR` or `WORKDIR@STEP` means; None for what is no run's folder."""
    match = _STEP.fullmatch(name)
    for folder, step in ((name, None), (match[1], int(match[2])) if match else (name, None)):
        path = _folder(folder)
        if (path / _PARAMETERS).exists() and (path / _CONFIG).exists():
            return RunName(folder=folder, step=step)
    return None


@contextlib.contextmanager
def open_run(name: RunName, open_base: Opener) -> Iterator[Source]:
    """The run's arrays at a step: those that train as float32 masters, the others as the base has them.

    open_base: opens the source that the run's config.init names.  Raises WeightsError where the run, its checkpoint
    or its base is missing or damaged, and where the base is not what the run began with.
    """
    folder = _folder(name.folder)
    config, table = _read(folder / _CONFIG), _read(folder / _PARAMETERS)
    try:
        shapes = {row["name"]: tuple(row["shape"]) for row in table}
        trained = [row["name"] for row in table if row["trainable"]]
        init, softcap = config["init"], config["model"]["final_logits_softcap"]
        seed, skip, tokenizer = config["seed"], config.get("init_skip", ()), config["tokenizer"]
    except (KeyError, TypeError) as error:
        raise WeightsError(
            f"{name.folder}: its {_CONFIG} or {_PARAMETERS} is damaged: no {error}."
        ) from error
    checkpoint = _Checkpoint(folder / _CHECKPOINTS, name, trained, shapes)
    stored: dict[str, Any] = dict(checkpoint.arrays)
    arrays = {name: ModelArray(info=a.info, pieces=(whole_piece(a.info),)) for name, a in stored.items()}
    processor_folder = None
    with contextlib.ExitStack() as stack:
        if init:
            base = stack.enter_context(open_base(init))
            checkpoint.check_base(base, init)
            processor_folder = base.folder
            expected = {
                name: ArrayInfo(name=name, shape=shape, dtype=np.dtype("f4"))
                for name, shape in shapes.items()
            }
            fitted = fitting.fit(base, expected, skip=skip, seed=seed)
            stored = dict(fitted.stored) | {f"trained:{name}": array for name, array in stored.items()}
            arrays = dict(fitted.arrays) | {
                name: ModelArray(
                    info=array.info,
                    pieces=(dataclasses.replace(array.pieces[0], stored_name=f"trained:{name}"),),
                )
                for name, array in arrays.items()
            }
        if missing := [name for name in shapes if name not in arrays]:
            raise WeightsError(
                f"{name.folder}: array {missing[0]!r} (of {len(missing)}) was frozen at random numbers, which no file "
                f"holds. Name the run's model.npz instead: {name.folder}/model.npz."
            )
        yield Source(
            name=f"{name.folder}, step {checkpoint.step}",
            arrays={name: arrays[name] for name in shapes},
            stored=stored,
            fingerprint=checkpoint.fingerprint,
            config=config_of(shapes, final_logits_softcap=softcap),
            folder=processor_folder,
            tokenizer=tokenizer,
        )


class _Checkpoint:
    """One of a run's checkpoints: its step, and the trained arrays in it."""

    def __init__(
        self,
        directory: epath.Path,
        name: RunName,
        trained: Sequence[str],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        steps = _steps(directory)
        step = name.step if name.step is not None else max(steps, default=None)
        if step not in steps:
            there = f"it has those of step {', '.join(map(str, steps))}" if steps else "it has none"
            wanted = "a checkpoint" if step is None else f"the checkpoint of step {step}"
            raise WeightsError(f"{name.folder}: expected {wanted}; {there}.")
        self.step = step
        self._path = directory / str(step)
        with _alone():
            metadata = ocp.metadata(self._path).custom_metadata or {}
        self._base = metadata.get("base_weights")
        self._checksums = metadata.get("checksums", [])
        # The step, the trained arrays in the order of their tree, and the optimizer's state.
        order = flatten(unflatten({name: name for name in trained}))
        sums = self._checksums[1 : 1 + len(order)]
        self.arrays = {
            name: _TrainedArray(
                ArrayInfo(name=name, shape=shapes[name], dtype=np.dtype(np.float32)),
                path=self._path,
                checksum=total,
            )
            for name, total in zip(order, sums, strict=True)
        }

    def check_base(self, base: Source, init: str) -> None:
        """Raises WeightsError if the base is not what the run began with."""
        if self._base is not None and base.fingerprint() != self._base:
            raise WeightsError(
                f"{self._path} was trained on other weights than {init} holds now (config.init of the run). Put those "
                "back that the run began with."
            )

    def fingerprint(self) -> str:
        """Of what training changed and what it began with."""
        return f"step {self.step}, {self._checksums}, on {self._base}"


class _TrainedArray:
    """A StoredArray in an Orbax checkpoint."""

    min_run = 2**18  # elements: reading is by chunks, which are large

    def __init__(self, info: ArrayInfo, *, path: epath.Path, checksum: int) -> None:
        self.info = info
        self.nbytes = info.nbytes
        self._path = path
        self._checksum = checksum
        self._array: tensorstore.TensorStore | None = None

    def read(self, view: Sequence[int], box: Box) -> Block:
        """See StoredArray; the block's checksum is the sum of the numbers' bits."""
        with blaming(self._path, self.info.name):
            try:
                numbers = self._open()[boxes.within(box, boxes.whole(view))].read().result()
            except ValueError as error:  # of tensorstore, for all kinds of damage
                raise damaged(self._path, self.info.name, error) from error
        total = int(numbers.view(np.uint32).sum(dtype=np.uint64) % 2**32)
        offset = boxes.offset_of(box, view) * self.info.dtype.itemsize
        return Block(box=box, numbers=numbers, offset=offset, size=numbers.nbytes, crc=total)

    def check(self, blocks: Iterable[Block]) -> None:
        """See StoredArray."""
        blocks = list(blocks)
        is_whole = sum(block.size for block in blocks) == self.nbytes
        if is_whole and sum(block.crc for block in blocks) % 2**32 != self._checksum:
            raise damaged(self._path, self.info.name, "its numbers are not those that were saved")

    def release(self) -> None:
        """See StoredArray."""
        self._array = None

    def _open(self) -> tensorstore.TensorStore:
        if self._array is None:
            url = os.fspath(self._path / "state")
            spec = {
                "driver": "zarr3",
                # A finished checkpoint does not change: its index is read once.
                "recheck_cached_metadata": "open",
                "recheck_cached_data": "open",
                "kvstore": {
                    "driver": "ocdbt",
                    "base": f"{url if files.is_url(url) else f'file://{os.path.abspath(url)}'}/",
                    "path": f"trainable.{self.info.name.replace('/', '.')}/",
                },
            }
            self._array = tensorstore.open(spec, open=True, read=True).result()
        return self._array


def _steps(directory: epath.Path) -> list[int]:
    """The steps that have a finished checkpoint, ascending: Orbax renames it when it is, or marks it in a bucket."""
    names = [name for name in files.names_in(directory) if name.isdecimal()]
    if files.is_url(directory):
        names = [name for name in names if (directory / name / "commit_success.txt").exists()]
    return sorted(map(int, names))


def _alone() -> ocp.Context:
    """For Orbax: this process reads by itself, whatever the others of the job do."""
    context = ocp.Context()
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
    return context


def _folder(name: str) -> epath.Path:
    if files.is_url(name):
        files.prepare_buckets(name)
        return epath.Path(name)
    return epath.Path(os.path.abspath(os.path.expanduser(name)))


def _read(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: expected JSON, as a run writes it, found: {error}") from error
