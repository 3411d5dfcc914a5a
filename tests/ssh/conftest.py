"""The machines of the tests in this folder."""

import os
import shutil
import sys

import pytest

from tests.ssh.machines import Machines


@pytest.fixture(scope="session")
def machines(tmp_path_factory):
    """Both machines, for as long as the tests run; outside CI the tests are skipped where there is no sshd."""
    if not os.environ.get("CI"):
        if not (shutil.which("sshd") or os.path.exists("/usr/sbin/sshd")):
            pytest.skip("needs sshd: install openssh-server")
        if sys.platform != "linux":
            pytest.skip("needs 127.0.0.2, which answers on Linux")
    machines = Machines(tmp_path_factory.mktemp("machines"))
    yield machines
    machines.close()
