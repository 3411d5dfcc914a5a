import os
import stat
import subprocess
import sys
import textwrap
import zipfile

import numpy as np
import pytest

from pgdist import weights
from pgdist.errors import WeightsError
from pgdist.weights import npz_writer
from tests.weights.samples import assert_same_bits, expected_of, random_array

OLD = {"x": random_array((4,), np.float32, seed=1)}
NEW = {"x": random_array((300, 100), np.float32, seed=2), "y": random_array((300, 100), np.float32, seed=3)}


@pytest.fixture
def path(tmp_path):
    weights.save(tmp_path / "model.npz", OLD)
    return tmp_path / "model.npz"


def assert_untouched(path):
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert_same_bits(weights.load(path, expected=expected_of(OLD)), OLD)


def test_saving_replaces_the_old_file(path):
    weights.save(path, NEW)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert_same_bits(weights.load(path, expected=expected_of(NEW)), NEW)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(path):
    """The limit on a file's size stands in for the disk: writing past it fails in the middle of an array."""
    code = f"""
        import resource, numpy as np
        from pgdist import errors, weights
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
        arrays = {{"x": np.ones((300, 100), np.float32), "y": np.ones((300, 100), np.float32)}}
        try:
            weights.save({str(path)!r}, arrays)
        except errors.WeightsError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=120
    )
    assert "model.npz: cannot write the weights: File too large" in done.stdout
    assert "Nothing that was there has changed" in done.stdout
    assert done.stderr == ""
    assert_untouched(path)


def test_an_error_in_the_middle_leaves_the_old_file(path):
    class Interrupted(dict):
        def items(self):
            yield "x", NEW["x"]
            yield "y", Unfetchable()

    class Unfetchable:
        shape, dtype = (3,), np.dtype(np.float32)

        def __array__(self, *args, **options):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights.save(path, Interrupted(NEW))
    assert_untouched(path)


def test_a_failing_sync_is_a_failure_to_save(path, monkeypatch):
    def no_sync(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", no_sync)
    with pytest.raises(WeightsError, match="cannot write the weights: Input/output error"):
        weights.save(path, NEW)
    assert_untouched(path)


def test_a_folder_or_a_file_in_the_way_is_named(path):
    with pytest.raises(WeightsError, match="it is a folder; name the file itself"):
        weights.save(path.parent, NEW)
    with pytest.raises(WeightsError, match=r"model\.npz/inner\.npz: cannot write the weights"):
        weights.save(path / "inner.npz", NEW)
    assert_untouched(path)


def test_missing_folders_are_made(tmp_path):
    weights.save(tmp_path / "a" / "b" / "model.npz", OLD)
    assert weights.read_header(tmp_path / "a" / "b" / "model.npz")


def test_a_link_is_kept_and_the_file_behind_it_replaced(path):
    link = path.with_name("link.npz")
    link.symlink_to(path.name)
    weights.save(link, NEW)
    assert link.is_symlink()
    assert set(weights.read_header(path)) == {"x", "y"}


def test_the_file_has_the_usual_permissions(path):
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_the_old_file_is_readable_while_the_new_one_is_written(path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        npz_writer, "cast", lambda block, dtype: seen.append(weights.fingerprint(path)) or block.astype(dtype)
    )
    before = weights.fingerprint(path)
    weights.save(path, NEW)
    assert set(seen) == {before}


def test_sizes_and_offsets_of_64_bits_are_written_and_read(path, monkeypatch):
    """As past 4 GiB: a member reserves 64 bits from the start, when its length is not known yet."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    weights.save(path, NEW)
    monkeypatch.undo()

    with path.open("rb") as file:
        assert file.read(26)[18:] == b"\xff" * 8
    with zipfile.ZipFile(path) as file:
        assert all(member.extract_version == zipfile.ZIP64_VERSION for member in file.infolist())
    assert_same_bits(weights.load(path, expected=expected_of(NEW)), NEW)
    with np.load(path) as file:
        assert_same_bits(dict(file), NEW)
