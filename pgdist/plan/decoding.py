"""Compiling the very program that decodes a batch: reading the prompts, and a loop of which each pass is a token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from pgdist.config import model_config
from pgdist.decode.decoder import Decoder
from pgdist.decode.sampling import Sampling
from pgdist.mesh import make_mesh
from pgdist.models.paligemma import PaliGemma
from pgdist.plan.compiled import Compiled, compile_lowered
from pgdist.plan.program import Program, read_apart

# A collective of few bytes takes as long as it takes to start: on a TPU's links some microseconds.
COLLECTIVE_SECONDS = 5e-6
_EOS = 1  # of the published tokenizers; which token it is changes nothing of the cost
_TOKEN = "PaliGemma.extend"  # stands in the names of what the loop over tokens does


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledDecoding:
    """The program that decodes a batch, as compiled.

    weights, cache: bytes that a device must read for each token, at most: its part of the decoder, and the keys and
    values of its rows.  prefill: all but the loop over tokens.  token: one pass of that.  Both are None where the
    compiler gives no estimates.
    """

    compiled: Compiled
    prompt_tokens: int
    max_new_tokens: int
    weights: int
    cache: int
    prefill: Program | None
    token: Program | None


def compile_decoding(
    config: ConfigDict,
    *,
    batch_size: int,
    prompt_tokens: int,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> CompiledDecoding:
    """Compiles what decodes batches of a config's model; reads no images and no weights.

    batch_size: rows of a global batch, rounded up to a multiple of the devices.  prompt_tokens: columns of text.
    sampling: greedy by default.  devices: present or described (`describe_devices`); all present ones by default.

    Raises ConfigError where the program does not fit the devices' memory.
    """
    mesh = make_mesh(devices=devices)
    decoder = Decoder(
        model=PaliGemma(model_config(config)),
        mesh=mesh,
        batch_size=-(-batch_size // mesh.size) * mesh.size,
        max_new_tokens=max_new_tokens,
        eos_id=_EOS,
        sampling=sampling or Sampling(),
    )
    compiled = compile_lowered(
        decoder.trace(prompt_tokens=prompt_tokens).lower(),
        mesh=mesh,
        batch_size=decoder.batch_size,
        saves_memory=f"a smaller --batch_size (now {decoder.batch_size}); fewer --max_new_tokens; more devices",
    )
    prefill = token = None
    if compiled.chip is not None:
        prefill, token = read_apart(compiled.text, compiled.chip, loop=_TOKEN)
    return CompiledDecoding(
        compiled=compiled,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        weights=_bytes_of_weights(decoder),
        cache=_bytes_of_cache(decoder, prompt_tokens),
        prefill=prefill,
        token=token,
    )


def _bytes_of_weights(decoder: Decoder) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for name, leaf in decoder.parameters().items()
        if name.startswith("llm/")
    )


def _bytes_of_cache(decoder: Decoder, prompt_tokens: int) -> int:
    config = decoder.model.config
    text = config.text
    rows = decoder.batch_size // decoder.mesh.size * decoder.sampling.width
    slots = config.image.num_tokens + prompt_tokens + decoder.max_new_tokens - 1
    numbers = 2 * text.depth * rows * slots * text.num_kv_heads * text.head_dim
    return numbers * jax.numpy.dtype(text.dtype).itemsize
