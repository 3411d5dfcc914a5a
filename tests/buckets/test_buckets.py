"""Files, checkpoints and workdirs in a bucket; and what is said where a bucket cannot be used."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgdist import files
from pgdist.checkpoint import Checkpoints
from pgdist.config import default_config
from pgdist.errors import ConfigError
from pgdist.files import Mirror
from pgdist.train.state import TrainState
from pgdist.workdir import Workdir
from tests.buckets.conftest import bucket_variables
from tests.tiny_runs import ROOT


def test_a_mirror_copies_to_a_bucket_and_back(bucket_folder):
    mirror = Mirror(files.folder(bucket_folder))
    (mirror.local / "tb").mkdir()
    (mirror.local / "tb" / "events").write_bytes(bytes(range(256)) * 1000)
    (mirror.local / "metrics.jsonl").write_text("a\n")
    mirror.flush()
    (mirror.local / "metrics.jsonl").write_text("a\nb\n")
    (mirror.local / "tb" / "events").rename(mirror.local / "tb" / "other")
    mirror.close()

    other = Mirror(files.folder(bucket_folder))
    other.fetch()
    assert sorted(path.name for path in other.local.rglob("*")) == ["metrics.jsonl", "other", "tb"]
    assert (other.local / "metrics.jsonl").read_text() == "a\nb\n"
    assert (other.local / "tb" / "other").read_bytes() == bytes(range(256)) * 1000
    other.close()


def test_what_another_process_writes_is_seen_at_once_and_whole(bucket_folder):
    folder = files.folder(bucket_folder)
    files.write_text(folder / "a.json", "1")
    assert [path.name for path in folder.iterdir()] == ["a.json"] and not (folder / "b.json").exists()
    write = "import sys; from pgdist import files; f = files.folder(sys.argv[1]); "
    write += "files.write_text(f / 'a.json', '1' * 100); files.create_text(f / 'b.json', '2')"
    subprocess.run([sys.executable, "-c", write, bucket_folder], check=True, cwd=ROOT, timeout=60)
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "b.json"]
    assert (folder / "a.json").read_text() == "1" * 100 and (folder / "b.json").read_text() == "2"


def state_of(step: int) -> TrainState:
    return TrainState(step=jnp.int32(step), trainable={"w": jnp.arange(100.0) + step}, opt_state=())


@pytest.mark.slow  # the emulator cannot move, which gcsfs believes only after half a minute
def test_a_damaged_checkpoint_in_a_bucket_is_set_aside_and_the_one_before_is_used(bucket_folder):
    directory = files.folder(bucket_folder) / "checkpoints"
    checkpoints = Checkpoints(directory, keep=3, belongs_to={})
    for step in (1, 2):
        checkpoints.save(step, state_of(step))
    checkpoints.close()
    damaged = directory / "2" / "state" / "d"
    for path in damaged.iterdir():
        path.write_bytes(path.read_bytes()[:10])

    checkpoints = Checkpoints(directory, keep=3, belongs_to={})
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state_of(0))
    state = checkpoints.restore(abstract)
    checkpoints.close()
    assert int(state.step) == 1
    np.testing.assert_array_equal(state.trainable["w"], np.arange(100.0) + 1)
    assert [path.name for path in directory.iterdir() if path.name.isdecimal()] == ["1"]
    aside = directory.parent / "checkpoints_damaged"
    assert sorted(path.name for path in aside.iterdir()) == ["2", "README.txt"]


def test_a_workdir_in_a_bucket_knows_its_run_again(bucket_folder):
    config = default_config()
    with Workdir(bucket_folder) as workdir:
        workdir.check(config, fork=False, data="12 examples")
        workdir.make()
        workdir.record(config, data="12 examples")
        workdir.predictions(0).parent.mkdir()
        workdir.predictions(0).write_text("{}\n")
    assert not workdir.path.exists()

    assert Workdir(bucket_folder).read_config()["seed"] == config.seed
    config.seed = 7
    with pytest.raises(ConfigError) as raised, Workdir(bucket_folder) as workdir:
        workdir.check(config, fork=False, data="13 examples")
    assert f"--workdir={bucket_folder} holds another run" in str(raised.value)
    assert "config.seed: 0 -> 7" in str(raised.value) and "12 examples -> 13 examples" in str(raised.value)
    names = {path.name for path in files.folder(bucket_folder).iterdir()}
    assert names == {"config.json", "data.json", "predictions"}


def test_a_model_is_fetched_when_it_is_wanted(bucket_folder):
    assert not Workdir(bucket_folder).fetch_model().exists()
    (files.folder(bucket_folder) / "model.npz").write_bytes(b"weights" * 10**6)
    assert Workdir(bucket_folder).fetch_model().read_bytes() == b"weights" * 10**6


def test_a_bucket_that_is_not_there_is_an_error_with_advice(emulator):
    with pytest.raises(ConfigError) as raised:
        Workdir("gs://no-such-bucket/run").make()
    message = str(raised.value)
    assert message.startswith("--workdir=gs://no-such-bucket/run: cannot be read and written")
    assert "Does the bucket exist" in message


@pytest.fixture
def forbidding_server() -> Iterator[str]:
    """Answers as Google Cloud Storage does to somebody without the permission."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"error": {"code": 403, "message": "me@x does not have storage.objects.list access"}}'
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def predict_from(url: str, *, server: str) -> subprocess.CompletedProcess[str]:
    flags = [f"--workdir={url}", "--prompt=caption en", f"--images={ROOT}/README.md"]
    return subprocess.run(
        [sys.executable, "-m", "launch.predict", *flags],
        env=os.environ | bucket_variables(server), cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_missing_permission_ends_a_command_with_code_2_and_is_named(emulator, forbidding_server):
    done = predict_from("gs://some-bucket/run", server=forbidding_server)
    assert done.returncode == 2, done.stderr
    assert "me@x does not have storage.objects.list access" in done.stderr
    assert "Storage Object User" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_network_without_a_way_to_the_bucket_ends_a_command_with_code_2(emulator):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        done = predict_from("gs://some-bucket/run", server=f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert done.returncode == 2, done.stderr
    assert "Cannot connect to host" in done.stderr and "Traceback" not in done.stderr
