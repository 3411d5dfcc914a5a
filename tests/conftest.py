"""Every test sees eight CPU devices, and none may leave a process behind.

The variables are set before anything imports JAX, and only where the caller has not chosen otherwise.
"""

import atexit
import os
import shutil
import tempfile
import uuid

import psutil
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_xla_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _xla_flags:
    os.environ["XLA_FLAGS"] = f"{_xla_flags} --xla_force_host_platform_device_count=8".strip()
# As every command does on CPUs, and with the same reason: see pgdist.backend_flags.
if "xla_cpu_enable_concurrency_optimized_scheduler" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_enable_concurrency_optimized_scheduler=false".strip()
    )

# What takes long to compile is compiled once: by whichever test, worker or child process comes to it first.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.mkdtemp(prefix="pgdist_test_programs_")
    atexit.register(shutil.rmtree, _programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

# And nothing of a test goes into its user's own folder of fetched files and programs.
if "PGDIST_CACHE" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="pgdist_test_cache_")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["PGDIST_CACHE"] = _cache

# Processes inherit this, so that one is recognised as ours even when the process between has ended.
_MARK = "PGDIST_TEST_RUN"
os.environ[_MARK] = uuid.uuid4().hex

_SECONDS_TO_END = 3.0


@pytest.fixture(autouse=True)
def no_leaked_processes():
    """Fails the test when processes that it started outlive it, and ends them."""
    before = _our_processes()
    yield
    _, leaked = psutil.wait_procs(_our_processes() - before, timeout=_SECONDS_TO_END)
    names = [f"{process.pid}: {' '.join(_command(process))}" for process in leaked]
    for process in leaked:
        process.kill()
    if names:
        pytest.fail("the test left processes running (now killed):\n  " + "\n  ".join(names))


def _our_processes() -> set[psutil.Process]:
    ours = set(psutil.Process().children(recursive=True))
    ours.update(process for process in psutil.process_iter() if _is_marked(process))
    ours.discard(psutil.Process())
    return {process for process in ours if not _is_allowed(process)}


def _is_marked(process: psutil.Process) -> bool:
    try:
        return process.environ().get(_MARK) == os.environ[_MARK]
    except (psutil.Error, OSError):
        return False  # another user's, or just gone


def _is_allowed(process: psutil.Process) -> bool:
    """Python's own helpers live as long as the process that wanted them first."""
    helpers = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
    return any(helper in argument for helper in helpers for argument in _command(process))


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
