"""The order of examples as a pure function of seed and global row."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgdist.data.order import ExampleOrder
from pgdist.errors import ConfigError, DataError


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 300), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 50))
def test_every_epoch_has_every_example_once(n, seed, epoch):
    order = ExampleOrder(n, seed)
    assert sorted(order.example(epoch * n + i) for i in range(n)) == list(range(n))


def test_epochs_and_seeds_differ():
    n = 200
    epochs = {tuple(ExampleOrder(n, seed).ids(epoch, n)) for seed in range(5) for epoch in range(5)}
    assert len(epochs) == 25  # no epoch of one seed is an epoch of another


@settings(max_examples=20, deadline=None)
@given(step=st.integers(0, 10**9), batch_size=st.integers(1, 16))
def test_the_ids_of_a_step_are_the_examples_at_its_global_rows(step, batch_size):
    order = ExampleOrder(1000, 7)
    ids = order.ids(step, batch_size)
    assert ids.dtype == np.int64
    assert ids.tolist() == [
        ExampleOrder(1000, 7).example(step * batch_size + row) for row in range(batch_size)
    ]


def test_the_order_is_a_function_of_the_row_and_not_of_what_was_asked_before():
    rows = np.random.default_rng(0).permutation(3000)
    order = ExampleOrder(1000, 3)
    found = {int(row): order.example(int(row)) for row in rows}
    assert [found[row] for row in range(3000)] == [ExampleOrder(1000, 3).example(row) for row in range(3000)]


def test_the_order_survives_pickling():
    order = ExampleOrder(100, 3)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(order)).ids(5, 64), order.ids(5, 64))


def test_the_order_is_the_one_that_older_runs_saw():
    """A change here breaks the resuming of every run that was interrupted before it."""
    assert ExampleOrder(1000, 0).ids(0, 8).tolist() == GOLDEN_0
    assert ExampleOrder(1000, 17).ids(1000, 8).tolist() == GOLDEN_17
    assert [ExampleOrder(1000, 17).choose(row, 5) for row in range(8)] == GOLDEN_CHOICES


GOLDEN_0 = [297, 371, 706, 141, 935, 215, 144, 766]
GOLDEN_17 = [679, 141, 546, 494, 638, 185, 512, 161]
GOLDEN_CHOICES = [3, 0, 4, 1, 4, 2, 3, 1]


def test_another_process_sees_the_same_order():
    program = "from pgdist.data.order import ExampleOrder as E; print(*E(97, 5).ids(3, 97))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.split() == [str(one) for one in ExampleOrder(97, 5).ids(3, 97)]


def test_two_thousand_million_examples_take_no_memory_and_no_time():
    start = time.perf_counter()
    tracemalloc.start()
    order = ExampleOrder(2**31 - 1, 3)
    ids = order.ids(10**6, 1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20 and time.perf_counter() - start < 5
    assert len(set(ids.tolist())) == 1000 and ids.min() >= 0


def test_places_in_an_epoch_are_spread_evenly():
    """Chi-squared of where example e lands, in 16 x 16 cells, over 100 epochs: 15 * 15 degrees of freedom."""
    n, epochs = 128, 100
    order = ExampleOrder(n, 1)
    counts = np.zeros((16, 16))
    for epoch in range(epochs):
        ids = order.ids(epoch, n)
        np.add.at(counts, (np.arange(n) // 8, ids // 8), 1)
    expected = epochs * n / 256
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert 225 - 6 * np.sqrt(450) < chi_squared < 225 + 6 * np.sqrt(450)


def test_suffix_choices_are_a_function_of_seed_and_row_and_spread_evenly():
    choices = [ExampleOrder(10, 3).choose(row, 5) for row in range(2000)]
    assert choices == [ExampleOrder(10, 3).choose(row, 5) for row in range(2000)]
    assert choices != [ExampleOrder(10, 4).choose(row, 5) for row in range(2000)]
    counts = np.bincount(choices, minlength=5)
    assert np.abs(counts - 400).max() < 5 * np.sqrt(2000 * 0.2 * 0.8)
    assert {ExampleOrder(10, 3).choose(row, 1) for row in range(10)} == {0}


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_a_config_error(seed):
    with pytest.raises(ConfigError, match="seed: expected 0 to 2"):
        ExampleOrder(10, seed)


@pytest.mark.parametrize("n", [0, 2**31])
def test_a_number_of_examples_out_of_range_is_a_data_error(n):
    with pytest.raises(DataError, match="examples, found"):
        ExampleOrder(n, 0)
