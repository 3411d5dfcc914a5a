"""What is read off the text of a compiled program, against sums by hand over `small_program.txt`.

That has of each kind of instruction one, as the TPU's compiler writes them: a loop of five passes (0, 2, .. below 9)
with a collective fused into a matmul and one over which nothing is scheduled, a loop whose end is computed, a
conditional, a call, a start and its done with compute between them, another without, and two kernels.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pgdist.chips import Chip
from pgdist.plan import Collective, Kernel, Loop, Program, read_apart, read_program

TEXT = (Path(__file__).parent / "small_program.txt").read_text()
CHIP = Chip(clock=1.5e9, peak=197e12, memory=2**34, bandwidth=819e9, link=180e9)
# 8 * heads * queries * keys * head size, at 45 % of the peak.
KERNEL_CYCLES = int(8 * 4 * 256 * 512 * 128 / (0.45 * 197e12) * 1.5e9)


@pytest.fixture(scope="module")
def program() -> Program:
    return read_program(TEXT, CHIP)


def test_cycles_are_those_of_fusions_times_trips_and_of_attention_kernels(program):
    in_loops, largest_branch, called, alone = 5 * 1000 + 50, 40, 10, 300
    assert program.cycles == in_loops + largest_branch + called + alone + KERNEL_CYCLES == 14_484


def test_loops_tell_their_length_or_that_they_do_not(program):
    assert program.loops == (
        Loop(body="layer_body", trips=5, cycles=1000),
        Loop(body="search_body", trips=None, cycles=50),
    )


def test_collectives_are_counted_once_a_pass_with_the_bytes_of_their_results(program):
    float32, bfloat16 = 4, 2
    assert program.collectives == {
        "all-reduce": Collective(count=5, nbytes=5 * 64 * 64 * float32),
        "all-gather": Collective(count=6, nbytes=5 * 64 * 64 * bfloat16 + 64 * float32),
        "collective-permute": Collective(count=1, nbytes=64 * float32),
        "reduce-scatter": Collective(count=1, nbytes=64 * float32),
    }


def test_a_kernel_that_is_not_attention_is_named_as_uncharged(program):
    assert program.kernels == (
        Kernel(name="splash_mha_dkv.1", count=1, cycles=KERNEL_CYCLES),
        Kernel(name="sort_rows.1", count=1, cycles=None),
    )


def test_collectives_over_which_no_compute_is_scheduled_are_named_with_their_loop(program):
    exposed = {
        transfer.name: (transfer.loop, transfer.count)
        for transfer in program.transfers
        if transfer.is_exposed
    }
    assert exposed == {
        "all-reduce.1": ("layer_body", 5),
        "collective-permute-start.1": ("", 1),
        "reduce-scatter.1": ("", 1),
    }
    hidden = {transfer.name for transfer in program.transfers if not transfer.is_exposed}
    assert hidden == {"async-collective-start", "all-gather-start.1"}


def test_what_is_sent_is_what_a_ring_sends(program):
    sent = {transfer.name: transfer.sent for transfer in program.transfers}
    assert sent == {
        "async-collective-start": 5 * 64 * 64 * 2 * 7 / 8,  # a share of each of seven others
        "all-reduce.1": 5 * (64 * 64 + 64) * 4 * 2 * 7 / 8,  # reduced and scattered, then gathered
        "all-gather-start.1": 64 * 4 * 7 / 8,
        "collective-permute-start.1": 64 * 4,
        "reduce-scatter.1": 64 * 4 * 3,  # to three others of the four along fsdp
    }


def test_a_program_without_loops_and_collectives_costs_its_fusions():
    text = """\
ENTRY %main (x: f32[]) -> f32[] {
  ROOT %fusion = f32[] fusion(%x), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"7"}
}
"""
    assert read_program(text, CHIP) == Program(cycles=7, collectives={}, transfers=(), kernels=(), loops=())


def test_a_loop_is_read_apart_from_the_rest_of_its_program(program):
    rest, one_pass = read_apart(TEXT, CHIP, loop="matmul_while_gathering")
    assert one_pass.cycles == 1000
    assert rest.cycles == program.cycles - 5 * 1000
    assert [loop.body for loop in rest.loops] == ["search_body"]
    assert sum(each.count for each in program.transfers) == sum(
        each.count for each in rest.transfers
    ) + 5 * sum(each.count for each in one_pass.transfers)
    with pytest.raises(LookupError, match="no loop has nothing like it"):
        read_apart(TEXT, CHIP, loop="nothing like it")
