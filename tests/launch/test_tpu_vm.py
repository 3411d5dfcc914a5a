"""The script for a TPU VM: what it says, that both shells read it as it was meant, and whole jobs by it.

The command is the real one, in a process of its own; `small_tpu.py` says what stands in for Google Cloud.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.targets import tpu_vm_worker
from pgdist.errors import ConfigError
from tests.launch.goldens import check_golden
from tests.launch.small_tpu import calls, install_gcloud
from tests.tiny_runs import losses, tiny_config, write_config, write_inputs

ROOT = Path(__file__).parents[2]
SECONDS = 240

TPU = ["--tpu_name=cows", "--zone=us-west4-a"]
NEW = [*TPU, "--accelerator_type=v5litepod-16"]
TRAIN = ["--", "launch.train", "--config=configs/notebook.py", "--workdir=/mnt/work/cows"]
ODD = "a b;$(touch x) `touch y` 'z' \"$HOME\" \\ & | > < * ~ # \n!"

CASES = {
    "plain": [*NEW, "--project=my-project", "--setup=sudo mount 10.0.0.2:/work /mnt/work", *TRAIN],
    "bucket": [*NEW, *TRAIN[:-1], "--workdir=gs://cows/run"],
    "queued_spot": [
        *[*NEW, "--queued", "--spot", "--valid_until=6h", "--network=training", "--internal_ip"],
        *["--repo=https://example.com/me/pgdist.git@v1.2", "--env=HF_HOME=/mnt/work/hub", *TRAIN],
    ],
    "odd_names": [*NEW, *TRAIN[:-1], f"--workdir=/mnt/{ODD}"],
}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "launch.submit", "--to=tpu_vm", *arguments]


def submit(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("case", CASES)
def test_the_script_is_what_was_looked_at(case):
    done = submit("--dry_run", *CASES[case])

    assert done.returncode == 0, done.stderr
    check_golden(f"tpu_vm_{case}.txt", done.stdout)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck")
@pytest.mark.parametrize("case", CASES)
def test_shellcheck_finds_nothing_in_the_script_or_in_what_the_workers_run(case, tmp_path):
    script = submit("--dry_run", *CASES[case]).stdout
    remote = [
        word.removeprefix("--command=")
        for words in gcloud_words(script, tmp_path)
        for word in words
        if word.startswith("--command=")
    ]
    assert len(remote) == 2
    for text in [script, *[f"#!/bin/bash\n{part}" for part in remote]]:
        # Quoted words that look like expansions are the point.
        check = ["shellcheck", "--exclude=SC2016", "-"]
        found = subprocess.run(check, input=text, capture_output=True, text=True, timeout=60)
        assert found.returncode == 0, found.stdout


def gcloud_words(script: str, tmp_path: Path) -> list[list[str]]:
    """The calls of gcloud that the script makes of a TPU that is there."""
    folder = tmp_path / "words"
    folder.mkdir()
    program = 'import json, sys; open("calls", "a").write(json.dumps(sys.argv[1:]) + "\\n"); print("READY")'
    (folder / "gcloud").write_text(f"#!/bin/sh\nexec {sys.executable} -c '{program}' \"$@\"\n")
    (folder / "gcloud").chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    subprocess.run(
        ["bash", "-c", script, "script", "archive"], cwd=folder, env=environment, check=True, timeout=60
    )
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


@pytest.mark.skipif(not shutil.which("gcloud"), reason="no gcloud")
@pytest.mark.slow
def test_gcloud_has_every_flag_that_is_used(tmp_path):
    scripts = [submit("--dry_run", *CASES[case]).stdout for case in CASES]
    used: dict[str, set[str]] = {}
    for script in scripts:
        for action, rest in re.findall(r"gcloud compute tpus (\S+ \S+) ([^\n]*)", script):
            used.setdefault(action, set()).update(
                re.findall(r"(?<=[ '])--([a-z-]+)", rest.partition("--command")[0])
            )
    assert {"tpu-vm create", "queued-resources create", "tpu-vm scp", "tpu-vm ssh"} <= set(used)
    environment = os.environ | {"CLOUDSDK_CONFIG": str(tmp_path), "PAGER": "cat", "TERM": "dumb"}
    for action, names in used.items():
        words = ["gcloud", "compute", "tpus", *action.split(), "--help"]
        text = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120).stdout
        text = re.sub(r"\x1b\[[0-9;]*m", "", text)
        assert not [name for name in names if f"--{name}" not in text], action


@pytest.fixture
def tpu(tmp_path) -> Iterator[dict[str, str]]:
    """The environment with the small TPU; what still runs on it is ended."""
    environment = install_gcloud(tmp_path / "bin", tmp_path / "state") | {"PYTHONPATH": str(ROOT)}
    for chosen_by_tests in ("XLA_FLAGS", "JAX_PLATFORMS"):
        environment.pop(chosen_by_tests, None)
    yield environment
    for pid in tmp_path.glob("state/worker_*/.pgdist/*/pid"):
        os.kill(int(pid.read_text()), signal.SIGKILL)


def test_odd_words_reach_the_process_on_the_worker_as_they_were_typed(tpu, tmp_path):
    (tmp_path / "python").write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"open(os.environ['HOME'] + '/words', 'w').write(json.dumps([sys.argv[1:], os.environ['ODD']]))\n"
    )
    (tmp_path / "python").chmod(0o755)
    words = [*TRAIN[:-1], f"--workdir=/mnt/{ODD}", f"--config.tokenizer={ODD}"]

    done = submit(*NEW, "--detach", f"--python={tmp_path}/python", f"--env=ODD={ODD}", *words, env=tpu)

    assert done.returncode == 0, done.stderr
    for worker in range(2):
        path = tmp_path / f"state/worker_{worker}/words"
        end = time.monotonic() + 10
        while not path.exists() or not path.read_text():
            assert time.monotonic() < end
            time.sleep(0.05)
        seen, variable = json.loads(path.read_text())
        assert seen[:2] == ["-m", "launch.targets.tpu_vm_worker"]
        assert f"--workdir=/mnt/{ODD}" in seen[: seen.index("launch.train")]  # the agent's
        assert seen[seen.index("launch.train") :] == words[1:]
        assert variable == ODD
        home = {entry.name for entry in path.parent.iterdir()}
        assert home == {"words", ".pgdist"}
        (source,) = (path.parent / ".pgdist").glob("*/source")
        assert (source / "launch/agent.py").exists()


@pytest.mark.multiprocess
@pytest.mark.timeout(600)
def test_a_job_on_two_workers_is_followed_stopped_and_goes_on_where_it_was(tpu, tmp_path):
    config = write_config(
        tmp_path / "config.py", tiny_config(write_inputs(tmp_path / "inputs"), **{"checkpoint.every": 1})
    )
    workdir = tmp_path / "a b;$(touch x)"
    python = [f"--python={sys.executable}", f"--rendezvous_port={free_port()}", "--env=PGDIST_FAKE_DEVICES=2"]
    job = [*NEW, *python, "--grace=60", "--name=cows", "--", "launch.train", f"--config={config}"]
    job += [f"--workdir={workdir}"]

    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command(*job), cwd=tmp_path, env=tpu, stdout=log, stderr=log)
    try:
        end = time.monotonic() + SECONDS
        while not (workdir / "metrics.jsonl").exists() or len(losses(workdir)) < 2:
            assert first.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.1)
        first.send_signal(signal.SIGINT)
        assert first.wait(timeout=SECONDS) == 42, (tmp_path / "log").read_text()[-3000:]
    finally:
        first.kill()
        first.wait()
    text = (tmp_path / "log").read_text()
    assert "asked process" in text and "the state is saved" in text
    reached = max(losses(workdir))

    # The TPU is there now: it is not made again. Its worker 0 is killed once, and starts the job again by itself.
    port = f"--rendezvous_port={free_port()}"
    second = subprocess.run(
        command(*[port if word.startswith("--rendezvous_port") else word for word in job]),
        cwd=tmp_path,
        env=tpu,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )

    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-3000:]
    assert f"Resumed from the checkpoint of step {reached}" in second.stdout
    assert sorted(losses(workdir)) == list(range(1, 21))
    assert [words[2:4] for words in calls(tmp_path / "state")].count(["tpu-vm", "create"]) == 1
    assert not list(tmp_path.glob("state/worker_*/.pgdist/*/pid"))


def test_a_worker_starts_its_agent_again_after_losses_and_preemptions_only(tmp_path):
    codes = tmp_path / "codes"
    agent = [sys.executable, "-c", "import sys; p = sys.argv[1]; c = open(p).read().split(); "]
    agent[2] += "open(p, 'w').write(' '.join(c[1:])); sys.exit(int(c[0]))"

    def run(*planned: int, max_restarts: int = 2) -> tuple[int, str]:
        codes.write_text(" ".join(map(str, planned)))
        worker = tpu_vm_worker.Worker(tmp_path / "job", max_restarts=max_restarts, backoff=0)
        old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        try:
            code = worker.run([*agent, str(codes)])
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
        assert (tmp_path / "job/exit_code").read_text() == str(code)
        return code, codes.read_text()

    assert run(43, 42, 42, 42, 137, 0, 9) == (0, "9")
    assert run(43, 43, 143, 9) == (143, "9")
    assert run(43, max_restarts=0) == (43, "")
    for permanent in (1, 2, 3, 4):
        assert run(permanent, 9) == (permanent, "9")


def test_where_the_workers_are_is_asked_of_the_metadata_server(monkeypatch):
    asked: list[str] = []

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.headers['Metadata-Flavor']} {self.path}")
            self.send_response(200)
            self.end_headers()
            endpoints = b"a:1:10.0.0.7,b:2:10.0.0.8" if "endpoints" in self.path else b"1"
            self.wfile.write(endpoints)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Metadata)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    for name in ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    try:
        assert tpu_vm_worker.worker_addresses() == ["10.0.0.7", "10.0.0.8"]
        assert tpu_vm_worker.worker_number() == 1
    finally:
        server.shutdown()
        server.server_close()
    assert asked[0] == "Google /computeMetadata/v1/instance/attributes/worker-network-endpoints"
    with pytest.raises(ConfigError, match="Is this a TPU VM"):
        tpu_vm_worker.worker_number()


def test_a_tpu_that_was_taken_away_is_said_so_and_not_used(tpu, tmp_path):
    (tmp_path / "state/tpu-vm").write_text("PREEMPTED")

    done = submit(*NEW, *TRAIN, env=tpu)

    assert done.returncode == 2
    assert "the TPU cows is PREEMPTED" in done.stderr and "tpu-vm delete cows" in done.stderr
    assert [words[3] for words in calls(tmp_path / "state")] == ["describe"]


MISTAKES = {
    "no name": (["--zone=us-west4-a", *TRAIN], "--tpu_name must be given"),
    "no zone": (["--tpu_name=cows", *TRAIN], "--zone must be given"),
    "no type": ([*TPU, *TRAIN], "--accelerator_type must be given"),
    "type": ([*TPU, "--accelerator_type=v5e-16", *TRAIN], "v2, v3, v4, v5litepod, v5p, v6e"),
    "name": (["--tpu_name=My TPU", *NEW[1:], *TRAIN], "--tpu_name='My TPU'"),
    "zone": (["--tpu_name=cows", "--zone=west", *NEW[2:], *TRAIN], "--zone='west'"),
    "project": ([*NEW, "--project=P;x", *TRAIN], "--project='P;x'"),
    "image": ([*NEW, "--runtime_version=a b", *TRAIN], "--runtime_version='a b'"),
    "valid until": ([*NEW, "--queued", "--valid_until=soon", *TRAIN], "--valid_until='soon'"),
    "not queued": ([*NEW, "--valid_until=6h", *TRAIN], "--valid_until means nothing without --queued"),
    "spot and reserved": ([*NEW, "--spot", "--reserved", *TRAIN], "exclude each other"),
    "env": ([*NEW, "--env=A B", *TRAIN], "--env='A B'"),
    "repo": ([*NEW, "--repo=--upload-pack=x", *TRAIN], "--repo="),
    "relative workdir": ([*NEW, *TRAIN[:-1], "--workdir=runs/cows"], "an absolute path on the workers"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_gcloud_is_called(mistake, tpu, tmp_path):
    arguments, message = MISTAKES[mistake]

    done = submit(*arguments, env=tpu)

    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert calls(tmp_path / "state") == []


def test_without_gcloud_the_message_says_what_to_do(tmp_path):
    done = submit(*NEW, *TRAIN, env=os.environ | {"PATH": str(tmp_path)})

    assert done.returncode == 2
    assert "needs gcloud" in done.stderr and "--dry_run" in done.stderr
