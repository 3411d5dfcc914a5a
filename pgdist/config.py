"""Every field of a run's config with its default, and the check that a config makes sense before anything is
read.

A config file defines `get_config()`, which starts from `default_config()` and changes what its task needs.
Any field can be
overridden on the command line: `--config.optimizer.learning_rate=0.01`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, get_args

from ml_collections import ConfigDict

from pgdist.decode.sampling import Method, Sampling
from pgdist.errors import ConfigError
from pgdist.models.attention import IMPLEMENTATIONS
from pgdist.models.paligemma import PaliGemmaConfig
from pgdist.models.presets import PRESETS, preset
from pgdist.models.remat import REMAT_POLICIES
from pgdist.train.optimizer import OPTIMIZERS, SCHEDULES

FLOAT_DTYPES = ("float32", "bfloat16", "float16")

# By the type of a field's default: the types that its value may have, and how to say so.
_TYPES = {
    bool: (bool, "True or False"),
    int: (int, "a whole number"),
    float: ((float, int), "a number"),
    str: (str, "text"),
    tuple: ((tuple, list), "a tuple"),
}


def default_config() -> ConfigDict:
    """A fresh, locked ConfigDict of all fields; `model.preset`, `init`, `tokenizer` and `data.train` are the
    user's to set.
    """
    c = ConfigDict()
    c.seed = 0  # order of examples, choice among suffixes, initial weights
    c.steps = 64
    c.batch_size = 8  # global: all processes and devices together
    c.gradient_accumulation_steps = (
        1  # parts that a batch is computed in, one after the other: the same, in less memory
    )
    # Weights to start from: an npz in the published layout, a transformers folder, or a run's folder (runs/cows, or
    # runs/cows@64 for a step); local, gs://, hf:// or kaggle://; several with commas; "" starts from random ones.
    c.init = ""
    c.init_skip = ()  # regexes over names: what they match is not read, and starts at random
    c.init_allow_non_finite = False  # NaN and infinity in the file are errors otherwise
    c.tokenizer = ""  # a SentencePiece model; local, gs://, hf:// or kaggle://
    c.export = True  # write the trained model to WORKDIR/model.npz at the end
    c.patience = 3  # steps in a row that may have a non-finite loss or gradient; they change nothing

    c.model = ConfigDict()
    c.model.preset = "paligemma-3b-224"
    c.model.image_dtype = "bfloat16"  # what each tower computes in
    c.model.text_dtype = "bfloat16"
    c.model.final_logits_softcap = 0.0  # 0: none, which transfers better (PaliGemma 2 paper)
    c.model.remat = "dots"  # what the backward pass recomputes: none, dots (all but matmuls of weights), full
    c.model.attention = (
        "auto"  # how it is computed in training: auto, plain, chunked, splash (TPU), cudnn (GPU)
    )

    # Which parameters train: the first regex that matches a whole name gives its learning-rate scale, 0
    # freezes it.
    c.trainable = (("llm/layers/attn/.*", 1.0), (".*", 0.0))
    # What frozen parameters are kept in; "file": each as the file has it. Trainable ones are float32, always.
    c.frozen_dtype = "bfloat16"

    c.data = ConfigDict()
    c.data.train = ""  # JSONL with `image`, `prefix`, `suffix`, and the images beside it; local or gs://
    c.data.validation = ""  # likewise; "" for no evaluation
    c.data.prefix = ""  # instead of the `prefix` of each record; "" leaves them theirs
    c.data.lowercase = False  # lower-case the suffixes
    c.data.text_length = 128  # tokens of prefix, suffix and their marks; longer texts are cut and counted
    c.data.max_scored_positions = 0  # suffix tokens scored in each example, 0: all
    c.data.max_bad_share = 0.01  # of unreadable records among all; above it the job ends
    c.data.workers = 0  # processes that load; 0 loads in threads

    c.optimizer = ConfigDict()
    c.optimizer.name = "sgd"
    c.optimizer.learning_rate = 0.03
    c.optimizer.momentum = 0.9
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.clip_norm = 0.0  # largest global norm of the gradients, 0: any
    c.optimizer.weight_decay = 0.0  # a step, not multiplied by the learning rate
    c.optimizer.weight_decay_on = ".*/kernel"  # as published: this names arrays of the image tower only

    c.schedule = ConfigDict()
    c.schedule.name = "cosine"
    c.schedule.warmup = 0.1  # share of the steps
    c.schedule.cooldown = 0.0  # share of the steps
    c.schedule.end = 0.0  # of "linear" and "polynomial", as a share of the base rate
    c.schedule.power = 2.0  # of "polynomial"
    c.schedule.shift = 0.0  # steps, of "rsqrt"
    c.schedule.timescale = 10_000.0  # steps, of "rsqrt"

    c.loss = ConfigDict()
    c.loss.label_smoothing = 0.0

    c.mesh = ConfigDict()
    # -1: all devices that the other leaves. Both -1: fsdp has as many devices of a TPU slice, or GPUs of a node, as
    # split every array evenly (128 at most), and data all the rest. docs/placement.md
    c.mesh.data = -1  # devices that hold different rows and equal parameters
    c.mesh.fsdp = -1  # devices that split parameters among them

    c.eval = ConfigDict()
    c.eval.every = 16  # steps; 0: only before the first step and after the last
    c.eval.examples = 4  # the first of the validation data, decoded at each evaluation
    c.eval.final_examples = 0  # decoded before the first step and after the last; 0: all
    c.eval.max_new_tokens = 64
    c.eval.metric = "exact_match"
    c.eval.sampler = "greedy"  # how answers are chosen: greedy, sample, beam
    c.eval.candidates = 0  # of "sample" and "beam": decoded for each example, the best is its answer; 0: one
    c.eval.length_penalty = 1.0  # of "beam": a log-probability is divided by the length to this power
    c.eval.temperature = 1.0  # of "sample"; what follows too
    c.eval.top_k = 0  # likeliest tokens to draw from, 0: all
    c.eval.top_p = 1.0  # the probability of those to draw from
    c.eval.seed = 0  # not that of training: runs that differ in theirs draw alike

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 16  # steps
    c.checkpoint.keep = 2  # newest ones
    return c.lock()


def validate_config(config: ConfigDict) -> None:
    """Raises ConfigError for a field that no training run can have; files are looked at when opened."""
    check_values(config)
    for field in ("tokenizer", "data.train"):
        _check(config, field, bool, "a path")


def check_values(config: ConfigDict) -> None:
    """Raises ConfigError for a field that is missing, unknown, of another type, or has a value of no use."""
    _check_fields(config)
    _check_choices(config)
    for field in (
        "steps",
        "batch_size",
        "gradient_accumulation_steps",
        "data.text_length",
        "eval.max_new_tokens",
        "checkpoint.every",
        "checkpoint.keep",
    ):
        _check(config, field, lambda v: v >= 1, "at least 1")
    for field in (
        "eval.every",
        "eval.examples",
        "eval.final_examples",
        "data.workers",
        "data.max_scored_positions",
        "patience",
    ):
        _check(config, field, lambda v: v >= 0, "0 or more")
    for field in (
        "optimizer.learning_rate",
        "optimizer.clip_norm",
        "optimizer.weight_decay",
        "model.final_logits_softcap",
        "schedule.power",
        "schedule.shift",
    ):
        _check(config, field, lambda v: 0 <= v < float("inf"), "a finite number, 0 or more")
    for field in ("optimizer.eps", "schedule.timescale"):
        _check(config, field, lambda v: 0 < v < float("inf"), "a finite number above 0")
    for field in ("schedule.warmup", "schedule.cooldown", "schedule.end", "data.max_bad_share"):
        _check(config, field, lambda v: 0 <= v <= 1, "a share from 0 to 1")
    for field in ("loss.label_smoothing", "optimizer.b1", "optimizer.b2", "optimizer.momentum"):
        _check(config, field, lambda v: 0 <= v < 1, "at least 0 and below 1")
    _check(config, "seed", lambda v: 0 <= v < 2**32, "0 to 2**32 - 1")
    _check(
        config,
        "data.text_length",
        lambda v: v >= 4,
        "at least 4: BOS, a prefix token, separator, a suffix token",
    )
    evaluation_sampling(config)


def model_config(config: ConfigDict) -> PaliGemmaConfig:
    """The sizes and compute dtypes that the config names."""
    m = config.model
    return preset(
        m.preset,
        image_dtype=m.image_dtype,
        text_dtype=m.text_dtype,
        final_logits_softcap=m.final_logits_softcap,
        remat=m.remat,
    )


def evaluation_sampling(config: ConfigDict) -> Sampling:
    """How evaluation chooses its answers.  Raises ConfigError where the fields do not fit each other."""
    e = config.eval
    try:
        return Sampling(
            method=e.sampler,
            candidates=e.candidates,
            length_penalty=e.length_penalty,
            temperature=e.temperature,
            top_k=e.top_k,
            top_p=e.top_p,
            seed=e.seed,
        )
    except ConfigError as error:
        raise ConfigError(f"config.eval: {error}") from error


def check_vocabulary(config: ConfigDict, tokens: int) -> None:
    """Raises ConfigError where the tokenizer has more tokens than the model embeds."""
    embedded = PRESETS[config.model.preset].text.vocab_size
    if tokens > embedded:
        raise ConfigError(
            f"config.tokenizer={config.tokenizer} has {tokens} tokens, "
            f"config.model.preset={config.model.preset} embeds "
            f"{embedded}: they do not belong together. "
            "Give the tokenizer that the weights were trained with, or the preset of the weights."
        )


def fields_of(config: ConfigDict) -> dict[str, Any]:
    """{dotted name: value} of all fields."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            fields |= {f"{name}.{inner}": found for inner, found in fields_of(value).items()}
        else:
            fields[name] = value
    return fields


def nearest(name: str, candidates: Iterable[str]) -> str:
    """ " Did you mean X?" for the likeliest of the candidates, or ""."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def get_field(config: ConfigDict, field: str) -> Any:
    """The value at a dotted path."""
    for part in field.split("."):
        config = config[part]
    return config


def _check_fields(config: ConfigDict) -> None:
    """A file that makes a ConfigDict of its own may have any fields, and JSON any values."""
    known, found = fields_of(default_config()), fields_of(config)
    for field in found:
        if field not in known:
            raise ConfigError(f"config.{field}: there is no such field.{nearest(field, known)}")
    for field, default in known.items():
        if field not in found:
            raise ConfigError(
                f"config.{field} is missing: let get_config() start from pgdist.config.default_config(), "
                "which has all fields."
            )
        types, expected = _TYPES[type(default)]
        value = found[field]
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            raise ConfigError(f"config.{field}: expected {expected}, found {value!r}.")


def _check_choices(config: ConfigDict) -> None:
    choices = {
        "model.preset": tuple(PRESETS),
        "model.image_dtype": FLOAT_DTYPES,
        "model.text_dtype": FLOAT_DTYPES,
        "frozen_dtype": (*FLOAT_DTYPES, "file"),
        "model.remat": REMAT_POLICIES,
        "model.attention": ("auto", *IMPLEMENTATIONS),
        "optimizer.name": OPTIMIZERS,
        "schedule.name": SCHEDULES,
        "eval.sampler": get_args(Method),
    }
    for field, allowed in choices.items():
        value = get_field(config, field)
        if value not in allowed:
            raise ConfigError(
                f"config.{field}: expected one of {', '.join(allowed)}; found "
                f"{value!r}.{nearest(str(value), allowed)}"
            )


def _check(config: ConfigDict, field: str, is_valid: Any, expected: str) -> None:
    value = get_field(config, field)
    if not is_valid(value):
        raise ConfigError(
            f"config.{field}: expected {expected}, found {value!r}. Set it with --config.{field}=VALUE."
        )
