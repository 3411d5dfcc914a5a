"""The guard against processes that outlive their test works itself."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

LEAKY = """
import subprocess, sys

def test_that_leaves_a_child_and_an_orphan():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(61)"])
    orphan = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(62)'])"
    subprocess.run([sys.executable, "-c", orphan], start_new_session=True, check=True)

def test_that_waits_for_its_child():
    subprocess.run([sys.executable, "-c", "pass"], check=True)
"""


def test_a_test_that_leaves_processes_behind_fails_and_they_are_ended(tmp_path):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_leaky.py").write_text(LEAKY)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True, text=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert "2 passed, 1 error" in done.stdout
    leaked = set(re.findall(r"(\d+): .*time\.sleep\((?:61|62)\)", done.stdout))
    assert len(leaked) == 2
    assert not any(_is_running(int(pid)) for pid in leaked)


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
