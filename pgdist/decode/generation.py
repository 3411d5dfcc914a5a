"""Images and prompts in, answers out: decoding for those who have no dataset, only a few lines of Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from jax.sharding import Mesh

from pgdist.data.tokenizer import Tokenizer
from pgdist.decode.decoder import Answer, Decoder
from pgdist.decode.prompts import ImageInput, PromptBatch, prompt_batches
from pgdist.decode.sampling import GREEDY, Sampling
from pgdist.errors import ConfigError
from pgdist.mesh import make_mesh
from pgdist.models.paligemma import PaliGemma, PaliGemmaConfig

_STREAMED_AT_A_TIME = 4  # tokens: each look at the answers costs the host about as long as a token takes
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what tokens of single bytes are, until their character is whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """One of the answers to an image.

    tokens: ids, without the end-of-sequence token.  pieces: the tokens as the tokenizer writes them.
    token_logprobs: of the tokens in nats, that of the end-of-sequence token last where there is one; logprob: their
    sum.  finished: False where the answer was cut at max_new_tokens.  score: what the answers to an image are ordered
    by, logprob but for the length penalty of beams.
    """

    text: str
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    token_logprobs: tuple[float, ...]
    logprob: float
    finished: bool
    score: float


def generate(
    model: PaliGemma | PaliGemmaConfig,
    params: Mapping,
    *,
    images: Sequence[ImageInput],
    prompts: str | Sequence[str],
    tokenizer: Tokenizer,
    sampling: Sampling = GREEDY,
    max_new_tokens: int = 64,
    max_prompt_tokens: int = 512,
    batch_size: int = 8,
    mesh: Mesh | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[str]:
    """The answer to each image, of several the best, in the order of the images.

    params: the nested parameter tree.  images: paths, encoded bytes, PIL images or uint8[H, W, 3] arrays.  prompts: one
    for all images, or one for each.  sampling: how tokens are chosen; by default, the likeliest.  mesh: None is all
    devices; batch_size is rounded up to a multiple of them.  on_text: called with an image's place in `images` and its
    answer so far whenever that has grown; the last time, with all of it.

    In a job of several processes all call this with the same arguments, and all get, and hear, all answers.

    Raises DataError for an image that cannot be read or a prompt longer than max_prompt_tokens; ConfigError for sizes
    below one, and for on_text with beams or several candidates, of which no one knows yet which will be the best.
    """
    decoder = make_decoder(
        model, tokenizer, sampling=sampling, max_new_tokens=max_new_tokens, batch_size=batch_size, mesh=mesh
    )
    batches = prompt_batches(decoder, images, prompts, tokenizer=tokenizer, max_tokens=max_prompt_tokens)
    if on_text is not None:
        return list(_stream_texts(decoder, params, batches, tokenizer=tokenizer, on_text=on_text))
    return [tokenizer.decode(found.answers[0].tokens) for found in decoder.decode_batches(params, batches)]


def generate_candidates(
    model: PaliGemma | PaliGemmaConfig,
    params: Mapping,
    *,
    images: Sequence[ImageInput],
    prompts: str | Sequence[str],
    tokenizer: Tokenizer,
    sampling: Sampling,
    max_new_tokens: int = 64,
    max_prompt_tokens: int = 512,
    batch_size: int = 8,
    mesh: Mesh | None = None,
) -> list[list[Generated]]:
    """The `sampling.n` answers to each image, best first, with their log-probabilities; see `generate`."""
    decoder = make_decoder(
        model, tokenizer, sampling=sampling, max_new_tokens=max_new_tokens, batch_size=batch_size, mesh=mesh
    )
    batches = prompt_batches(decoder, images, prompts, tokenizer=tokenizer, max_tokens=max_prompt_tokens)
    return [
        [_generated(answer, tokenizer) for answer in found.answers]
        for found in decoder.decode_batches(params, batches)
    ]


def make_decoder(
    model: PaliGemma | PaliGemmaConfig,
    tokenizer: Tokenizer,
    *,
    sampling: Sampling,
    max_new_tokens: int,
    batch_size: int,
    mesh: Mesh | None,
) -> Decoder:
    """The decoder that these arguments of `generate` mean."""
    if max_new_tokens < 1 or batch_size < 1:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens}, batch_size={batch_size}: both must be at least 1."
        )
    mesh = make_mesh() if mesh is None else mesh
    return Decoder(
        model=PaliGemma(model) if isinstance(model, PaliGemmaConfig) else model,
        mesh=mesh,
        batch_size=-(-batch_size // mesh.size) * mesh.size,
        max_new_tokens=max_new_tokens,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        sampling=sampling,
    )


def _stream_texts(
    decoder: Decoder,
    params: Mapping,
    batches: Iterable[PromptBatch],
    *,
    tokenizer: Tokenizer,
    on_text: Callable[[int, str], None],
) -> Iterator[str]:
    """The answers in order, each told while it grows: what was told begins what is told next."""
    told: dict[int, str] = {}

    def tell(index: int, text: str) -> None:
        if text != told.get(index, ""):
            told[index] = text
            on_text(index, text)

    decoded = decoder.stream_batches(
        params,
        batches,
        tokens_at_a_time=_STREAMED_AT_A_TIME,
        on_tokens=lambda index, tokens: tell(index, tokenizer.decode(tokens).rstrip(_INCOMPLETE)),
    )
    for found in decoded:
        text = tokenizer.decode(found.answers[0].tokens)
        tell(found.index, text)
        yield text


def _generated(answer: Answer, tokenizer: Tokenizer) -> Generated:
    return Generated(
        text=tokenizer.decode(answer.tokens),
        tokens=tuple(answer.tokens),
        pieces=tuple(tokenizer.pieces(answer.tokens)),
        token_logprobs=tuple(answer.logprobs),
        logprob=answer.logprob,
        finished=answer.finished,
        score=answer.score,
    )
