"""Answers prompts about images with a trained model.

    python -m launch.predict --workdir=runs/demo --prompt="caption en" --images a.jpg b.png
    python -m launch.predict --workdir=runs/demo --data=questions.jsonl --out=answers.jsonl
    python -m launch.predict --config=configs/demo.py --weights=a.npz --prompt="caption en" --images a.jpg
    python -m launch.predict --config=configs/notebook.py --compile_only --topology=v5e:4x4 --dump=/tmp/generate

Standard output gets the answers alone, one a line (a line break in an answer is written as \\n), in the
order of the inputs; --out gets JSON lines with the inputs beside them, as FILE.partial until all are there.
Exit codes: 0 all answered, 1 a bug, 2 bad command line or config, 3 bad weights or input; where records of
--data cannot be read, the others are answered.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from launch import compile_only, entry, membership
from pgdist import heartbeat
from pgdist.errors import ConfigError, DataError, WeightsError

if TYPE_CHECKING:
    import jax

    from pgdist.data.jsonl import JsonlSource
    from pgdist.evaluate.runner import Prediction
    from pgdist.inference import LoadedModel
    from pgdist.plan import CompiledDecoding

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "A run, whose config is used, and its model.npz or newest checkpoint."
)
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Instead of a run's config: Python file with get_config()."
)
_WEIGHTS = flags.DEFINE_string(
    "weights", None, "Instead of the run's or the config's init: what --config.init takes, such as RUN@STEP."
)
_DATA = flags.DEFINE_string(
    "data", None, "JSONL with `image` and `prefix`, and `suffix` where there is a truth."
)
_IMAGES = flags.DEFINE_multi_string("images", [], "Image files; more may follow: --images a.jpg b.png.")
_PROMPT = flags.DEFINE_string(
    "prompt", None, "The prompt for all images, such as 'caption en'; with --data, instead of `prefix`."
)
_OUT = flags.DEFINE_string("out", None, "JSONL to write: image, prefix, suffix, prediction, score.")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, "Longest answer; the config's by default.", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Inputs at a time; the config's by default.", lower_bound=1
)

_SHOWN_ERRORS = 10


def main(*more_images: str) -> None:
    """Reads the flags, loads the model, answers."""
    if compile_only.is_wanted():
        compile_only.run(_compile)
        return
    images = [*_IMAGES.value, *more_images]
    _check_flags(images)
    heartbeat.beat("starting")
    stdout = membership.join_job()
    from pgdist import cluster, health, program_cache
    from pgdist.config import check_values
    from pgdist.inference import load_model, read_run_config

    config = _CONFIG.value or read_run_config(_WORKDIR.value)
    check_values(config)
    health.check(config)
    program_cache.open_cache(_WORKDIR.value or "")
    # Devices need not be those of the training run.
    config.mesh.data = config.mesh.fsdp = -1
    weights = _find_weights(config)
    _check_out([_DATA.value or "", weights, *images])
    # Before the weights, which may take minutes to load.
    source = _open_data(config) if _DATA.value else None
    heartbeat.beat("loading")
    loaded = load_model(config, weights)
    answers = _answer_data(config, loaded, source) if source else _answer_images(config, loaded, images)
    _write(answers, stdout)
    cluster.leave()


def _compile(devices: Sequence[jax.Device] | None) -> CompiledDecoding:
    if bool(_WORKDIR.value) == bool(_CONFIG.value):
        raise ConfigError("give --workdir=RUN or --config=FILE.py; not both")
    from pgdist import plan
    from pgdist.config import check_values
    from pgdist.inference import read_run_config

    config = _CONFIG.value or read_run_config(_WORKDIR.value)
    check_values(config)
    return plan.compile_decoding(
        config,
        batch_size=_BATCH_SIZE.value or config.batch_size,
        prompt_tokens=config.data.text_length,
        max_new_tokens=_MAX_NEW_TOKENS.value or config.eval.max_new_tokens,
        devices=devices,
    )


def _check_flags(images: Sequence[str]) -> None:
    if bool(_WORKDIR.value) == bool(_CONFIG.value):
        raise ConfigError(
            "give --workdir=RUN (a finished run), or --config=FILE.py with --weights=FILE.npz; not both"
        )
    if bool(_DATA.value) == bool(images):
        raise ConfigError(
            "give what to answer: --data=FILE.jsonl, or --images a.jpg b.png with --prompt='caption en'; "
            "not both"
        )
    if images and _PROMPT.value is None:
        raise ConfigError("--images needs --prompt, such as --prompt='caption en'")
    if missing := [image for image in images if not os.path.exists(image)]:
        raise DataError(f"--images: no such file: {', '.join(missing)}")


def _find_weights(config: ConfigDict) -> str:
    from pgdist.workdir import Workdir

    if _WEIGHTS.value:
        return _WEIGHTS.value
    if _CONFIG.value:
        if not config.init:
            raise ConfigError("config.init names no weights to decode with: give --weights=FILE.npz")
        return config.init
    workdir = Workdir(_WORKDIR.value)
    path = workdir.fetch_model()
    if not path.exists() and workdir.checkpoints.exists():
        return _WORKDIR.value  # the run goes on, or exports nothing: its newest checkpoint
    if not path.exists():
        raise WeightsError(
            f"{path}: no such file: the run has not finished, and has no checkpoint yet. Start launch.train "
            "again with its --workdir to finish it, or give --weights=FILE.npz."
        )
    return str(path)


def _check_out(inputs: Sequence[str]) -> None:
    """Raises ConfigError for an --out that cannot be written or would replace an input; changes nothing."""
    if not _OUT.value:
        return
    out = Path(os.path.realpath(_OUT.value))
    if out.is_dir():
        raise ConfigError(f"--out={_OUT.value}: expected a file to write, found a folder")
    if not out.parent.is_dir():
        raise ConfigError(f"--out={_OUT.value}: there is no folder {out.parent}; make it first")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--out={_OUT.value}: the folder {out.parent} cannot be written; name another one")
    if str(out) in map(os.path.realpath, inputs):
        raise ConfigError(
            f"--out={_OUT.value}: is an input too, which the answers would replace; name another file"
        )


def _answer_images(config: ConfigDict, loaded: LoadedModel, images: Sequence[str]) -> Iterator[Prediction]:
    from pgdist.decode import generate
    from pgdist.evaluate.runner import Prediction

    texts = generate(
        loaded.model,
        loaded.params,
        images=images,
        prompts=_PROMPT.value,
        tokenizer=loaded.tokenizer,
        max_new_tokens=_MAX_NEW_TOKENS.value or config.eval.max_new_tokens,
        batch_size=min(len(images), _BATCH_SIZE.value or config.batch_size),
        mesh=loaded.mesh,
    )
    for index, (image, text) in enumerate(zip(images, texts, strict=True)):
        yield Prediction(index=index, image=image, prefix=_PROMPT.value, prediction=text)


def _open_data(config: ConfigDict) -> JsonlSource:
    from pgdist import hub
    from pgdist.data.jsonl import JsonlSource

    lowercase = config.data.lowercase
    path = hub.fetch_examples(_DATA.value, field="--data")
    return JsonlSource(path, prefix=_PROMPT.value, lowercase=lowercase, require_suffix=False)


def _answer_data(config: ConfigDict, loaded: LoadedModel, source: JsonlSource) -> Iterator[Prediction]:
    from pgdist.evaluate.metrics import metric
    from pgdist.evaluate.runner import Evaluator

    devices = loaded.mesh.size
    evaluator = Evaluator(
        model=loaded.model,
        mesh=loaded.mesh,
        source=source,
        tokenizer=loaded.tokenizer,
        text_length=config.data.text_length,
        batch_size=-(-(_BATCH_SIZE.value or config.batch_size) // devices) * devices,
        max_new_tokens=_MAX_NEW_TOKENS.value or config.eval.max_new_tokens,
        metric=metric(config.eval.metric),
    )
    return evaluator.predict(loaded.params, {})


def _write(answers: Iterator[Prediction], stdout: IO[str]) -> None:
    """Prints and writes the answers as they come; DataError at the end for inputs that could not be read.

    Process 0 alone writes; the others go through the same answers, and end with the same code.
    """
    from pgdist import cluster

    errors = []
    first = next(answers)  # a run that fails before it leaves no file behind
    with _open_out(_OUT.value if cluster.is_primary() else None) as out:
        for answer in itertools.chain([first], answers):
            heartbeat.beat("evaluating")
            if answer.error is not None:
                errors.append(answer.error)
            if cluster.is_primary():
                print(answer.prediction.replace("\n", "\\n"), file=stdout, flush=True)
            out.write(json.dumps(_row(answer), ensure_ascii=False) + "\n")
            out.flush()
    if errors:
        shown = [f"  {error}" for error in errors[:_SHOWN_ERRORS]]
        if len(errors) > _SHOWN_ERRORS:
            shown.append(f"  and {len(errors) - _SHOWN_ERRORS} more")
        raise DataError("\n".join([f"{len(errors)} input(s) could not be read and have no answer:", *shown]))


def _row(answer: Prediction) -> dict[str, Any]:
    row = {name: getattr(answer, name) for name in ("index", "image", "prefix", "suffix", "prediction")}
    if answer.error is not None:
        return {"index": answer.index, "prediction": None, "error": answer.error}
    return (
        row
        | ({} if answer.score is None else {"score": answer.score})
        | {name: value for name, value in answer.extra.items() if name not in row}
    )


@contextlib.contextmanager
def _open_out(path: str | None) -> Iterator[IO[str]]:
    """The file for the answers: beside `path` until all are there, then in its place; None is nowhere."""
    out = os.path.realpath(path or os.devnull)
    # What is there and no plain file is a device or a pipe: /dev/null must stay what it is.
    is_plain = os.path.isfile(out) or not os.path.exists(out)
    written = out + ".partial" if is_plain else out
    try:
        file = open(written, "w", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError(f"--out={path}: cannot write {written}: {error.strerror}") from error
    with file:
        yield file
    if is_plain:
        os.replace(written, out)


if __name__ == "__main__":
    entry.run(main, name="predict", usage=__doc__, positional="[IMAGE...]")
