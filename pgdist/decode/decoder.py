"""Decoding a stream of padded global batches, with one result for each example on every process.

Each process brings its own rows of a batch; the tokens come back whole to all of them, so that scoring and
writing need no further exchange and no shared filesystem. The device works on one batch while the host reads
the answers of the last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pgdist.decode.greedy import greedy_decode
from pgdist.mesh import batch_sharding, put_batch, replicated
from pgdist.models.paligemma import PaliGemma, compute_dtype
from pgdist.parameters import map_named

_DECODED_ARRAYS = ("image", "text", "mask_input", "mask_ar", "weight", "index")


class Batch(Protocol):
    """This process's R rows of one global batch, such as a `pgdist.data.loader.HostBatch`."""

    @property
    def arrays(self) -> Mapping[str, np.ndarray]:
        """image uint8[R, S, S, 3]; text, mask_input, mask_ar int32[R, P]; weight float32[R]; index int[R]."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoded:
    """One example's answer.

    index: the example's id in its source.  tokens: the answer without its end-of-sequence token.
    finished: False when the answer was cut at the token limit.  valid: False for a bad record (weight 0), of
    which there is no answer.
    """

    index: int
    tokens: list[int]
    finished: bool
    valid: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """How to decode: what stays the same from batch to batch and from evaluation to evaluation.

    Programs are compiled once for each shape of a batch and kept for as long as the process lives: an equal
    Decoder, made anew, compiles nothing.  batch_size: rows of a global batch, a multiple of the mesh's
    devices.
    """

    model: PaliGemma
    mesh: Mesh
    batch_size: int
    max_new_tokens: int
    eos_id: int
    pad_id: int = 0

    def place(self, params: Mapping) -> Mapping:
        """The nested parameters where decoding wants them: whole on every device.

        Sharded weights would be gathered again for every token. Arrays that are there already are shared, not
        copied, so one chip needs no second set. Others are narrowed on the way to the dtype that the model
        casts them to anyway: float32 masters travel, and lie, as bfloat16.
        """
        whole = replicated(self.mesh)

        def place(name: str, array: jax.Array) -> jax.Array:
            dtype = compute_dtype(self.model.config, name)
            if self.mesh.size == 1 or dtype is None or dtype.itemsize >= array.dtype.itemsize:
                return jax.device_put(array, whole)
            return _narrow(array, dtype=dtype, sharding=whole)

        return map_named(place, params)

    def decode_batches(self, params: Mapping, batches: Iterable[Batch]) -> Iterator[Decoded]:
        """Answers in the order of the batches' rows, exactly one for each example, the same on every process.

        params: the nested tree.  batches: this process's rows (`pgdist.mesh.host_rows`) of each global batch;
        every process brings the same number of them. Rows of index -1 only fill a batch and have no answer.
        """
        params = self.place(params)
        sharding = batch_sharding(self.mesh)
        pending = None
        for batch in batches:
            arrays = {name: np.asarray(batch.arrays[name]) for name in _DECODED_ARRAYS}
            arrays["index"] = _as_int32(arrays["index"])
            placed = put_batch(arrays, sharding=sharding, batch_size=self.batch_size)
            dispatched = _decode_batch(
                self.model,
                params,
                placed,
                max_new_tokens=self.max_new_tokens,
                eos_id=self.eos_id,
                pad_id=self.pad_id,
                sharding=sharding,
            )
            if pending is not None:
                yield from self._read(pending)
            pending = dispatched
        if pending is not None:
            yield from self._read(pending)

    def _read(self, answers: Mapping[str, jax.Array]) -> Iterator[Decoded]:
        tokens, weight, index = (np.asarray(answers[name]) for name in ("tokens", "weight", "index"))
        for row, example in enumerate(index):
            if example < 0:
                continue
            valid = bool(weight[row] > 0)
            ends = np.flatnonzero(tokens[row] == self.eos_id)
            length = ends[0] if ends.size else self.max_new_tokens
            yield Decoded(
                index=int(example),
                tokens=tokens[row, :length].tolist() if valid else [],
                finished=valid and bool(ends.size),
                valid=valid,
            )


@partial(jax.jit, static_argnames=("dtype", "sharding"))
def _narrow(array: jax.Array, *, dtype: np.dtype, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(array.astype(dtype), sharding)


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "sharding"))
def _decode_batch(
    model: PaliGemma,
    params: Mapping,
    batch: Mapping[str, jax.Array],
    *,
    max_new_tokens: int,
    eos_id: int | jax.Array,
    pad_id: int | jax.Array,
    sharding: NamedSharding,
) -> dict[str, jax.Array]:
    """`greedy_decode`, its tokens int32[B, M] and the batch's weight and index whole on every device."""
    found = greedy_decode(
        model,
        params,
        batch,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        pad_id=pad_id,
        batch_sharding=sharding,
    )
    answers = {"tokens": found.tokens, "weight": batch["weight"], "index": batch["index"]}
    return jax.lax.with_sharding_constraint(answers, replicated(sharding.mesh)) | {"steps": found.steps}


def _as_int32(index: np.ndarray) -> np.ndarray:
    """Ids travel over the devices as int32, all that JAX has by default."""
    if index.size and index.max() > np.iinfo(np.int32).max:
        raise ValueError(f"example id {index.max()} does not fit 32 bits")
    return index.astype(np.int32)
