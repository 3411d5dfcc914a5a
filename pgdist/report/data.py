"""What a workdir holds, read so that nothing in it can stop the report.

Every file may be absent, half written or damaged. What cannot be read is left out, and `Run.notes` says so
under the file's name; the line that a crash or a run still going on has left unfinished is not worth a note.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LARGEST = 2**53  # beyond it a float no longer tells integers apart

Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """metrics.jsonl by name. A step that was written twice counts once, as it was last written."""

    series: Mapping[str, Points]  # name -> (step, value) in the order of steps; values may be nan or infinite
    times: Points  # (step, Unix seconds) of the last line of each step

    def points(self, name: str) -> Points:
        return self.series.get(name, ())

    def values(self, name: str) -> list[float]:
        """The finite values of `name` in the order of steps."""
        return [value for _, value in self.points(name) if math.isfinite(value)]

    def at(self, name: str, *, step: int) -> float | None:
        return dict(self.points(name)).get(step)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One line of parameters.json."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    lr_scale: float
    decay: bool
    sharding: str
    bytes: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One line of examples.jsonl: an example as the model sees it. The four sequences have one length."""

    image: str | None  # a data URI of a raster image
    prefix: str
    suffix: str
    pieces: tuple[str, ...]
    mask_ar: tuple[int, ...]
    mask_loss: tuple[int, ...]
    mask_input: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One line of predictions/step_*.jsonl."""

    index: int
    image: str
    prefix: str
    truths: tuple[str, ...]  # none where nobody knows the answer
    text: str
    scores: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The predictions of one step."""

    step: int
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that the report tells of. `notes` maps a file's name to what is wrong with it."""

    workdir: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: Metrics
    bad_records: tuple[Mapping[str, Any], ...]
    parameters: tuple[Parameter, ...]
    examples: tuple[Example, ...]
    evaluations: tuple[Evaluation, ...]  # in the order of steps
    notes: Mapping[str, str]

    def setting(self, name: str, default: Any = None) -> Any:
        """The config's value at a dotted name such as "optimizer.name"."""
        value: Any = self.config
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return default if value is None else value


def load_run(workdir: str | os.PathLike[str]) -> Run:
    """Read the workdir; never raises because of what is, or is not, in it."""
    workdir = Path(workdir)
    notes: dict[str, str] = {}
    return Run(
        workdir=workdir,
        config=_read_object(workdir / "config.json", notes=notes),
        environment=_read_object(workdir / "env.json", notes=notes),
        metrics=_read_metrics(workdir / "metrics.jsonl", notes=notes),
        bad_records=_read_bad_records(workdir, notes=notes),
        parameters=_read_parameters(workdir / "parameters.json", notes=notes),
        examples=tuple(map(_example, _read_rows(workdir / "examples.jsonl", notes=notes))),
        evaluations=_read_evaluations(workdir / "predictions", notes=notes),
        notes=notes,
    )


def flatten_settings(tree: Mapping[str, Any], *, parent: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and JSON text of every leaf, as `--config.<name>=<value>` would spell them."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten_settings(value, parent=f"{parent}{name}.")
        else:
            yield f"{parent}{name}", json.dumps(value, ensure_ascii=False)


def _read_metrics(path: Path, *, notes: dict[str, str]) -> Metrics:
    series: dict[str, dict[int, float]] = {}
    times: dict[int, float] = {}
    for row in _read_rows(path, notes=notes):
        step = row.pop("step", None)
        if not isinstance(step, int) or not 0 <= step < _LARGEST:
            continue
        time = as_number(row.pop("time", None))
        if math.isfinite(time):
            times[step] = time
        for name, value in row.items():
            series.setdefault(name, {})[step] = as_number(value)
    return Metrics(
        series={name: tuple(sorted(points.items())) for name, points in series.items()},
        times=tuple(sorted(times.items())),
    )


def _read_bad_records(workdir: Path, *, notes: dict[str, str]) -> tuple[dict[str, Any], ...]:
    # Each process that met some has a file. Alone among the files, these are good news when they are missing.
    paths = sorted(workdir.glob("bad_records*.jsonl"))
    return tuple(row for path in paths for row in _read_rows(path, notes=notes))


def _read_parameters(path: Path, *, notes: dict[str, str]) -> tuple[Parameter, ...]:
    rows = _read_json(path, notes=notes)
    if rows is None:
        return ()
    try:
        return tuple(
            Parameter(
                name=str(row["name"]),
                shape=tuple(map(_whole, row["shape"])),
                dtype=str(row["dtype"]),
                trainable=bool(row["trainable"]),
                lr_scale=as_number(row.get("lr_scale")),
                decay=bool(row.get("decay")),
                sharding=str(row.get("sharding", "")),
                bytes=_whole(row.get("bytes", 0)),
            )
            for row in rows
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        notes[path.name] = f"{path.name} is not a list of parameters ({type(error).__name__}: {error})."
        return ()


def _read_evaluations(directory: Path, *, notes: dict[str, str]) -> tuple[Evaluation, ...]:
    evaluations = []
    for path in sorted(directory.glob("step_*.jsonl")):
        if match := re.fullmatch(r"step_(\d+)\.jsonl", path.name):
            rows = _read_rows(path, notes=notes)
            predictions = tuple(read_prediction(row, number=number) for number, row in enumerate(rows))
            evaluations.append(Evaluation(step=int(match[1]), predictions=predictions))
    if not evaluations:
        notes["predictions"] = "There are no predictions in this workdir."
    return tuple(sorted(evaluations, key=lambda evaluation: evaluation.step))


def read_prediction(row: Mapping[str, Any], *, number: int) -> Prediction:
    """The row `number` of predictions."""
    index, truth, scores = row.get("index"), row.get("suffix"), row.get("score")
    if not isinstance(scores, dict):  # without its name, as prediction writes it
        scores = {} if scores is None else {"score": scores}
    return Prediction(
        index=index if isinstance(index, int) else number,
        image=as_text(row.get("image")),
        prefix=as_text(row.get("prefix")),
        truths=() if truth is None else tuple(map(as_text, truth if isinstance(truth, list) else [truth])),
        text=as_text(row.get("prediction")),
        scores={name: as_number(value) for name, value in scores.items()},
    )


def _example(row: Mapping[str, Any]) -> Example:
    pieces = [as_text(piece) for piece in _list(row.get("pieces"))]
    masks = [_bits(row.get(name)) for name in ("mask_ar", "mask_loss", "mask_input")]
    length = min(len(pieces), *map(len, masks))
    return Example(
        image=raster_data_uri(row.get("image")),
        prefix=as_text(row.get("prefix")),
        suffix=as_text(row.get("suffix")),
        pieces=tuple(pieces[:length]),
        mask_ar=tuple(masks[0][:length]),
        mask_loss=tuple(masks[1][:length]),
        mask_input=tuple(masks[2][:length]),
    )


def raster_data_uri(value: Any) -> str | None:
    """`value` if it is an image that holds its own pixels, so that showing it fetches nothing; else None."""
    pattern = r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=]+"
    return value if isinstance(value, str) and re.fullmatch(pattern, value) else None


def _read_object(path: Path, *, notes: dict[str, str]) -> Mapping[str, Any]:
    value = _read_json(path, notes=notes)
    if value is not None and not isinstance(value, dict):
        notes[path.name] = f"{path.name} does not hold a JSON object."
        return {}
    return value or {}


def _read_json(path: Path, *, notes: dict[str, str]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        notes[path.name] = f"There is no {path.name} in this workdir."
    except (OSError, ValueError, RecursionError) as error:
        notes[path.name] = f"{path.name} could not be read: {error}"
    return None


def _read_rows(path: Path, *, notes: dict[str, str]) -> list[dict[str, Any]]:
    """The JSON objects of a JSONL file."""
    rows, unreadable = [], []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                row = parse_row(line)
                if row is not None:
                    rows.append(row)
                elif line.endswith(b"\n"):
                    unreadable.append(number)
    except FileNotFoundError:
        notes[path.name] = f"There is no {path.name} in this workdir."
    except OSError as error:
        notes[path.name] = f"{path.name} could not be read: {error}"
    if unreadable:
        found = f"{len(unreadable)} unreadable lines were left out, the first is line {unreadable[0]}"
        notes[path.name] = f"{path.name}: {found}."
    return rows


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, None where it is none."""
    try:
        row = json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []


def _bits(value: Any) -> list[int]:
    return [int(as_number(bit) == 1) for bit in _list(value)]


def as_text(value: Any) -> str:
    """Text as it is, nothing for null, JSON for the rest."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < _LARGEST:
        raise ValueError(f"{value!r:.40} is not a size")
    return value


def as_number(value: Any) -> float:
    """A number, or one of the strings that stand for what JSON lacks; nan for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
