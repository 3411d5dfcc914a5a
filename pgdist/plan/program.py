"""What a compiled TPU program costs: the compiler's own estimate of cycles, and what the devices send to each other.

The compiler estimates each fusion; loops are their bodies times their trip counts. Collectives are counted with the
bytes of their results, each channel once a pass, and those that nothing hides are named: a program for TPUs is
scheduled, so the order of its text is that of its execution. A kernel of attention is charged its matrix products at
a share of the chip's peak, and any other is named as uncharged.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

from pgdist.chips import Chip
from pgdist.plan import hlo

KERNEL_EFFICIENCY = 0.45  # share of the bfloat16 peak at which attention kernels are charged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """A kind of collective: how often it runs in a step on each device, and the bytes of its results."""

    count: int
    nbytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """A collective by itself.  result: its shapes and dtypes.  loop: the body that it is in, "" outside of loops.
    count: of its runs in a step.  nbytes: of its results in all of these.  sent: bytes that each device sends for them,
    in a ring.  is_exposed: whether no compute is scheduled between its start and its end.
    """

    name: str
    kind: str
    result: str
    loop: str
    count: int
    nbytes: int
    sent: int
    is_exposed: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """A loop; trips is None where its condition does not tell.  cycles: of one pass, inner loops included."""

    body: str
    trips: int | None
    cycles: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A Pallas kernel.  cycles: charged for one call, None where there is no rule to charge it by."""

    name: str
    count: int
    cycles: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One device's share of a compiled program.  cycles: of compute, kernels included.  collectives: by kind, and
    transfers: one by one, each with most bytes first.
    """

    cycles: int
    collectives: Mapping[str, Collective]
    transfers: Sequence[Transfer]
    kernels: Sequence[Kernel]
    loops: Sequence[Loop]


def read_program(text: str, chip: Chip) -> Program:
    """What the text of a compiled program for `chip` says."""
    reader = _Reader(text, chip)
    return reader.read(reader.entry)


def read_apart(text: str, chip: Chip, *, loop: str) -> tuple[Program, Program]:
    """A program without one of its loops, and one pass of that loop, its condition included.

    loop: what stands in an instruction of its body.  LookupError where there is no such loop.
    """
    body, condition = _Reader(text, chip).find_loop(loop)
    without = _Reader(text, chip, left_out=body)
    return without.read(without.entry), _Reader(text, chip).read(body, condition)


class _Reader:
    """The computations of a program by name, and sums over them.  left_out: the body of a loop that is passed over."""

    def __init__(self, text: str, chip: Chip, *, left_out: str | None = None) -> None:
        self._chip = chip
        self._left_out = left_out
        self._computations, self.entry = hlo.computations_of(text)
        self.loops: dict[str, Loop] = {}
        self.cycles_of = functools.cache(self._cycles_of)

    def read(self, *names: str) -> Program:
        """The sum over some computations, and all that they call."""
        return Program(
            cycles=sum(map(self.cycles_of, names)),
            collectives=self._collectives(names),
            transfers=self._transfers(names),
            kernels=self._kernels(names),
            loops=tuple(self.loops.values()),
        )

    def find_loop(self, part: str) -> tuple[str, str]:
        """Body and condition of the loop of the entry in whose body `part` stands."""
        for line in self._computations[self.entry]:
            found = hlo.loop_of(line)
            if found and any(part in inner for inner in self._computations[found[0]]):
                return found
        raise LookupError(f"no loop has {part} in it")

    def _cycles_of(self, name: str) -> int:
        return sum(map(self._cycles_of_line, self._computations.get(name, ())))

    def _cycles_of_line(self, line: str) -> int:
        """Of one instruction, with what it calls; a fusion's estimate has that already."""
        total = hlo.estimated_cycles(line)
        if hlo.is_kernel(line):
            total += self._kernel_cycles(line) or 0
        if loop := hlo.loop_of(line):
            total += self._cycles_of_loop(*loop)
        elif " conditional(" in line:
            total += max(map(self.cycles_of, hlo.called_by(line)), default=0)
        elif " call(" in line:
            total += sum(map(self.cycles_of, hlo.called_by(line)))
        return total

    def _cycles_of_loop(self, body: str, condition: str) -> int:
        if body == self._left_out:
            return 0
        trips = self._trips(body, condition)
        self.loops[body] = Loop(body=body, trips=trips, cycles=self.cycles_of(body))
        return (trips or 1) * self.cycles_of(body)

    def _trips(self, body: str, condition: str) -> int | None:
        return hlo.trip_count(self._computations[condition], self._computations[body])

    def _loop_of(self, line: str) -> tuple[str, str] | None:
        """Body and condition, of an instruction that is a loop and not the one to leave out."""
        loop = hlo.loop_of(line)
        return None if loop is None or loop[0] == self._left_out else loop

    def _kernel_cycles(self, line: str) -> int | None:
        flops = hlo.attention_flops(line)
        if flops is None:
            return None
        return int(flops / (self._chip.peak * KERNEL_EFFICIENCY) * self._chip.clock)

    def _collectives(self, names: Sequence[str]) -> dict[str, Collective]:
        """By kind, most bytes first."""
        counts, sizes = collections.Counter(), collections.Counter()
        for times, line, channel_is_new in self._executed(names, 1, set()):
            if (kind := hlo.collective_of(line)) and channel_is_new:
                counts[kind] += times
                sizes[kind] += times * hlo.result_bytes(line)
        return {kind: Collective(count=counts[kind], nbytes=size) for kind, size in sizes.most_common()}

    def _kernels(self, names: Sequence[str]) -> tuple[Kernel, ...]:
        """Each by its name."""
        counts: collections.Counter[str] = collections.Counter()
        cycles: dict[str, int | None] = {}
        for times, line, _ in self._executed(names, 1, set()):
            if hlo.is_kernel(line):
                name = hlo.name_of(line)
                counts[name] += times
                cycles[name] = self._kernel_cycles(line)
        return tuple(Kernel(name=name, count=count, cycles=cycles[name]) for name, count in counts.items())

    def _transfers(self, names: Sequence[str]) -> tuple[Transfer, ...]:
        """Most bytes first."""
        found = (transfer for name in names for transfer in self._transfers_in(name, 1, ""))
        return tuple(sorted(found, key=lambda transfer: transfer.sent, reverse=True))

    def _executed(
        self, names: Sequence[str], times: int, channels: set[str]
    ) -> Iterator[tuple[int, str, bool]]:
        """(how often, instruction, whether its channel was not met yet in this pass) of all that runs."""
        for line in (line for name in names for line in self._computations.get(name, ())):
            channel = hlo.channel_of(line)
            yield times, line, channel not in channels
            if hlo.collective_of(line):
                channels.add(channel)
            if loop := self._loop_of(line):
                yield from self._executed(loop, times * (self._trips(*loop) or 1), set())
            elif any(word in line for word in (" fusion(", " call(", "async-start(")):
                yield from self._executed(hlo.called_by(line), times, channels)

    def _transfers_in(self, name: str, times: int, loop: str) -> Iterator[Transfer]:
        """Of one computation and the loops in it."""
        lines = self._computations.get(name, ())
        for first, last, collective in self._spans(lines):
            yield Transfer(
                name=hlo.name_of(lines[first]),
                kind=hlo.collective_of(collective),
                result=hlo.result_shapes(collective),
                loop=loop,
                count=times,
                nbytes=times * hlo.result_bytes(collective),
                sent=times * hlo.sent_bytes(collective),
                is_exposed=not any(map(self._cycles_of_line, lines[first : last + 1])),
            )
        for line in lines:
            if inner := self._loop_of(line):
                for part in inner:
                    yield from self._transfers_in(part, times * (self._trips(*inner) or 1), inner[0])
            elif " call(" in line:
                for called in hlo.called_by(line):
                    yield from self._transfers_in(called, times, loop)

    def _spans(self, lines: Sequence[str]) -> Iterator[tuple[int, int, str]]:
        """(index of the first instruction, of the last, the collective itself) of each collective of a computation.

        One that is not asynchronous is one instruction. A start goes on to its done. Where the compiler has fused a
        collective with compute, all fusions that work on its channel carry it on.
        """
        carried: dict[str, tuple[int, int, str]] = {}
        for index, line in enumerate(lines):
            if hlo.collective_of(line):
                yield index, self._end(lines, index), line
                continue
            for inner in self._collectives_within(line):
                first, _, collective = carried.get(hlo.channel_of(inner), (index, index, inner))
                end = self._end(lines, index) if "async-start(" in line else index
                carried[hlo.channel_of(inner)] = first, end, collective
        yield from carried.values()

    def _collectives_within(self, line: str) -> list[str]:
        """Those of the computations that a fusion, or another start, calls."""
        if " fusion(" not in line and "async-start(" not in line:
            return []
        called = (inner for name in hlo.called_by(line) for inner in self._computations.get(name, ()))
        return [inner for inner in called if hlo.collective_of(inner)]

    def _end(self, lines: Sequence[str], start: int) -> int:
        """Of the instruction that ends what `start` begins, which is itself unless it is asynchronous."""
        name = hlo.name_of(lines[start])
        for index in range(start + 1, len(lines)):
            if "-done(" in lines[index] and name in hlo.operands_of(lines[index]):
                return index
        return start
