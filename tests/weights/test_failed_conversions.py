"""Conversions that fail leave what stood there, bit for bit, and nothing beside it."""

import contextlib
import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from pgdist import weights
from pgdist.errors import WeightsError
from pgdist.weights import converting
from pgdist.weights.safetensors_writer import SafetensorsWriter
from pgdist.weights.stored import FileArray
from tests.models.small import SMALL
from tests.weights.samples import write_npz
from tests.weights.transformers_by_hand import in_transformers, random_model, write_folder

CONFIG = SMALL["paligemma"]
TARGETS = ["new.npz", "new", "old.npz", "old"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The model as an npz and as a folder, about 600 kB each."""
    folder, flat = tmp_path_factory.mktemp("sources"), random_model(CONFIG)
    write_npz(folder / "w.npz", flat)
    write_folder(folder / "m", CONFIG, in_transformers(flat, CONFIG, rows=384), shards=2)
    return folder


def put_old(folder):
    """Something that stands where the conversion is to write."""
    write_npz(folder / "old.npz", {"x": np.arange(1000)})
    write_folder(folder / "old", CONFIG, {"x": np.arange(1000)})
    (folder / "old" / "tokenizer.model").write_bytes(bytes(range(256)))
    return folder


@pytest.fixture
def there(tmp_path):
    return put_old(tmp_path)


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


@contextlib.contextmanager
def fails_and_leaves_all(folder, message=None, *, error=WeightsError):
    before, descriptors = contents(folder), len(os.listdir("/proc/self/fd"))
    with pytest.raises(error, match=message) as caught:
        yield
    assert contents(folder) == before
    if error is WeightsError:
        assert caught.value.exit_code == 3
    del caught
    assert len(os.listdir("/proc/self/fd")) <= descriptors  # or the space is not free yet


REFUSED = {
    "an npz is there": ("old.npz", False, r"old\.npz: exists\. Name another place, or give --force"),
    "a folder is there": ("old", False, r"old: exists\. Name another place, or give --force"),
    "a folder of something else": (
        "else",
        True,
        r"else: is a folder of something else, which is not replaced",
    ),
    "a run": ("run", True, r"run: is a folder of something else, which is not replaced"),
    "a file in place of the folder": ("file", True, r"file: is a file; name a folder"),
    "a folder in place of the npz": ("folder.npz", True, r"folder\.npz: .*it is a folder"),
    "the name of one file": ("x/model.safetensors", True, r"model\.safetensors: name a folder"),
    "a bucket": ("gs://bucket/m", True, r"gs://bucket/m: .* written to local files"),
    "below a file": ("file/m", False, r"file/m: cannot write the weights: Not a directory"),
    "a name that is too long": ("m" * 300, False, r"mmm: cannot write the weights: File name too long"),
    "an npz below a file": (
        "file/m.npz",
        False,
        r"m\.npz: cannot write the weights: (Not a directory|File exists)",
    ),
}


@pytest.mark.parametrize(("target", "force", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("source", ["w.npz", "m"])
def test_a_target_that_cannot_be_is_named(sources, there, source, target, force, message):
    (there / "else").mkdir()
    (there / "else" / "thesis.tex").write_text("all of it")
    (there / "run" / "checkpoints").mkdir(parents=True)
    (there / "run" / "config.json").write_text('{"steps": 100, "model": {"preset": "tiny"}}')
    (there / "folder.npz").mkdir()
    (there / "file").write_text("x")
    path = target if "://" in target else there / target
    with fails_and_leaves_all(there, message):
        weights.convert(sources / source, path, force=force)


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for what stands there and half of the model."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system; the test with a limit on sizes stands in")
    try:
        yield put_old(disk)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", ["w.npz", "m"])
@pytest.mark.parametrize("room_is_asked_for", [True, False])
def test_a_full_disk_is_an_error_and_its_space_is_free_again(
    sources, small_disk, monkeypatch, source, target, room_is_asked_for
):
    """At once where the system can be asked for room, else in the middle of a tensor."""
    monkeypatch.setitem(SafetensorsWriter.__init__.__kwdefaults__, "shard_bytes", 150_000)
    if not room_is_asked_for:
        monkeypatch.delattr(os, "posix_fallocate")
    free = os.statvfs(small_disk).f_bavail
    with fails_and_leaves_all(small_disk, rf"{target}: cannot write the weights: No space left on device"):
        weights.convert(sources / source, small_disk / target, force=True)
    assert os.statvfs(small_disk).f_bavail == free


@pytest.mark.parametrize("target", ["new", "old.npz"])
def test_a_file_that_may_not_grow_is_an_error_too(sources, there, target):
    """As test_a_full_disk_..., for those who cannot mount one; Python ignores the signal that comes with it."""
    code = f"""
        import resource
        from pgdist import errors, weights
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        try:
            weights.convert({str(sources / "w.npz")!r}, {str(there / target)!r}, force=True)
        except errors.WeightsError as error:
            print(error)
    """
    before = contents(there)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=120
    )
    assert (
        f"{there / target}: cannot write the weights: File too large. Nothing that was there" in done.stdout
    )
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert contents(there) == before


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", ["w.npz", "m"])
@pytest.mark.parametrize("after", [0, 1, 40])
def test_a_source_that_cannot_be_read_to_its_end_changes_nothing(
    sources, there, monkeypatch, source, target, after
):
    preadv, left = os.preadv, [after]

    def failing(descriptor, buffers, offset):
        if len(buffers[0]) >= 16_000:  # numbers, not headers
            left[0] -= 1
            if left[0] < 0:
                raise OSError(5, "Input/output error")
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    if after == 40:  # the embedding in many blocks
        monkeypatch.setattr(converting, "_ROWS_BYTES", 17_000)
        left[0] = 8
    with fails_and_leaves_all(there, r"(w\.npz|safetensors.*): cannot read array '.*': Input/output error"):
        weights.convert(sources / source, there / target, force=True)


@pytest.mark.parametrize("target", TARGETS)
def test_an_interrupt_changes_nothing(sources, there, monkeypatch, target):
    read, count = FileArray.read, []

    def interrupted(array, view, box):
        count.append(1)
        if len(count) == 20:
            raise KeyboardInterrupt
        return read(array, view, box)

    monkeypatch.setattr(FileArray, "read", interrupted)
    with fails_and_leaves_all(there, error=KeyboardInterrupt):
        weights.convert(sources / "w.npz", there / target, force=True)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_not_on_the_disk_does_not_take_its_place(sources, there, monkeypatch, target):
    def failing(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with fails_and_leaves_all(there, rf"{target}: cannot write the weights: Input/output error"):
        weights.convert(sources / "w.npz", there / target, force=True)


@pytest.mark.parametrize("failing", [1, 2])
def test_an_old_folder_comes_back_where_the_new_one_cannot_take_its_place(
    sources, there, monkeypatch, failing
):
    """Two folders are renamed, one after the other: nothing can exchange them everywhere."""
    rename, calls = os.rename, []

    def failing_once(source, target):
        calls.append(target)
        if len(calls) == failing:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing_once)
    with fails_and_leaves_all(there, r"old: cannot write the weights: Input/output error"):
        weights.convert(sources / "w.npz", there / "old", force=True)


def test_a_tokenizer_that_is_none_changes_nothing(sources, there):
    (there / "bad.model").write_bytes(b"hello")
    with fails_and_leaves_all(there, r"bad\.model"):
        weights.convert(sources / "w.npz", there / "old", force=True, tokenizer=there / "bad.model")


@pytest.mark.parametrize("target", ["new", "old"])
def test_a_part_of_a_model_is_no_folder_for_transformers(there, target):
    flat = random_model(CONFIG)
    del flat["img/head/bias"]
    source = write_npz(there / "w.npz", flat)
    with fails_and_leaves_all(
        there, r"w\.npz .*fit the model.*(?s:.*)- img/head/bias .*(?s:.*)needs the whole model"
    ):
        weights.convert(source, there / target, force=True)
    write_npz(source, {name: array for name, array in flat.items() if name.startswith("img/")})
    with fails_and_leaves_all(there, r"w\.npz: is no whole PaliGemma \(array '.*' is missing"):
        weights.convert(source, there / target, force=True)
