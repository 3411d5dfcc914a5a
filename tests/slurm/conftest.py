from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing_programs


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Cluster]:
    """A Slurm of two nodes; where none is installed, tests are skipped, but not under CI, where one must be."""
    if missing := missing_programs():
        message = f"no {', '.join(missing)}: apt-get install slurm-wlm munge"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    folder = Path(tempfile.mkdtemp(prefix="pgdist_slurm_"))  # short: a socket's path has 107 characters
    folder.chmod(0o755)
    try:
        cluster = Cluster(folder)
        yield cluster
        cluster.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
