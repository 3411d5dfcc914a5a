"""Reading and writing safetensors; the judges are the safetensors library and files made by hand."""

import json
import os

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pgdist import weights
from pgdist.weights import boxes, loading
from pgdist.weights.safetensors_reader import SafetensorsReader
from pgdist.weights.safetensors_writer import SafetensorsWriter
from tests.models.small import SMALL
from tests.weights.samples import BFLOAT16, assert_same_bits, expected_of, random_array
from tests.weights.transformers_by_hand import (
    in_transformers,
    random_model,
    read_folder,
    read_header,
    read_safetensors,
    write_folder,
    write_safetensors,
)

P = PartitionSpec
TENSORS = {
    "b": random_array((3, 5), np.float32, seed=1),
    "a.weight": random_array((7, 2, 3), BFLOAT16, seed=2),
    "scalar": np.array(2.5, np.float16),
    "empty": np.zeros((0, 4), np.float32),
    "ids": np.arange(6).reshape(1, 6),
    "c": random_array((40,), np.float16, seed=3),
}
ROWS = 384  # of the stored embedding: 320 words and `<image>`, in multiples of 64


@pytest.fixture
def library():
    return pytest.importorskip("safetensors.numpy", reason="the safetensors library is in pgdist[parity]")


def read_all(path):
    with SafetensorsReader(path) as reader:
        found = {}
        for name, array in reader.arrays.items():
            block = array.read(array.info.shape, boxes.whole(array.info.shape))
            found[name] = block.numbers.copy()
            array.check([block])
            array.release()
    return found


def test_files_of_the_library_are_read(tmp_path, library):
    library.save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "np"})
    assert_same_bits(read_all(tmp_path / "x.safetensors"), TENSORS)


@pytest.mark.parametrize("metadata", [False, True])
def test_files_made_by_hand_are_read_in_the_order_of_their_data(tmp_path, metadata):
    found = read_all(write_safetensors(tmp_path / "x.safetensors", TENSORS, metadata=metadata))
    assert_same_bits(found, TENSORS)
    order = list(found)
    assert order[0] == "b" and order[-1] == "c" and order.index("a.weight") < order.index("ids")


def test_any_box_of_an_array_is_read_alone(tmp_path):
    array = TENSORS["a.weight"]
    with SafetensorsReader(write_safetensors(tmp_path / "x.safetensors", TENSORS)) as reader:
        box = ((2, 5), (0, 2), (0, 3))
        np.testing.assert_array_equal(reader.arrays["a.weight"].read((7, 2, 3), box).numbers, array[2:5])
        seen_as = array.reshape(14, 3)
        np.testing.assert_array_equal(
            reader.arrays["a.weight"].read((14, 3), ((3, 4), (1, 3))).numbers, seen_as[3:4, 1:3]
        )


def test_the_fingerprint_follows_names_shapes_numbers_and_shards(tmp_path):
    def digest(name, tensors):
        with SafetensorsReader(write_safetensors(tmp_path / name, tensors)) as reader:
            return reader.fingerprint()

    first = digest("x.safetensors", TENSORS)
    assert len(first) == 64 and int(first, 16)
    assert digest("x.safetensors", TENSORS) == first
    changed = TENSORS["c"].copy()
    changed[3] += 1
    others = [
        TENSORS | {"c": changed},
        TENSORS | {"c": TENSORS["c"].reshape(4, 10)},
        TENSORS | {"d": changed},
    ]
    assert len({first, *(digest("x.safetensors", tensors) for tensors in others)}) == 4


def test_headers_alone_are_read_where_no_numbers_are_asked_for(tmp_path, monkeypatch):
    config = SMALL["paligemma"]
    folder = write_folder(
        tmp_path / "m", config, in_transformers(random_model(config), config, rows=ROWS), shards=3
    )
    read, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: read.append(preadv(*arguments)) or read[-1])
    assert len(weights.read_header(folder)) == 32
    files = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files)
    small_files = sum(path.stat().st_size for path in folder.glob("*.json"))
    assert sum(read) <= headers + small_files


@pytest.mark.parametrize(
    ("name", "dtype", "shards"),
    [
        ("paligemma", np.dtype(np.float32), 1),
        ("paligemma", BFLOAT16, 3),
        ("paligemma2", np.dtype(np.float16), 1),
        ("paligemma2", np.dtype(np.float32), 3),
    ],
)
def test_a_folder_loads_onto_a_mesh_as_the_arrays_that_it_was_made_of(
    tmp_path, monkeypatch, name, dtype, shards
):
    monkeypatch.setattr(loading, "_BLOCK_BYTES", 1000)
    config = SMALL[name]
    flat = random_model(config, dtype)
    folder = write_folder(tmp_path / "m", config, in_transformers(flat, config, rows=ROWS), shards=shards)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def some_split(shape):
        """The last axis over one mesh axis, and the one before it over the other, where they divide."""
        spec = [None] * len(shape)
        for axis, (mesh_axis, size) in zip(
            range(len(shape) - 1, -1, -1), (("fsdp", 4), ("data", 2)), strict=False
        ):
            spec[axis] = mesh_axis if shape[axis] % size == 0 else None
        return NamedSharding(mesh, P(*spec))

    shardings = {name: some_split(array.shape) for name, array in flat.items()}
    assert sum(not s.is_fully_replicated for s in shardings.values()) > 25

    loaded = weights.load(folder, expected=expected_of(flat), shardings=shardings)

    assert_same_bits(loaded, flat)
    for name, array in loaded.items():
        assert array.sharding == shardings[name]
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), flat[name][shard.index])


@pytest.mark.parametrize("file", ["", "/model.safetensors.index.json"])
def test_a_folder_in_the_home_folder_is_found_by_its_short_name(tmp_path, monkeypatch, file):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = SMALL["paligemma"]
    flat = random_model(config)
    write_folder(tmp_path / "m", config, in_transformers(flat, config, rows=ROWS), shards=2)
    assert_same_bits(weights.load(f"~/m{file}", expected=expected_of(flat)), flat)


def write_with_ours(folder, tensors, *, order, parts=1, shard_bytes=10**9):
    """Writes with SafetensorsWriter, tensors in any order, each in some parts, the last part first."""
    folder.mkdir()
    table = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    with SafetensorsWriter(folder, table, shard_bytes=shard_bytes) as writer:
        for name in order:
            flat, first = tensors[name].reshape(-1), tensors[name].size
            for part in reversed(np.array_split(flat, parts)):
                first -= part.size
                writer.write(name, part, first=first)


@pytest.mark.parametrize("parts", [1, 3])
def test_what_is_written_in_any_order_and_parts_is_read_by_all(tmp_path, parts):
    names = sorted(TENSORS, key=lambda name: hash(name) % 7)
    write_with_ours(tmp_path / "m", TENSORS, order=names, parts=parts)
    path = tmp_path / "m" / "model.safetensors"
    assert sorted(os.listdir(tmp_path / "m")) == ["model.safetensors"]
    assert_same_bits(read_safetensors(path), TENSORS)
    assert_same_bits(read_all(path), TENSORS)
    header = read_header(path)
    assert header.pop("__metadata__") == {"format": "pt"}  # transformers refuses files without
    assert list(header) == list(TENSORS)
    assert (
        int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    )  # the data is aligned, as the library wants


def test_what_is_written_is_read_by_the_library(tmp_path, library):
    write_with_ours(tmp_path / "m", TENSORS, order=TENSORS)
    assert_same_bits(library.load_file(tmp_path / "m" / "model.safetensors"), TENSORS)


@pytest.mark.parametrize("limit", [1, 100, 150, 200])
def test_shards_keep_to_their_limit_and_the_index_names_all(tmp_path, limit):
    write_with_ours(tmp_path / "m", TENSORS, order=reversed(TENSORS), shard_bytes=limit)
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    for shard in shards:
        tensors = read_safetensors(shard)
        assert (
            sum(a.nbytes for a in tensors.values()) <= limit
            or sum(a.nbytes > 0 for a in tensors.values()) == 1
        )
    assert_same_bits(read_folder(tmp_path / "m"), TENSORS)

    index = tmp_path / "m" / "model.safetensors.index.json"
    assert len(shards) > 1 and [s.name for s in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    content = json.loads(index.read_text())
    assert content["metadata"]["total_size"] == sum(a.nbytes for a in TENSORS.values())
    assert content["weight_map"] == {name: s.name for s in shards for name in read_safetensors(s)}
    assert_same_bits(read_all(index), TENSORS)


def test_a_part_of_another_dtype_is_a_mistake_of_the_caller(tmp_path):
    with (
        SafetensorsWriter(tmp_path, {"x": ((2,), np.dtype(np.float32))}) as writer,
        pytest.raises(ValueError, match="x: expected float32, found float64"),
    ):
        writer.write("x", np.zeros(2), first=0)
