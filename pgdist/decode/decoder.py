"""Decoding a stream of padded global batches, with one result for each example on every process.

Each process brings its own rows of a batch; the answers come back whole to all of them, so that scoring and
writing need no further exchange and no shared filesystem. The device works on one batch while the host reads
the answers of the last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pgdist.decode import loop
from pgdist.decode.given import GivenAnswers
from pgdist.decode.loop import Carry, Search, make_search
from pgdist.decode.placement import decoding_shardings
from pgdist.decode.sampling import GREEDY, Sampling, Sequences
from pgdist.decode.steps import ROWS, SplitSteps, Steps, WholeSteps, map_over_mesh
from pgdist.errors import ConfigError
from pgdist.mesh import batch_sharding, put_batch, replicated
from pgdist.models.paligemma import DecodingState, PaliGemma, compute_dtype, parameter_shapes
from pgdist.parameters import flatten, map_named, unflatten

PyTree = Any
_DECODED_ARRAYS = ("image", "text", "mask_input", "mask_ar", "weight", "index")
# Where each part of what the loop carries lies: by row, but for counters.
_CARRY = Carry(
    step=PartitionSpec(),
    token=ROWS,
    found=ROWS,
    state=DecodingState(kv=ROWS, visible=ROWS, position=ROWS, slot=PartitionSpec()),
)


class Batch(Protocol):
    """This process's R rows of one global batch, such as a `pgdist.data.loader.HostBatch`."""

    @property
    def arrays(self) -> Mapping[str, np.ndarray]:
        """image uint8[R, S, S, 3]; text, mask_input, mask_ar int32[R, P]; weight float32[R]; index int[R]."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """tokens: without the end-of-sequence token.  finished: False where the answer was cut at the token limit.
    score: what the answers to one example are ordered by, see `pgdist.decode.sampling.Sequences`.  logprobs: of the
    tokens in nats, that of the end-of-sequence token last where there is one.
    """

    tokens: list[int]
    finished: bool
    score: float
    logprobs: list[float]

    @property
    def logprob(self) -> float:
        """Of the whole answer, in nats."""
        return sum(self.logprobs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoded:
    """One example's answers.

    index: the example's id in its source.  answers: best first; none where the record is bad.  valid: False for a bad
    record (weight 0).
    """

    index: int
    answers: tuple[Answer, ...]
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
    sampling: Sampling = GREEDY

    def place(self, params: Mapping) -> Mapping:
        """The nested parameters where decoding wants them (`pgdist.decode.placement`).

        Arrays that are there already are shared, not copied, so one chip needs no second set. Others are narrowed on
        the way to the dtype that the model casts them to anyway: float32 masters travel, and lie, as bfloat16.
        """
        shardings = decoding_shardings(self.mesh, flatten(params))

        def place(name: str, array: jax.Array) -> jax.Array:
            dtype, sharding = compute_dtype(self.model.config, name), shardings[name]
            is_narrow = dtype is None or dtype.itemsize >= array.dtype.itemsize
            is_there = isinstance(array, jax.Array) and array.sharding.is_equivalent_to(sharding, array.ndim)
            if self.mesh.size == 1 or is_narrow or is_there:
                return jax.device_put(array, sharding)
            return _narrow(array, dtype=dtype, sharding=sharding)

        return map_named(place, params)

    def decode_batches(self, params: Mapping, batches: Iterable[Batch]) -> Iterator[Decoded]:
        """Answers in the order of the batches' rows, exactly one result for each example, the same on every process.

        params: the nested tree.  batches: this process's rows (`pgdist.mesh.host_rows`) of each global batch;
        every process brings the same number of them, each with as many columns of text as the others' of that batch.
        Rows of index -1 only fill a batch and have no answer.
        """
        params = self.place(params)
        yield from self._read_behind(
            _decode(self._program, params, self._put(batch), self._seed) for batch in batches
        )

    def score_batches(self, params: Mapping, batches: Iterable[Batch]) -> Iterator[Decoded]:
        """As `decode_batches`, but the answers are given, and come back in their order with their log-probabilities.

        batches: with `answers` int32[R, C, M] as well, see `pgdist.decode.given.GivenAnswers`; C and M are the same in
        all processes.  How many answers there may be depends on memory: each has a copy of its example's cache.
        """
        params = self.place(params)
        yield from self._read_behind(
            _score(self._program, params, self._put(batch, "answers")) for batch in batches
        )

    def stream_batches(
        self,
        params: Mapping,
        batches: Iterable[Batch],
        *,
        tokens_at_a_time: int,
        on_tokens: Callable[[int, list[int]], None],
    ) -> Iterator[Decoded]:
        """As `decode_batches`, calling on_tokens(index, all tokens so far) whenever an example has more of them.

        The loop is left for the host after so many tokens.  Raises ConfigError, at the first answer that is asked for,
        with beams or several candidates: the best of those so far need not begin the best.
        """
        if self.sampling.method == "beam" or self.sampling.width > 1:
            raise ConfigError(
                f"{self.sampling.width} candidates of the sampler {self.sampling.method}: an answer can be followed "
                "while it grows where it is the only one, of the samplers greedy and sample."
            )
        params = self.place(params)
        for batch in batches:
            heard: dict[int, int] = {}
            for found in self._grow(params, self._put(batch), tokens_at_a_time):
                for each in found:
                    tokens = each.answers[0].tokens if each.answers else []
                    if len(tokens) > heard.get(each.index, 0):
                        heard[each.index] = len(tokens)
                        on_tokens(each.index, tokens)
            yield from found

    def parameters(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Each parameter by name, where `place` puts it, in the dtype that the model computes in."""
        shapes = flatten(parameter_shapes(self.model.config))
        shardings = decoding_shardings(self.mesh, shapes)
        return {
            name: jax.ShapeDtypeStruct(
                leaf.shape, compute_dtype(self.model.config, name) or leaf.dtype, sharding=shardings[name]
            )
            for name, leaf in shapes.items()
        }

    def trace(self, *, prompt_tokens: int) -> jax.stages.Traced:
        """What `decode_batches` runs for texts of so many columns, for devices that need not be here."""
        size = self.model.config.image.image_size
        text = ((prompt_tokens,), jnp.int32)
        kinds = {
            "image": ((size, size, 3), jnp.uint8),
            "text": text,
            "mask_input": text,
            "mask_ar": text,
            "weight": ((), jnp.float32),
            "index": ((), jnp.int32),
        }
        rows = batch_sharding(self.mesh)
        batch = {
            name: jax.ShapeDtypeStruct((self.batch_size, *shape), dtype, sharding=rows)
            for name, (shape, dtype) in kinds.items()
        }
        return _decode.trace(self._program, unflatten(self.parameters()), batch, self._seed)

    @property
    def _program(self) -> _Program:
        return _Program(
            model=self.model,
            mesh=self.mesh,
            search=make_search(
                # The seed is an argument of the program: another one compiles nothing.
                dataclasses.replace(self.sampling, seed=0),
                max_new_tokens=self.max_new_tokens,
                eos_id=self.eos_id,
                pad_id=self.pad_id,
            ),
        )

    @property
    def _seed(self) -> np.uint32:
        return np.uint32(self.sampling.seed)

    def _put(self, batch: Batch, *more: str) -> dict[str, jax.Array]:
        arrays = {name: np.asarray(batch.arrays[name]) for name in (*_DECODED_ARRAYS, *more)}
        arrays["index"] = _as_int32(arrays["index"])
        return put_batch(arrays, sharding=batch_sharding(self.mesh), batch_size=self.batch_size)

    def _grow(
        self, params: Mapping, batch: Mapping[str, jax.Array], tokens_at_a_time: int
    ) -> Iterator[list[Decoded]]:
        """The answers to a batch: after their first token, after every so many more, and when all have ended."""
        carry, answers = _begin(self._program, params, batch, self._seed)
        length = 1
        while True:
            found = list(self._read(answers))
            yield found
            if length == self.max_new_tokens or all(a.finished for each in found for a in each.answers):
                return
            length = min(length + tokens_at_a_time, self.max_new_tokens)
            carry, answers = _advance(self._program, params, carry, batch, np.int32(length))

    def _read_behind(self, dispatched: Iterable[Mapping[str, Any]]) -> Iterator[Decoded]:
        """The answers to each batch, read while the device works on the next."""
        pending = None
        for answers in dispatched:
            if pending is not None:
                yield from self._read(pending)
            pending = answers
        if pending is not None:
            yield from self._read(pending)

    def _read(self, answers: Mapping[str, Any]) -> Iterator[Decoded]:
        weight, index, step = (np.asarray(answers[name]) for name in ("weight", "index", "step"))
        sequences = jax.tree.map(np.asarray, answers["sequences"])
        for row, example in enumerate(index):
            if example < 0:
                continue
            valid = bool(weight[row] > 0)
            found = [
                self._answer(sequences, row, number, cut=int(step))
                for number in range(sequences.tokens.shape[1])
                if valid and sequences.scores[row, number] != -np.inf
            ]
            yield Decoded(index=int(example), answers=tuple(found), valid=valid)

    def _answer(self, sequences: Sequences, row: int, number: int, *, cut: int) -> Answer:
        """cut: the length of an answer that has not ended."""
        tokens, logprobs = sequences.tokens[row, number], sequences.logprobs[row, number]
        ends = np.flatnonzero(tokens == self.eos_id)
        finished = bool(ends.size)
        length = int(ends[0]) if finished else cut
        return Answer(
            tokens=tokens[:length].tolist(),
            finished=finished,
            score=float(sequences.scores[row, number]),
            logprobs=logprobs[: length + finished].tolist(),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Program:
    """What a compiled program depends on beside the shapes of its arguments."""

    model: PaliGemma
    mesh: Mesh
    search: Search

    def run(
        self, function: Callable[..., PyTree], params: Mapping, *arguments: Any, specs: Any, out: Any
    ) -> PyTree:
        """function(steps, *arguments), on each device with its rows and its shards where there are several."""
        if self.mesh.size == 1:
            return function(WholeSteps(model=self.model, params=params), *arguments)
        shardings = decoding_shardings(self.mesh, flatten(params))

        def on_device(params: Mapping, *arguments: Any) -> PyTree:
            steps = SplitSteps(self.model, params, mesh=self.mesh, shardings=shardings)
            return function(steps, *arguments)

        placed = map_named(lambda name, _: shardings[name].spec, params)
        return map_over_mesh(on_device, mesh=self.mesh, in_specs=(placed, *specs), out_specs=out)(
            params, *arguments
        )

    def answers(
        self, sequences: Sequences, step: jax.Array, batch: Mapping[str, jax.Array]
    ) -> dict[str, Any]:
        """All that the host wants to know, whole on every device."""
        found = {"sequences": sequences, "weight": batch["weight"], "index": batch["index"], "step": step}
        return jax.lax.with_sharding_constraint(found, replicated(self.mesh))


@partial(jax.jit, static_argnames=("dtype", "sharding"))
def _narrow(array: jax.Array, *, dtype: np.dtype, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(array.astype(dtype), sharding)


@partial(jax.jit, static_argnums=0)
def _decode(
    program: _Program, params: Mapping, batch: Mapping[str, jax.Array], seed: jax.Array
) -> dict[str, Any]:
    """`pgdist.decode.loop.decode` of a global batch."""

    def decode(steps: Steps, batch: Mapping[str, jax.Array], seed: jax.Array) -> PyTree:
        return loop.decode(steps, program.search, batch, seed)

    sequences, step = program.run(
        decode, params, batch, seed, specs=(ROWS, PartitionSpec()), out=(ROWS, PartitionSpec())
    )
    return program.answers(sequences, step, batch)


@partial(jax.jit, static_argnums=0)
def _score(program: _Program, params: Mapping, batch: Mapping[str, jax.Array]) -> dict[str, Any]:
    """As `_decode`, of given answers."""

    def score(steps: Steps, batch: Mapping[str, jax.Array]) -> PyTree:
        return loop.decode(steps, GivenAnswers(tokens=batch["answers"]), batch, jnp.uint32(0))

    sequences, step = program.run(score, params, batch, specs=(ROWS,), out=(ROWS, PartitionSpec()))
    return program.answers(sequences, step, batch)


@partial(jax.jit, static_argnums=0)
def _begin(program: _Program, params: Mapping, batch: Mapping[str, jax.Array], seed: jax.Array) -> PyTree:
    """The first token of each answer: what the loop goes on from, and the answers so far."""

    def begin(steps: Steps, batch: Mapping[str, jax.Array], seed: jax.Array) -> PyTree:
        carry = loop.begin(steps, program.search, batch, seed)
        return carry, program.search.results(carry.found)

    carry, sequences = program.run(
        begin, params, batch, seed, specs=(ROWS, PartitionSpec()), out=(_CARRY, ROWS)
    )
    return carry, program.answers(sequences, carry.step, batch)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(
    program: _Program, params: Mapping, carry: Carry, batch: Mapping[str, jax.Array], until: jax.Array
) -> PyTree:
    """As `_begin`, `until` tokens on."""

    def advance(steps: Steps, carry: Carry, until: jax.Array) -> PyTree:
        carry = loop.advance(steps, program.search, carry, until)
        return carry, program.search.results(carry.found)

    carry, sequences = program.run(
        advance, params, carry, until, specs=(_CARRY, PartitionSpec()), out=(_CARRY, ROWS)
    )
    return carry, program.answers(sequences, carry.step, batch)


def _as_int32(index: np.ndarray) -> np.ndarray:
    """Ids travel over the devices as int32, all that JAX has by default."""
    if index.size and index.max() > np.iinfo(np.int32).max:
        raise ValueError(f"example id {index.max()} does not fit 32 bits")
    return index.astype(np.int32)
