"""Answers prompts about images with a trained model.

    python -m launch.predict --workdir=runs/demo --prompt="caption en" --images a.jpg b.png
    python -m launch.predict --workdir=runs/demo --prompt="caption en" --images=photos --out=captions.jsonl
    python -m launch.predict --workdir=runs/demo --data=questions.jsonl --out=answers.jsonl --sampler=beam --n=3
    python -m launch.predict --config=configs/demo.py --weights=a.npz --prompt="caption en" --images a.jpg
    python -m launch.predict --config=configs/notebook.py --compile_only --topology=v5e:4x4 --dump=/tmp/generate

Standard output gets the answers alone, one a line (a line break in an answer is written as \\n), in the order of the
inputs. --out gets JSON lines with the inputs beside them, as they come; the same command goes on where a run of it
stopped. Exit codes: 0 all answered, 1 a bug, 2 bad command line or config, 3 bad weights or input; where inputs cannot
be read, the others are answered.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from launch import compile_only, entry, membership, sampling_flags
from pgdist import heartbeat
from pgdist.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    import jax

    from pgdist.data.image_files import ImageSource
    from pgdist.data.jsonl import JsonlSource
    from pgdist.evaluate.answers_file import AnswersFile, Progress
    from pgdist.evaluate.choices import Choices
    from pgdist.plan import CompiledDecoding
    from pgdist.predict import Request

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
_IMAGES = flags.DEFINE_multi_string(
    "images", [], "Image files, or folders of them; more may follow: --images a.jpg b.png."
)
_PROMPT = flags.DEFINE_string(
    "prompt", None, "The prompt for all images, such as 'caption en'; with --data, instead of `prefix`."
)
_OUT = flags.DEFINE_string(
    "out", None, "JSONL to append to: index, image, prefix, suffix, prediction, score. See docs/predict.md."
)
_REPORT = flags.DEFINE_string(
    "report", None, "HTML file to write at the end: what is in --out beside the images, boxes drawn in them."
)
_LOGPROBS = flags.DEFINE_bool("logprobs", False, "Log-probabilities of answers and their tokens in --out.")
_CHOICES = flags.DEFINE_list(
    "choices", [], "Choose the likeliest of these, with commas between them, instead of writing an answer."
)
_CHOICES_FIELD = flags.DEFINE_string(
    "choices_field", None, "Likewise, but of those in this field of each line of --data, a list of texts."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, "Longest answer; the config's by default.", lower_bound=1
)
_MAX_PROMPT_TOKENS = flags.DEFINE_integer(
    "max_prompt_tokens", 512, "Longest prompt, with its start and separator.", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Inputs at a time; the config's by default.", lower_bound=1
)


def main(*more_images: str) -> None:
    """Reads the flags, finds what is to be answered, loads the model, answers."""
    if compile_only.is_wanted():
        compile_only.run(_compile)
        return
    images = [*_IMAGES.value, *more_images]
    _check_flags(images)
    heartbeat.beat("starting")
    stdout = membership.join_job()
    from pgdist import cluster, health, program_cache
    from pgdist.config import check_values
    from pgdist.evaluate.answers_file import AnswersFile
    from pgdist.inference import read_run_config
    from pgdist.predict import find_progress

    config = _CONFIG.value or read_run_config(_WORKDIR.value)
    check_values(config)
    health.check(config)
    program_cache.open_cache(_WORKDIR.value or "")
    # Devices need not be those of the training run.
    config.mesh.data = config.mesh.fsdp = -1
    request = _make_request(config, images)
    # Before the weights, which may take minutes to load.
    out = AnswersFile(
        _OUT.value if _OUT.value and cluster.is_primary() else os.devnull, describe=request.describe
    )
    progress = find_progress(out, request)
    if progress.rows == len(request.source):
        logging.info("--out=%s: all %d rows are there; nothing is left to do.", _OUT.value, progress.rows)
    else:
        if progress.rows:
            logging.info(
                "--out=%s: goes on after %d of %d rows.", _OUT.value, progress.rows, len(request.source)
            )
        heartbeat.beat("loading")
        progress = _answer(request, out, progress, stdout)
    if _REPORT.value:
        cluster.on_primary(lambda: _write_report(request.source.root))
    progress.failures.check()
    cluster.leave()


def _compile(devices: Sequence[jax.Device] | None) -> CompiledDecoding:
    if bool(_WORKDIR.value) == bool(_CONFIG.value):
        raise ConfigError("give --workdir=RUN or --config=FILE.py; not both")
    if given := [f"--{flag.name}" for flag in (_DATA, _IMAGES, _OUT, _REPORT) if flag.present]:
        raise ConfigError(f"{', '.join(given)}: --compile_only answers nothing; leave them out")
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
        sampling=sampling_flags.make_sampling(config, tokenizer=None),
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
    if _CHOICES.present or _CHOICES_FIELD.present:
        _check_choices()
    if _LOGPROBS.value and not _OUT.value:
        raise ConfigError("--logprobs are written to --out=FILE.jsonl, which is missing")
    if _REPORT.value and not _OUT.value:
        raise ConfigError("--report shows what is in --out=FILE.jsonl, which is missing")


def _check_choices() -> None:
    if _CHOICES.value and _CHOICES_FIELD.value:
        raise ConfigError("give --choices=A,B for all inputs, or --choices_field=NAME; not both")
    if _CHOICES_FIELD.value and not _DATA.value:
        raise ConfigError("--choices_field names a field of --data=FILE.jsonl, which is missing")
    if not (_CHOICES_FIELD.value or _CHOICES.value):
        raise ConfigError("--choices and --choices_field: expected texts, or a field's name, found nothing")
    if "" in _CHOICES.value:
        raise ConfigError(f"--choices={','.join(_CHOICES.value)}: one of them is empty")
    generating = sampling_flags.given() + ([f"--{_MAX_NEW_TOKENS.name}"] if _MAX_NEW_TOKENS.present else [])
    if generating:
        raise ConfigError(f"{', '.join(generating)}: with choices no answer is written: leave this out")


def _make_request(config: ConfigDict, images: Sequence[str]) -> Request:
    from pgdist import cluster
    from pgdist.decode.sampling import Sampling
    from pgdist.inference import open_tokenizer
    from pgdist.predict import Request

    weights = _find_weights(config)
    cluster.on_primary(lambda: _check_written([_DATA.value or "", weights, *images]))
    source = _open_source(config, images)
    tokenizer = open_tokenizer(config)
    choices = _find_choices(source)
    request = Request(
        config=config,
        weights=weights,
        tokenizer=tokenizer,
        source=source,
        sampling=Sampling() if choices else sampling_flags.make_sampling(config, tokenizer=tokenizer),
        choices=choices,
        max_new_tokens=_MAX_NEW_TOKENS.value or config.eval.max_new_tokens,
        max_prompt_tokens=_MAX_PROMPT_TOKENS.value,
        batch_size=_BATCH_SIZE.value or config.batch_size,
        settings={f"--{flag.name}": flag.value for flag in (_PROMPT, _LOGPROBS, _CHOICES, _CHOICES_FIELD)}
        | sampling_flags.patterns(),
    )
    if _PROMPT.value is not None:
        request.check_prompt(_PROMPT.value)
    return request


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


def _check_written(inputs: Sequence[str]) -> None:
    from pgdist.evaluate.answers_file import check_path, is_plain

    if _OUT.value:
        check_path(_OUT.value, flag="--out", inputs=inputs)
    if _REPORT.value:
        for flag in (_OUT, _REPORT):  # the one is read again, the other replaced
            if not is_plain(flag.value):
                raise ConfigError(
                    f"--{flag.name}={flag.value}: expected a file, where a --report is wanted; found a device or a pipe"
                )
        check_path(_REPORT.value, flag="--report", inputs=[*inputs, _OUT.value])


def _open_source(config: ConfigDict, images: Sequence[str]) -> JsonlSource | ImageSource:
    from pgdist import hub
    from pgdist.data.image_files import ImageSource, find_images
    from pgdist.data.jsonl import JsonlSource

    if images:
        return ImageSource(images=tuple(find_images(images)), prompt=_PROMPT.value)
    path = hub.fetch_examples(_DATA.value, field="--data")
    return JsonlSource(path, prefix=_PROMPT.value, lowercase=config.data.lowercase, require_suffix=False)


def _find_choices(source: JsonlSource | ImageSource) -> Choices | None:
    from pgdist.evaluate.choices import choices_for_all, choices_in_field

    if _CHOICES.value:
        return choices_for_all(_CHOICES.value)
    return choices_in_field(source, _CHOICES_FIELD.value) if _CHOICES_FIELD.value else None


def _answer(request: Request, out: AnswersFile, progress: Progress, stdout: IO[str]) -> Progress:
    """Prints and writes the answers that are missing, as they come; what there is then.

    Process 0 alone writes; the others go through the same answers, and end with the same code.
    """
    from pgdist import cluster
    from pgdist.evaluate.answers_file import answer_row

    n = request.sampling.n
    answers = request.answer(start=progress.rows)
    first = next(answers)  # a run that fails before it leaves no file behind
    with out.open(after=progress) as append:
        for answer in itertools.chain([first], answers):
            heartbeat.beat("evaluating")
            append(answer_row(answer, several=n > 1 or request.choices is not None, logprobs=_LOGPROBS.value))
            progress = progress.add(answer.error)
            if cluster.is_primary():
                texts = [candidate.text for candidate in answer.candidates]
                for number in range(n):  # always so many lines, that they tell which input they answer
                    text = texts[number] if number < len(texts) else ""
                    print(text.replace("\n", "\\n"), file=stdout, flush=True)
    return progress


def _write_report(image_root: str) -> None:
    from pgdist import report

    rows = report.read_rows(_OUT.value)
    try:
        report.write_predictions_report(_REPORT.value, rows, image_root=image_root, title=_OUT.value)
    except OSError as error:
        raise ConfigError(f"--report={_REPORT.value}: cannot be written: {error.strerror}.") from error


if __name__ == "__main__":
    entry.run(main, name="predict", usage=__doc__, positional="[IMAGE...]")
