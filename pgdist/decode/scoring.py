"""How likely given answers are: multiple choice, without a word generated.

An image and its prompt are read once for all of its answers, which are then read token by token from copies of the
cache, by the program that would generate them (`pgdist.decode.given`): so the log-probabilities are those that
generating the same tokens reports.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from pgdist.data.text import answer_ids
from pgdist.data.tokenizer import Tokenizer
from pgdist.decode.decoder import Answer, Batch, Decoder
from pgdist.decode.generation import make_decoder
from pgdist.decode.given import NOTHING
from pgdist.decode.prompts import ImageInput, PromptBatch, prompt_batches
from pgdist.decode.sampling import GREEDY
from pgdist.errors import DataError
from pgdist.models.paligemma import PaliGemma, PaliGemmaConfig

_ANSWER_BUCKET = 8  # answers are padded to a multiple of this many tokens, so that few programs are compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerScore:
    """A given answer's log-probability.

    token_logprobs: of its tokens in nats, that of the end-of-sequence token last; logprob: their sum.
    """

    text: str
    token_logprobs: tuple[float, ...]
    logprob: float

    @property
    def mean_logprob(self) -> float:
        """Of a token: what does not favour short answers."""
        return self.logprob / len(self.token_logprobs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """One example's answers in the order in which they were given; none where its record is bad (valid False).

    index: the example's id in its source.
    """

    index: int
    answers: tuple[AnswerScore, ...]
    valid: bool


def score_answers(
    model: PaliGemma | PaliGemmaConfig,
    params: Mapping,
    *,
    images: Sequence[ImageInput],
    prompts: str | Sequence[str],
    answers: Sequence[Sequence[str]],
    tokenizer: Tokenizer,
    max_prompt_tokens: int = 512,
    batch_size: int = 8,
    mesh: Mesh | None = None,
) -> list[list[AnswerScore]]:
    """The log-probability of each of an image's answers, for each image, all in the order given.

    answers: a list for each image, of any length.  Memory holds batch_size times as many caches as the longest of the
    lists has answers.  All else is as in `pgdist.decode.generate`.
    """
    if len(answers) != len(images) or any(isinstance(texts, str) for texts in answers):
        raise DataError(
            f"answers: expected a list of texts for each of {len(images)} images, found {len(answers)} "
            f"{'texts' if any(isinstance(texts, str) for texts in answers) else 'lists'}."
        )
    if not any(answers):
        return [[] for _ in images]
    decoder = make_decoder(
        model,
        tokenizer,
        sampling=GREEDY,
        max_new_tokens=longest_answer(tokenizer, (text for texts in answers for text in texts)),
        batch_size=batch_size,
        mesh=mesh,
    )
    batches = prompt_batches(decoder, images, prompts, tokenizer=tokenizer, max_tokens=max_prompt_tokens)
    scored = score_batches(
        decoder,
        params,
        batches,
        answers=answers.__getitem__,
        most_answers=max(map(len, answers)),
        tokenizer=tokenizer,
    )
    return [list(found.answers) for found in scored]


def score_batches(
    decoder: Decoder,
    params: Mapping,
    batches: Iterable[Batch],
    *,
    answers: Callable[[int], Sequence[str]],
    most_answers: int,
    tokenizer: Tokenizer,
) -> Iterator[Scored]:
    """One result for each example, in the order of the batches' rows, the same on every process.

    batches: as for `Decoder.decode_batches`.  answers: those of the example of an id, at most `most_answers`; asked for
    the same ids in every process.  decoder: its max_new_tokens is at least their `longest_answer`.
    """

    def tokens_of(index: int) -> np.ndarray:
        tokens = np.full((most_answers, decoder.max_new_tokens), NOTHING, np.int32)
        for row, text in zip(tokens, answers(index) if index >= 0 else (), strict=False):
            ids = answer_ids(tokenizer, text)
            row[: len(ids)] = ids
        return tokens

    def with_answers(batch: Batch) -> PromptBatch:
        given = np.stack([tokens_of(int(index)) for index in batch.arrays["index"]])
        return PromptBatch(arrays={**batch.arrays, "answers": given})

    for found in decoder.score_batches(params, map(with_answers, batches)):
        texts = answers(found.index) if found.valid else ()
        yield Scored(
            index=found.index,
            answers=tuple(_scored(text, answer) for text, answer in zip(texts, found.answers, strict=True)),
            valid=found.valid,
        )


def longest_answer(tokenizer: Tokenizer, answers: Iterable[str]) -> int:
    """Tokens of the longest, its end counted in, rounded up: `max_new_tokens` of a decoder that scores them."""
    longest = max(len(answer_ids(tokenizer, text)) for text in answers)
    return -(-longest // _ANSWER_BUCKET) * _ANSWER_BUCKET


def _scored(text: str, answer: Answer) -> AnswerScore:
    return AnswerScore(text=text, token_logprobs=tuple(answer.logprobs), logprob=answer.logprob)
