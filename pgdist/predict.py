"""Answers to many inputs, each answered once, however often the job is killed and started again.

A `Request` is all that decides the answers: the same one gives the same answers, so that a job which finds the first
of them in its file goes on with the next.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pgdist import cluster, health, weights
from pgdist.config import fields_of
from pgdist.data.image_files import ImageSource
from pgdist.data.jsonl import JsonlSource, fingerprint
from pgdist.data.text import encode_example
from pgdist.data.tokenizer import Tokenizer
from pgdist.decode.sampling import Sampling
from pgdist.errors import ConfigError
from pgdist.evaluate.answers_file import AnswersFile, Failures, Progress
from pgdist.evaluate.choices import Choices
from pgdist.evaluate.metrics import metric
from pgdist.evaluate.runner import Evaluator, Prediction
from pgdist.inference import load_model

# Fields of the config, beside the model's, that decide what an answer is or how it is scored.
_ANSWER_FIELDS = ("data.lowercase", "eval.metric")
_SPEED_FIELDS = ("model.attention", "model.remat")  # and of the model's, those that do not


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked, of which model.

    weights: by name, as config.init.  batch_size: rounded up to a multiple of the devices.  settings: {name: JSON
    value} of what else the user has chosen, as far as it decides the answers; it says which tokens are allowed and
    banned.
    """

    config: ConfigDict
    weights: str
    tokenizer: Tokenizer
    source: JsonlSource | ImageSource
    sampling: Sampling
    choices: Choices | None
    max_new_tokens: int
    max_prompt_tokens: int
    batch_size: int
    settings: Mapping[str, Any]

    def describe(self) -> dict[str, Any]:
        """By name, all that decides the answers; reads the weights' directory."""
        fields = fields_of(self.config)
        chosen = dataclasses.asdict(self.sampling)
        decisive = [name for name in fields if name.startswith("model.") and name not in _SPEED_FIELDS]
        return {
            "inputs": fingerprint(self.source),
            "weights": _digest(weights.fingerprint(self.weights).encode()),
            "tokenizer": _digest(Path(self.tokenizer.path).read_bytes()),
            **{f"config.{name}": fields[name] for name in (*decisive, *_ANSWER_FIELDS)},
            "--max_new_tokens": self.max_new_tokens,
            "--max_prompt_tokens": self.max_prompt_tokens,
            "--sampler": chosen.pop("method"),
            **{f"--{name}": value for name, value in chosen.items() if name not in ("allowed", "banned")},
            **self.settings,
        }

    def check_prompt(self, prompt: str) -> None:
        """Raises ConfigError for a prompt, the same for all inputs, that is too long."""
        length = self.max_prompt_tokens
        if encode_example(self.tokenizer, prefix=prompt, suffix=None, length=length).truncated:
            raise ConfigError(
                f"--prompt: expected at most {length} tokens with its start and separator, found more: shorten it, or "
                "raise --max_prompt_tokens."
            )

    def answer(self, *, start: int) -> Iterator[Prediction]:
        """Loads the model and answers the inputs from `start` on, in order; the same in every process."""
        loaded = load_model(self.config, self.weights)
        devices = loaded.mesh.size
        evaluator = Evaluator(
            model=loaded.model,
            mesh=loaded.mesh,
            source=self.source,
            tokenizer=self.tokenizer,
            text_length=self.max_prompt_tokens,
            batch_size=-(-min(self.batch_size, len(self.source)) // devices) * devices,
            max_new_tokens=self.max_new_tokens,
            metric=metric(self.config.eval.metric),
            sampling=self.sampling,
            choices=self.choices,
        )
        yield from evaluator.predict(loaded.params, {}, start=start)


def find_progress(out: AnswersFile, request: Request) -> Progress:
    """How far process 0 finds the job to be, for all of its processes, which share no file system.

    Raises ConfigError in all of them where the file cannot be gone on with, or their inputs differ.
    """
    health.compare({"--data or --images": fingerprint(request.source)}, name="inputs")
    found = Progress()

    def look() -> None:
        nonlocal found
        found = out.look()

    cluster.on_primary(look)
    text = cluster.announce("progress", json.dumps(dataclasses.asdict(found)), seconds=health.SECONDS)
    fields = json.loads(text)
    return Progress(**fields | {"failures": Failures(**fields["failures"])})


def _digest(content: bytes) -> str:
    return f"sha256 {hashlib.sha256(content).hexdigest()}"
