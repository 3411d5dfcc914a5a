"""Where compiled programs are kept: the user's folder first, and nowhere if the processes of a job might differ."""

from __future__ import annotations

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from pgdist import program_cache
from pgdist.program_cache import open_cache


@pytest.fixture
def chosen(monkeypatch):
    """A function: the folder that JAX has been told, after `open_cache` in a process of so many."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")

    def choose(workdir="", *, processes=1, backend="gpu"):
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        monkeypatch.setattr(jax, "process_count", lambda: processes)
        found = open_cache(str(workdir))
        assert jax.config.jax_compilation_cache_dir == (None if found is None else str(found))
        return found

    yield choose
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def test_a_process_alone_keeps_programs_in_a_folder_that_only_its_user_can_open(
    chosen, tmp_path, monkeypatch
):
    monkeypatch.setenv("PGDIST_CACHE", str(tmp_path / "cache"))
    assert chosen(tmp_path / "run") == tmp_path / "cache" / "programs"
    assert (tmp_path / "cache" / "programs").stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "run").exists()


def test_processes_of_a_job_share_the_folder_in_their_workdir(chosen, tmp_path):
    assert chosen(tmp_path / "run", processes=2) == tmp_path / "run" / program_cache.IN_WORKDIR


def test_several_processes_on_cpus_keep_nothing_whatever_jax_was_told(chosen, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    assert chosen(tmp_path / "run", processes=2, backend="cpu") is None
    assert chosen(tmp_path / "run", processes=1, backend="cpu") == tmp_path / "mine"


@pytest.mark.parametrize("workdir", ["", "gs://bucket/run"])
def test_processes_that_share_no_folder_keep_nothing(chosen, workdir):
    assert chosen(workdir, processes=2) is None


def test_the_users_folder_wins_and_an_empty_name_means_none(chosen, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    assert chosen(tmp_path) is None
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert open_cache(str(tmp_path / "run")) == tmp_path / "mine"


def test_a_folder_that_cannot_be_made_costs_the_cache_and_not_the_run(chosen, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PGDIST_CACHE", str(tmp_path / "file"))
    assert chosen() is None
    assert "Compiled programs are not kept" in caplog.text and "JAX_COMPILATION_CACHE_DIR" in caplog.text
