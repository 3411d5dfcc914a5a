"""The figures of a compiled program that decodes: of its prefill, and of one token in its loop.

A token takes the larger of compute and of reading the weights and the cache, and each collective some microseconds
more: those move so little that it is their number that counts.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

from pgdist.plan.decoding import COLLECTIVE_SECONDS, CompiledDecoding
from pgdist.plan.program import Program
from pgdist.plan.timing import compute_seconds, link_seconds

NAME = "generate"


def as_json(decoding: CompiledDecoding) -> dict[str, Any]:
    """What is to be added to the figures of any program."""
    figures: dict[str, Any] = {
        "prompt_tokens": decoding.prompt_tokens,
        "max_new_tokens": decoding.max_new_tokens,
        "compiled": {},
        "estimated": {"weight_bytes": decoding.weights, "cache_bytes": decoding.cache},
    }
    if decoding.token is None:
        return figures
    figures["compiled"] |= {"prefill": _of_part(decoding.prefill), "token": _of_part(decoding.token)}
    figures["estimated"] |= {
        "prefill_seconds": _prefill_seconds(decoding),
        "token_compute_seconds": compute_seconds(decoding.token, decoding.compiled.chip),
        "token_reading_seconds": _reading_seconds(decoding),
        "token_seconds": _token_seconds(decoding),
        "share_of_tokens": _share_of_tokens(decoding),
    }
    return figures


def describe(decoding: CompiledDecoding) -> Iterator[str]:
    """What a batch takes, a line each."""
    yield (
        f"prompts of {decoding.prompt_tokens} tokens, answers of {decoding.max_new_tokens}: for each of their tokens a "
        f"device reads {decoding.weights / 1e9:.3f} GB of weights and up to {decoding.cache / 1e9:.3f} GB of cache"
    )
    if decoding.token is None:
        return
    chip = decoding.compiled.chip
    compute, reading = compute_seconds(decoding.token, chip), _reading_seconds(decoding)
    yield from _describe_part("prefill", decoding.prefill)
    yield f"estimated  prefill      {1e3 * _prefill_seconds(decoding):.1f} ms, the larger of compute and links"
    yield from _describe_part("token", decoding.token)
    yield (
        f"estimated  token        {1e3 * _token_seconds(decoding):.2f} ms: the larger of "
        f"{1e3 * compute:.2f} ms of compute and {1e3 * reading:.2f} ms of reading at {chip.bandwidth / 1e9:g} GB/s, "
        f"and {_count(decoding.token)} collectives of {1e6 * COLLECTIVE_SECONDS:g} us"
    )
    yield (
        f"estimated  share        {_share_of_tokens(decoding):.0%} of the time, where all answers are as long as may be"
    )


def _of_part(program: Program) -> dict[str, Any]:
    return {
        "cycles": program.cycles,
        "collectives": _count(program),
        "collective_bytes": sum(each.nbytes for each in program.transfers),
        "transfers": [dataclasses.asdict(each) for each in program.transfers],
        "uncharged_kernels": [kernel.name for kernel in program.kernels if kernel.cycles is None],
        "loops_of_unknown_length": [loop.body for loop in program.loops if loop.trips is None],
    }


def _describe_part(name: str, program: Program) -> Iterator[str]:
    yield f"compiled   {name:<12} {program.cycles / 1e6:,.2f} M cycles, collectives not among them"
    alike: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0])
    for each in program.transfers:
        alike[each.kind, each.result][0] += each.count
        alike[each.kind, each.result][1] += each.nbytes
    for (kind, result), (count, nbytes) in alike.items():
        yield f"           {nbytes / 1e6:10.3f} MB  {count} x {kind} of {result}"
    nbytes = sum(each.nbytes for each in program.transfers)
    yield f"           {nbytes / 1e6:10.3f} MB  {_count(program)} collectives in all"
    for kernel in program.kernels:
        if kernel.cycles is None:
            yield f"           kernel {kernel.name}: NOT CHARGED"


def _prefill_seconds(decoding: CompiledDecoding) -> float:
    chip = decoding.compiled.chip
    return max(compute_seconds(decoding.prefill, chip), link_seconds(decoding.prefill, chip))


def _reading_seconds(decoding: CompiledDecoding) -> float:
    return (decoding.weights + decoding.cache) / decoding.compiled.chip.bandwidth


def _token_seconds(decoding: CompiledDecoding) -> float:
    busy = max(compute_seconds(decoding.token, decoding.compiled.chip), _reading_seconds(decoding))
    return busy + COLLECTIVE_SECONDS * _count(decoding.token)


def _share_of_tokens(decoding: CompiledDecoding) -> float:
    """Of the whole program's time; the first token is the prefill's."""
    tokens = (decoding.max_new_tokens - 1) * _token_seconds(decoding)
    return tokens / (tokens + _prefill_seconds(decoding))


def _count(program: Program) -> int:
    # One by one: the compiler gives small ones of different kinds the same channel.
    return sum(each.count for each in program.transfers)
