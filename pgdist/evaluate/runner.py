"""Evaluation of a train state: validation loss, and answers scored against the truth.

Every process decodes its share and gets all answers, so that all come to the same numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pgdist.data.jsonl import BadRecord, JsonlSource, Record
from pgdist.data.loader import HostBatch, HostBatches, evaluation_batches
from pgdist.data.tokenizer import Tokenizer
from pgdist.decode.decoder import Decoder
from pgdist.decode.sampling import Sampling
from pgdist.evaluate.metrics import Metric
from pgdist.mesh import batch_sharding, host_rows, put_batch
from pgdist.models.paligemma import PaliGemma
from pgdist.parameters import merge
from pgdist.train.objective import BatchLoss

PyTree = Any


def _nothing() -> None:
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """An answer beside its example, or the reason why there is none.

    score: 0 to 1 by the metric; None where there is no truth to score against.  error: why a record could
    not be read.
    """

    index: int
    image: str = ""
    prefix: str = ""
    suffix: str | None = None
    prediction: str = ""
    score: float | None = None
    error: str | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator:
    """What an evaluation needs besides parameters; batch_size is global and divides by the mesh's devices."""

    model: PaliGemma
    mesh: Mesh
    source: JsonlSource
    tokenizer: Tokenizer
    text_length: int
    batch_size: int
    max_new_tokens: int
    metric: Metric
    sampling: Sampling = Sampling()
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
        limit: int | None = None,
        before_batch: Callable[[], None] = _nothing,
    ) -> Iterator[Prediction]:
        """One prediction for each of all examples or the first `limit`, in order."""
        decoder = Decoder(
            model=self.model,
            mesh=self.mesh,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
            eos_id=self.tokenizer.eos_id,
            pad_id=self.tokenizer.pad_id,
            sampling=self.sampling,
        )
        reasons: dict[int, str] = {}
        with self._batches(limit=limit, prompt_only=True) as batches:
            noted = _note_reasons(batches, reasons, before_batch)
            for answer in decoder.decode_batches(merge(trainable, frozen), noted):
                if answer.valid:
                    yield self._prediction(answer.index, self.tokenizer.decode(answer.answers[0].tokens))
                else:
                    # Only the process that read the record knows more than that it is bad.
                    error = reasons.get(
                        answer.index, f"{self.source.path}: example {answer.index} cannot be read"
                    )
                    yield Prediction(index=answer.index, error=error)

    def _prediction(self, index: int, text: str) -> Prediction:
        record = self.source[index]
        assert isinstance(record, Record)  # it was a moment ago: the source is a file that does not change
        return Prediction(
            index=index,
            image=record.image_name,
            prefix=record.prefix,
            suffix=record.suffix,
            prediction=text,
            score=self.metric(text, record.suffixes) if record.suffixes else None,
            extra=record.extra,
        )

    def _batches(self, *, limit: int | None, prompt_only: bool) -> HostBatches:
        rows = host_rows(batch_sharding(self.mesh), self.batch_size)
        return evaluation_batches(
            source=self.source,
            tokenizer=self.tokenizer,
            image_size=self.model.config.image.image_size,
            text_length=self.text_length,
            batch_size=self.batch_size,
            rows=rows.tolist(),
            limit=limit,
            prompt_only=prompt_only,
        )


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
