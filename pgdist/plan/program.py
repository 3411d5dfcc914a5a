"""Reading a compiled TPU program: the compiler's own estimate of cycles, and what the devices send to each other.

The text of a compiled program (`compiled.as_text()`) has an estimate for each fusion, none for collectives and Pallas
kernels, and no trip counts. So cycles of loops are those of their bodies times trip counts that are read off their
conditions; collectives are counted with the bytes of their results, each channel once a pass; a kernel of attention is
charged its matrix products at a share of the chip's peak, and any other is named as uncharged.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from pgdist.chips import Chip

KERNEL_EFFICIENCY = 0.45  # share of the bfloat16 peak at which attention kernels are charged
_LARGEST_ESTIMATE = 2**50  # cycles; the compiler writes 2^63 - 1 where it has none
_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}
_COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(")
_CYCLES = re.compile(r'"estimated_cycles":"(-?\d+)"')
_COLLECTIVE = re.compile(rf" ({'|'.join(_COLLECTIVES)})(-start)?\(")
_NAME = re.compile(r"%([\w.\-]+) =")
_KERNEL = "tpu_custom_call"
_ATTENTION = re.compile(r"splash|attention|mqa|mha|flash")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """A kind of collective: how often it runs in a step on each device, and the bytes of its results."""

    count: int
    nbytes: int


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
    """One device's share of a compiled program.  cycles: of compute, kernels included."""

    cycles: int
    collectives: Mapping[str, Collective]
    kernels: Sequence[Kernel]
    loops: Sequence[Loop]


def read_program(text: str, chip: Chip) -> Program:
    """What the text of a compiled program for `chip` says."""
    reader = _Reader(text, chip)
    return Program(
        cycles=reader.cycles_of(reader.entry),
        collectives=reader.collectives(),
        kernels=reader.kernels(),
        loops=tuple(reader.loops.values()),
    )


class _Reader:
    """The computations of a program by name, and sums over them."""

    def __init__(self, text: str, chip: Chip) -> None:
        self._chip = chip
        self._computations, self.entry = _computations(text)
        self.loops: dict[str, Loop] = {}
        self.cycles_of = functools.cache(self._cycles_of)

    def _cycles_of(self, name: str) -> int:
        total = 0
        for line in self._computations.get(name, ()):
            total += self._own_cycles(line)
            if loop := _loop_of(line):
                total += self._cycles_of_loop(*loop)
            elif " conditional(" in line:
                total += max(map(self.cycles_of, _called(line)), default=0)
            elif " call(" in line:
                total += sum(map(self.cycles_of, _called(line)))
        return total

    def _own_cycles(self, line: str) -> int:
        """Of one instruction, without what it calls."""
        estimate = _CYCLES.search(line)
        cycles = int(estimate[1]) if estimate and 0 <= int(estimate[1]) < _LARGEST_ESTIMATE else 0
        if _KERNEL in line:
            cycles += self._kernel_cycles(line) or 0
        return cycles

    def _cycles_of_loop(self, body: str, condition: str) -> int:
        trips = _trip_count(self._computations[condition], self._computations[body])
        self.loops[body] = Loop(body=body, trips=trips, cycles=self.cycles_of(body))
        return (trips or 1) * self.cycles_of(body)

    def _kernel_cycles(self, line: str) -> int | None:
        flops = _attention_flops(line)
        return (
            None if flops is None else int(flops / (self._chip.peak * KERNEL_EFFICIENCY) * self._chip.clock)
        )

    def collectives(self) -> dict[str, Collective]:
        """By kind, most bytes first."""
        counts, sizes = collections.Counter(), collections.Counter()
        for times, line, channel_is_new in self._executed():
            if (match := _COLLECTIVE.search(line)) and channel_is_new:
                counts[match[1]] += times
                sizes[match[1]] += times * _result_bytes(line, is_start=match[2] is not None)
        return {kind: Collective(count=counts[kind], nbytes=size) for kind, size in sizes.most_common()}

    def kernels(self) -> tuple[Kernel, ...]:
        """Each by its name."""
        counts: collections.Counter[str] = collections.Counter()
        cycles: dict[str, int | None] = {}
        for times, line, _ in self._executed():
            if _KERNEL in line:
                name = _NAME.search(line)[1]
                counts[name] += times
                cycles[name] = self._kernel_cycles(line)
        return tuple(Kernel(name=name, count=count, cycles=cycles[name]) for name, count in counts.items())

    def _executed(self) -> Iterator[tuple[int, str, bool]]:
        """(how often, instruction, whether its channel was not met yet in this pass) of all that runs."""
        yield from self._executed_in(self.entry, 1, set())

    def _executed_in(self, name: str, times: int, channels: set[str]) -> Iterator[tuple[int, str, bool]]:
        for line in self._computations.get(name, ()):
            channel = re.search(r"channel_id=(\d+)", line)
            key = channel[1] if channel else line
            yield times, line, key not in channels
            if _COLLECTIVE.search(line):
                channels.add(key)
            if loop := _loop_of(line):
                body, condition = loop
                trips = _trip_count(self._computations[condition], self._computations[body])
                yield from self._executed_in(body, times * (trips or 1), set())
            elif re.search(r" fusion\(| call\(|async-start\(", line):
                for called in _called(line):
                    yield from self._executed_in(called, times, channels)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """{name: its instructions, a line each}, and the name of the entry."""
    found: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{") and (match := _HEADER.match(line)):
            lines = found.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif line.rstrip() == "}":
            lines = None
        elif lines is not None:
            lines.append(line)
    return found, entry


def _loop_of(line: str) -> tuple[str, str] | None:
    """Body and condition of a loop."""
    if not re.search(r"\bwhile\(", line):
        return None
    return re.search(r"body=%?([\w.\-]+)", line)[1], re.search(r"condition=%?([\w.\-]+)", line)[1]


def _called(line: str) -> list[str]:
    """The computations that an instruction names."""
    names = re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line)
    if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
        names += re.findall(r"%([\w.\-]+)", branches[1])
    return names


def _trip_count(condition: Sequence[str], body: Sequence[str]) -> int | None:
    """The constant that the counter is compared with, over what the body adds to it; None if nothing says so."""
    constants = {
        match[1]: int(match[2])
        for line in (*condition, *body)
        if (match := re.search(r"%([\w.\-]+) = [su]\d+\[\]\S* constant\((-?\d+)\)", line))
    }
    elements = {
        match[1]: int(match[2])
        for line in condition
        if (match := re.search(r"%([\w.\-]+) = .*get-tuple-element\(.*\), index=(\d+)", line))
    }
    for line in condition:
        match = re.search(r"compare\(%([\w.\-]+), %([\w.\-]+)\), direction=(\w+)", line)
        if match and match[1] in elements and match[2] in constants:
            limit = constants[match[2]] + (match[3] == "LE")
            return max(1, -(-limit // _increment(body, elements[match[1]], constants)))
    return None


def _increment(body: Sequence[str], index: int, constants: Mapping[str, int]) -> int:
    """What a pass adds to the element `index` of what the loop carries; 1 if it cannot be told."""
    for root in body:
        if not root.strip().startswith("ROOT"):
            continue
        match = re.search(r" tuple\((.*?)\)(,|$)", re.sub(r"/\*.*?\*/", "", root))
        operands = [operand.strip().lstrip("%") for operand in match[1].split(",")] if match else []
        if index < len(operands):
            for line in body:
                found = re.search(
                    rf"%{re.escape(operands[index])} = .* add\(%([\w.\-]+), %([\w.\-]+)\)", line
                )
                for name in found.groups() if found else ():
                    if name in constants:
                        return constants[name]
    return 1


def _result_bytes(line: str, *, is_start: bool) -> int:
    """Bytes of what an instruction returns; of the largest member, for a start, which returns its operands too."""
    tail = line.split(" = ", 1)[1]
    head = tail.split(")", 1)[0] if tail.startswith("(") else tail.split("(", 1)[0]
    sizes = [
        math.prod(int(size) for size in dims.split(",") if size) * _BYTES.get(kind, 4)
        for kind, dims in re.findall(r"\b(\w+)\[([\d,]*)\]", head)
    ]
    return (max(sizes) if is_start else sum(sizes)) if sizes else 0


def _attention_flops(line: str) -> int | None:
    """Of the matrix products of an attention kernel, by its operands' shapes; None for any other kernel.

    Full attention: 4 * heads * queries * keys * head size forward, 8 for the gradients of keys and values, 6 for
    that of queries; head sizes count as 128 at least, the width of the matrix unit.
    """
    name = _NAME.search(line)[1]
    if not _ATTENTION.search(name):
        return None
    operands = re.search(r"operand_layout_constraints=\{(.*?)\}, \w+=", line)
    shapes = re.findall(r"(?:bf16|f16|f32)\[([\d,]+)\]", operands[1] if operands else line)
    dims = [[int(size) for size in shape.split(",")] for shape in shapes]
    large = [shape for shape in dims if len(shape) >= 2 and shape[-1] >= 32]
    if len(large) < 2:
        return None
    query, key = large[:2]
    factor = 8 if "dkv" in name else 6 if "dq" in name else 4
    return factor * math.prod(query[:-2]) * query[-2] * key[-2] * max(128, query[-1])
