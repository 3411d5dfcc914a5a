"""A bucket on this machine: an emulator of Google Cloud Storage, for gcsfs and TensorStore alike.

It knows no permissions and no conditions on writes, and `;` in a name confuses it. Tests are skipped where it is
not installed.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator

import pytest

BUCKET = "pgdist-tests"


@pytest.fixture(scope="session")
def emulator() -> Iterator[str]:
    """Its URL, which the environment names for everything that opens gs:// from here on."""
    pytest.importorskip("gcsfs")
    server_module = pytest.importorskip("gcp_storage_emulator.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = server_module.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    url = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in bucket_variables(url).items():
            patch.setenv(name, value)
        yield url
    server.stop()


def bucket_variables(url: str) -> dict[str, str]:
    """What makes gs:// mean the server at `url`; the last one keeps gcsfs from asking for a bucket's kind there."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


@pytest.fixture
def bucket_folder(emulator) -> str:
    """A folder in the bucket with nothing in it, and a name that no shell should see unquoted."""
    assert os.environ["STORAGE_EMULATOR_HOST"] == emulator
    return f"gs://{BUCKET}/{uuid.uuid4().hex}/a b$(touch x)"
