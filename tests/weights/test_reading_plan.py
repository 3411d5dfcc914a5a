"""What each process reads of an array that is spread over several; real shardings, over devices that are made up."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from pgdist.weights import boxes, reading_plan
from pgdist.weights.array_info import ArrayInfo
from pgdist.weights.pieces import ModelArray, Piece, whole_piece

P = PartitionSpec
AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class Device:
    """What a sharding asks of a device."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "made up"
    client: object = None


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a plan asks of a stored array."""

    info: ArrayInfo
    min_run: int = 1


@pytest.fixture(autouse=True)
def every_array_is_large_enough(monkeypatch):
    monkeypatch.setattr(reading_plan, "_SMALL", 0)


def mesh_of(*, processes, devices, data=1):
    """A mesh (data, fsdp) whose devices go to the processes in order, as on hosts of a pod."""
    found = [Device(i, i * processes // devices) for i in range(devices)]
    return Mesh(np.array(found).reshape(data, -1), AXES)


def plain(shape, *, min_run=1, dtype=np.float32):
    """An array that is stored as it is, and what is stored."""
    info = ArrayInfo(name="x", shape=shape, dtype=np.dtype(dtype))
    return ModelArray(info=info, pieces=(whole_piece(info),)), {"x": Stored(info, min_run)}


def layers(count, shape, *, min_run=1):
    """An array whose layers are stored apart, each transposed, and what is stored."""
    infos = {
        f"x{i}": ArrayInfo(name=f"x{i}", shape=shape[::-1], dtype=np.dtype(np.float32)) for i in range(count)
    }
    pieces = tuple(
        Piece(stored_name=name, index=(i,), view=shape[::-1], axes=(1, 0), start=(0, 0))
        for i, name in enumerate(infos)
    )
    array = ModelArray(
        info=ArrayInfo(name="x", shape=(count, *shape), dtype=np.dtype(np.float32)), pieces=pieces
    )
    return array, {name: Stored(info, min_run) for name, info in infos.items()}


def needed_by(process, sharding, shape):
    """The boxes of the process's devices."""
    found = sharding.devices_indices_map(shape).items()
    return list(
        dict.fromkeys(boxes.from_slices(s, shape) for device, s in found if device.process_index == process)
    )


def share_read(array, stored, sharding, *, process=0, max_bytes=10**9):
    """Of the array's bytes, the part that a process reads."""
    needed = needed_by(process, sharding, array.info.shape)
    reads = reading_plan.reads(array, stored, needed, max_bytes=max_bytes)
    return sum(boxes.size_of(read.box) for read in reads) / math.prod(array.info.shape)


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_what_all_processes_hold_is_read_in_even_parts(processes):
    mesh = mesh_of(processes=processes, devices=8)
    array, stored = plain((3, 16, 5))
    found = reading_plan.sharding_to_read_on(array, stored, NamedSharding(mesh, P()))
    assert found.spec == P(None, AXES)
    assert {share_read(array, stored, found, process=p) for p in range(processes)} == {1 / processes}


def test_long_runs_are_read_by_those_who_hold_them():
    mesh = mesh_of(processes=2, devices=8)
    sharding = NamedSharding(mesh, P("fsdp"))
    array, stored = plain((16, 8), min_run=4)
    assert reading_plan.sharding_to_read_on(array, stored, sharding) is sharding
    assert share_read(array, stored, sharding) == 1 / 2


def test_halves_of_short_rows_are_read_as_rows_and_exchanged():
    mesh = mesh_of(processes=2, devices=8)
    sharding = NamedSharding(mesh, P(None, "fsdp"))
    array, stored = plain((16, 8), min_run=16)
    assert share_read(array, stored, sharding) == 1.0
    found = reading_plan.sharding_to_read_on(array, stored, sharding)
    assert found.spec == P(AXES)
    assert [share_read(array, stored, found, process=p) for p in (0, 1)] == [0.5, 0.5]


def test_halves_of_long_rows_are_read_as_they_are():
    sharding = NamedSharding(mesh_of(processes=2, devices=8), P(None, "fsdp"))
    array, stored = plain((16, 64), min_run=32)
    assert reading_plan.sharding_to_read_on(array, stored, sharding) is sharding
    assert share_read(array, stored, sharding) == 0.5


def test_layers_that_are_stored_apart_are_split_along_an_axis_that_the_processes_divide():
    """Three layers do not divide by eight devices; a layer's rows do."""
    sharding = NamedSharding(mesh_of(processes=2, devices=8, data=2), P(None, None, "fsdp"))
    array, stored = layers(
        3, (16, 8)
    )  # the process's devices hold all of it, in two halves of two devices each
    assert share_read(array, stored, sharding) == 1.0
    found = reading_plan.sharding_to_read_on(array, stored, sharding)
    assert {share_read(array, stored, found, process=p) for p in (0, 1)} == {0.5}
    assert found.spec in (P(None, AXES), P(None, None, AXES))


def test_whole_layers_are_read_where_the_devices_divide_them():
    sharding = NamedSharding(mesh_of(processes=4, devices=8), P(None, "fsdp"))
    array, stored = layers(8, (8, 4), min_run=1000)  # whose first axis is the last of what is stored
    assert share_read(array, stored, sharding) == 1.0
    found = reading_plan.sharding_to_read_on(array, stored, sharding)
    assert found.spec == P(AXES)
    assert share_read(array, stored, found) == 1 / 4


@pytest.mark.parametrize("shape", [(3, 5), (7,), ()])
def test_what_the_devices_do_not_divide_is_read_by_all(shape):
    sharding = NamedSharding(mesh_of(processes=2, devices=8), P())
    array, stored = plain(shape)
    assert reading_plan.sharding_to_read_on(array, stored, sharding) is sharding


def test_small_arrays_and_those_of_one_process_stay_on_their_sharding(monkeypatch):
    array, stored = plain((16, 8))
    of_one = NamedSharding(jax.make_mesh((2, 4), AXES), P())
    single = SingleDeviceSharding(jax.devices()[0])
    for sharding in (of_one, single, None):
        assert reading_plan.sharding_to_read_on(array, stored, sharding) is sharding
    spread = NamedSharding(mesh_of(processes=2, devices=8), P())
    monkeypatch.setattr(reading_plan, "_SMALL", 16 * 8 * 4)
    assert reading_plan.sharding_to_read_on(array, stored, spread) is not spread
    monkeypatch.setattr(reading_plan, "_SMALL", 16 * 8 * 4 + 1)
    assert reading_plan.sharding_to_read_on(array, stored, spread) is spread


@st.composite
def any_plan(draw):
    """An array, stored as it is or in transposed layers, on any even sharding over two processes."""
    shape = tuple(draw(st.sampled_from([1, 2, 3, 8, 16])) for _ in range(3))
    spec = [
        draw(st.sampled_from([None, *(axes for axes in (*AXES, AXES) if shape[i] % parts(axes) == 0)]))
        for i in range(3)
    ]
    used = [name for axes in spec if axes for name in ([axes] if isinstance(axes, str) else axes)]
    spec = P(*spec) if len(used) == len(set(used)) else P()
    min_run = draw(st.sampled_from([1, 5, 20, 10**6]))
    kind = draw(st.booleans())
    array, stored = plain(shape, min_run=min_run) if kind else layers(shape[0], shape[1:], min_run=min_run)
    return array, stored, NamedSharding(mesh_of(processes=2, devices=8, data=2), spec)


def parts(axes):
    return {"data": 2, "fsdp": 4, AXES: 8}[axes]


@given(plan=any_plan(), max_bytes=st.sampled_from([1, 24, 100, 10**6]))
@settings(deadline=None, max_examples=200)
def test_every_process_reads_all_that_its_devices_hold_in_blocks_in_the_files_order(plan, max_bytes):
    array, stored, sharding = plan
    shape = array.info.shape
    found = reading_plan.sharding_to_read_on(array, stored, sharding)
    for process in (0, 1):
        needed = needed_by(process, found, shape)
        reads = list(reading_plan.reads(array, stored, needed, max_bytes=max_bytes))
        arrived = np.zeros(shape, int)
        for read in reads:
            assert boxes.size_of(read.box) * 4 <= max(4, max_bytes)
            assert list(boxes.runs(read.box, read.piece.view, max_size=10**9)) == [read.box]  # contiguous
            box, ones = read.piece.to_model(read.inside, np.ones(boxes.shape_of(read.inside), int))
            arrived[boxes.within(box, boxes.whole(shape))] += ones
        assert arrived.max(initial=0) <= 1
        for box in needed:
            assert arrived[boxes.within(box, boxes.whole(shape))].all()
        order = [array.pieces.index(read.piece) for read in reads]
        offsets = [boxes.offset_of(read.box, read.piece.view) for read in reads]
        assert list(zip(order, offsets, strict=True)) == sorted(zip(order, offsets, strict=True))


@given(plan=any_plan())
@settings(deadline=None, max_examples=200)
def test_no_process_reads_more_than_it_would_of_its_own_shards(plan):
    array, stored, sharding = plan
    found = reading_plan.sharding_to_read_on(array, stored, sharding)
    own, chosen = (max(share_read(array, stored, s, process=p) for p in (0, 1)) for s in (sharding, found))
    assert chosen <= own
    assert found is sharding or chosen < 0.8 * own


def test_what_is_read_around_a_piece_is_cut_to_the_piece():
    """Short queries are read with the keys and values that lie between them, which are another array's."""
    info = ArrayInfo(name="q", shape=(10, 4), dtype=np.dtype(np.float32))
    piece = Piece(stored_name="qkv", view=(10, 3, 4), axes=(0, 2), start=(0, 0, 0))
    stored = {
        "qkv": Stored(ArrayInfo(name="qkv", shape=(10, 3, 4), dtype=np.dtype(np.float32)), min_run=1000)
    }
    array = ModelArray(info=info, pieces=(piece,))
    (read,) = reading_plan.reads(array, stored, [((5, 10), (0, 4))], max_bytes=10**6)
    assert read.box == ((5, 10), (0, 3), (0, 4))
    assert read.inside == ((5, 10), (0, 1), (0, 4))
