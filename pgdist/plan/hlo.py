"""Reading the text of a compiled program (`compiled.as_text()`), one instruction a line.

A line is as XLA writes it: `%name = shape operation(%operand, ...), attribute=..., backend_config={...}`. Programs for
TPUs have in `backend_config` the compiler's estimate of cycles for each fusion; collectives and kernels have none, and
no loop says how often it runs: that is read off its condition.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
_LARGEST_ESTIMATE = 2**50  # cycles; the compiler writes 2^63 - 1 where it has none
_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(")
_CYCLES = re.compile(r'"estimated_cycles":"(-?\d+)"')
_COLLECTIVE = re.compile(rf" ({'|'.join(COLLECTIVES)})(-start)?\(")
_NAME = re.compile(r"%([\w.\-]+) =")
_ATTENTION = re.compile(r"splash|attention|mqa|mha|flash")


def computations_of(text: str) -> tuple[dict[str, list[str]], str]:
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


def name_of(line: str) -> str:
    """The name of an instruction; "" for a line that is none."""
    match = _NAME.search(line)
    return match[1] if match else ""


def operands_of(line: str) -> set[str]:
    """The names of what an instruction reads and calls, its own not among them."""
    return set(re.findall(r"%([\w.\-]+)", line.split(" = ", 1)[-1]))


def estimated_cycles(line: str) -> int:
    """The compiler's estimate for one instruction; 0 where it has none."""
    match = _CYCLES.search(line)
    return int(match[1]) if match and 0 <= int(match[1]) < _LARGEST_ESTIMATE else 0


def collective_of(line: str) -> str | None:
    """The kind of an instruction that is a collective or starts one."""
    match = _COLLECTIVE.search(line)
    return match[1] if match else None


def channel_of(line: str) -> str:
    """What tells a collective from others; the line itself where it has no channel."""
    match = re.search(r"channel_id=(\d+)", line)
    return match[1] if match else line


def is_kernel(line: str) -> bool:
    """Whether the instruction is a Pallas kernel, or another custom call on the TPU."""
    return "tpu_custom_call" in line


def loop_of(line: str) -> tuple[str, str] | None:
    """Body and condition, of an instruction that is a loop."""
    if not re.search(r"\bwhile\(", line):
        return None
    return re.search(r"body=%?([\w.\-]+)", line)[1], re.search(r"condition=%?([\w.\-]+)", line)[1]


def called_by(line: str) -> list[str]:
    """The computations that an instruction names, loops apart."""
    names = re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line)
    if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
        names += re.findall(r"%([\w.\-]+)", branches[1])
    return names


def trip_count(condition: Sequence[str], body: Sequence[str]) -> int | None:
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


def result_bytes(line: str) -> int:
    """Bytes of a collective's result; of the largest member, for a start, which returns its operands too.

    Of a tuple in a TPU's tiled layout this has the first member alone, as the counts that pgdist is compared with;
    `sent_bytes` has them all.
    """
    tail = line.split(" = ", 1)[1]
    head = tail.split(")", 1)[0] if tail.startswith("(") else tail.split("(", 1)[0]
    return _bytes_of(line, head)


def result_shapes(line: str) -> str:
    """What a collective returns, such as "f32[8,256] + f32[]", without layouts."""
    head = line[: _COLLECTIVE.search(line).start()].split(" = ", 1)[1]
    return " + ".join(re.findall(r"\b\w+\[[\d,]*\]", head))


def sent_bytes(line: str) -> int:
    """Bytes that each of n devices sends for a collective in a ring: of a gathered or exchanged array (n-1)/n, of one
    that is reduced twice that, of a scattered one n-1 times its shard.
    """
    match = _COLLECTIVE.search(line)
    result, n = _bytes_of(line, line[: match.start()].split(" = ", 1)[1]), _group_size(line)
    if n is None or match[1] == "collective-permute":
        return result
    factors = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1}
    return round(result * factors.get(match[1], (n - 1) / n))


def _bytes_of(line: str, shapes: str) -> int:
    sizes = [
        math.prod(int(size) for size in dims.split(",") if size) * _BYTES.get(kind, 4)
        for kind, dims in re.findall(r"\b(\w+)\[([\d,]*)\]", shapes)
    ]
    is_start = _COLLECTIVE.search(line)[2] is not None
    return (max(sizes) if is_start else sum(sizes)) if sizes else 0


def _group_size(line: str) -> int | None:
    """Devices that take part in one of the collective's groups; None where it does not say."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    return None


def attention_flops(line: str) -> int | None:
    """Of the matrix products of an attention kernel, by its operands' shapes; None for any other kernel.

    Full attention: 4 * heads * queries * keys * head size forward, and backward, by the names of two separate kernels,
    8 for the gradients of keys and values (dkv) and 6 for that of queries (dq). The fused backward kernel does 10 under
    the name dkv, and is charged its 8, as in the counts that pgdist is compared with. Head sizes count as 128 at least,
    the width of the matrix unit.
    """
    name = name_of(line)
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
