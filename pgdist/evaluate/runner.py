"""Evaluation of a train state: validation loss, and answers scored against the truth.

Every process decodes its share and gets all answers, so that all come to the same numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pgdist.data.jsonl import BadRecord, Record
from pgdist.data.loader import HostBatch, HostBatches, Source, evaluation_batches, find_fault
from pgdist.data.tokenizer import Tokenizer
from pgdist.decode.decoder import Decoder
from pgdist.decode.sampling import Sampling
from pgdist.decode.scoring import longest_answer, score_batches
from pgdist.evaluate.choices import Choices
from pgdist.evaluate.metrics import Metric
from pgdist.mesh import batch_sharding, host_rows, put_batch
from pgdist.models.paligemma import PaliGemma
from pgdist.parameters import merge
from pgdist.train.objective import BatchLoss

PyTree = Any


def _nothing() -> None:
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One of the answers to an example.  token_logprobs: of its tokens in nats, that of the end-of-sequence token last
    where there is one.  logprob: their sum.
    """

    text: str
    logprob: float
    token_logprobs: Sequence[float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """An answer beside its example, or the reason why there is none.

    prediction: the best of the candidates' texts.  candidates: all answers that were asked for, or to be chosen from,
    best first.  score: of the prediction, 0 to 1 by the metric; None where there is no truth to score against.  error:
    why a record could not be read.
    """

    index: int
    image: str = ""
    prefix: str = ""
    suffix: str | None = None
    prediction: str = ""
    candidates: tuple[Candidate, ...] = ()
    score: float | None = None
    error: str | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator:
    """What an evaluation needs besides parameters.

    batch_size: global, a multiple of the mesh's devices.  choices: what answers are chosen from, by log-probability;
    None for answers that are generated, as `sampling` says.
    """

    model: PaliGemma
    mesh: Mesh
    source: Source
    tokenizer: Tokenizer
    text_length: int
    batch_size: int
    max_new_tokens: int
    metric: Metric
    sampling: Sampling = Sampling()
    choices: Choices | None = None
    validation_step: Callable[[PyTree, PyTree, Mapping[str, jax.Array]], BatchLoss] | None = None

    def validation_loss(
        self, trainable: PyTree, frozen: PyTree, *, before_batch: Callable[[], None] = _nothing
    ) -> dict[str, float]:
        """Over all examples: {"loss": their mean in nats, "token_accuracy": of the likeliest token}."""
        assert self.validation_step is not None
        sharding = batch_sharding(self.mesh)
        sums: BatchLoss | None = None
        with self._batches(limit=None, prompt_only=False) as batches:
            for batch in batches:
                before_batch()
                placed = put_batch(batch.arrays, sharding=sharding, batch_size=self.batch_size)
                placed.pop("index")  # 64 bits wide, and nothing on the device needs it
                found = self.validation_step(trainable, frozen, placed)
                sums = found if sums is None else jax.tree.map(lambda a, b: a + b, sums, found)
        total = jax.tree.map(float, sums)
        if not total.examples:  # every record is bad
            return {"loss": math.nan, "token_accuracy": math.nan}
        return {
            "loss": total.loss / total.examples,
            "token_accuracy": total.correct_tokens / max(1.0, total.tokens),
        }

    def predict(
        self,
        trainable: PyTree,
        frozen: PyTree,
        *,
        start: int = 0,
        limit: int | None = None,
        before_batch: Callable[[], None] = _nothing,
    ) -> Iterator[Prediction]:
        """One prediction for each of all examples or the first `limit`, in order.

        start: the first example that is wanted. Batches are what they are from the beginning: of the one that it is
        in, the answers before it are made again and left out, and the others are the same to the bit.
        """
        reasons: dict[int, str] = {}
        first_batch = start // self.batch_size
        with self._batches(limit=limit, first_batch=first_batch, prompt_only=True) as batches:
            noted = _note_reasons(batches, reasons, before_batch)
            for index, candidates in self._decode(merge(trainable, frozen), noted):
                if index < start:
                    continue
                if candidates is not None:
                    yield self._prediction(index, candidates)
                else:
                    yield Prediction(index=index, error=reasons.get(index) or self._find_reason(index))

    def _decode(
        self, params: PyTree, batches: Iterable[HostBatch]
    ) -> Iterator[tuple[int, tuple[Candidate, ...] | None]]:
        """Each example's index and candidates, best first; None for those of a bad record."""
        if self.choices is None:
            for decoded in self._decoder(self.max_new_tokens).decode_batches(params, batches):
                found = tuple(
                    _candidate(self.tokenizer.decode(a.tokens), a.logprobs) for a in decoded.answers
                )
                yield decoded.index, found if decoded.valid else None
            return
        longest = longest_answer(self.tokenizer, self.choices.texts)
        scores = score_batches(
            self._decoder(longest),
            params,
            batches,
            answers=self.choices.of,
            most_answers=self.choices.most,
            tokenizer=self.tokenizer,
        )
        for scored in scores:
            found = [_candidate(a.text, a.token_logprobs) for a in scored.answers]
            found.sort(key=lambda candidate: candidate.logprob, reverse=True)
            yield scored.index, tuple(found) if scored.valid else None

    def _decoder(self, max_new_tokens: int) -> Decoder:
        return Decoder(
            model=self.model,
            mesh=self.mesh,
            batch_size=self.batch_size,
            max_new_tokens=max_new_tokens,
            eos_id=self.tokenizer.eos_id,
            pad_id=self.tokenizer.pad_id,
            sampling=self.sampling,
        )

    def _prediction(self, index: int, candidates: tuple[Candidate, ...]) -> Prediction:
        record = self.source[index]
        assert isinstance(record, Record)  # it was a moment ago: the source is a file that does not change
        text = candidates[0].text
        return Prediction(
            index=index,
            image=record.image_name,
            prefix=record.prefix,
            suffix=record.suffix,
            prediction=text,
            candidates=candidates,
            score=self.metric(text, record.suffixes) if record.suffixes else None,
            extra=record.extra,
        )

    def _find_reason(self, index: int) -> str:
        """Why another process could not read an example, as far as this one can tell."""
        fault = find_fault(
            index,
            source=self.source,
            tokenizer=self.tokenizer,
            image_size=self.model.config.image.image_size,
            text_length=self.text_length,
        )
        return f"{self.source.path}: example {index} cannot be read" if fault is None else str(fault)

    def _batches(self, *, limit: int | None, prompt_only: bool, first_batch: int = 0) -> HostBatches:
        rows = host_rows(batch_sharding(self.mesh), self.batch_size)
        return evaluation_batches(
            source=self.source,
            tokenizer=self.tokenizer,
            image_size=self.model.config.image.image_size,
            text_length=self.text_length,
            batch_size=self.batch_size,
            rows=rows.tolist(),
            limit=limit,
            first_batch=first_batch,
            prompt_only=prompt_only,
        )


def _candidate(text: str, token_logprobs: Sequence[float]) -> Candidate:
    return Candidate(text=text, logprob=sum(token_logprobs), token_logprobs=token_logprobs)


def _note_reasons(
    batches: Iterable[HostBatch], reasons: dict[int, str], before_batch: Callable[[], None]
) -> Iterator[HostBatch]:
    """The batches unchanged; what is wrong with their bad records goes into `reasons` by example id."""
    for batch in batches:
        before_batch()
        for index, record in zip(batch.arrays["index"].tolist(), batch.records, strict=True):
            if isinstance(record, BadRecord):
                reasons[index] = str(record)
        yield batch


def mean_score(predictions: list[Prediction]) -> float:
    """Mean of the scores there are; NaN without any."""
    scores = [p.score for p in predictions if p.score is not None]
    return float(np.mean(scores)) if scores else float("nan")
