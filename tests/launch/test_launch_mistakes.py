"""What a user can get wrong on the way to a running job: one message, the right code, nothing started."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.tiny_runs import ROOT, tiny_config, write_config, write_inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mistake:
    """arguments: of `python -m`; {tmp} is a folder of the test's own.  says: all of it, on standard error."""

    name: str
    arguments: Sequence[str]
    says: Sequence[str]
    code: int = 2
    without_tools: bool = False  # an empty PATH: no sbatch, kubectl, gcloud, ssh


TRAIN = ("--", "launch.train", "--config=configs/demo.py", "--workdir={tmp}/run")
TRAIN_IN_BUCKET = (*TRAIN[:-1], "--workdir=gs://bucket/run")
LOCAL = ("launch.submit", "--to=local")
AGENT = ("launch.agent", "--workdir={tmp}/run")
SLURM = ("launch.submit", "--to=slurm", "--nodes=2")
SSH = ("launch.submit", "--to=ssh")
JOBSET = ("launch.submit", "--to=jobset")
TPU_VM = ("launch.submit", "--to=tpu_vm")

MISTAKES = [
    Mistake(name="no target", arguments=("launch.submit", *TRAIN), says=("--to must be given",)),
    Mistake(
        name="a target that does not exist",
        arguments=("launch.submit", "--to=slrum", *TRAIN),
        says=("--to", "slrum", "slurm"),
    ),
    Mistake(name="no command", arguments=LOCAL, says=("give the command to run after --",)),
    Mistake(
        name="a misspelt command",
        arguments=(*LOCAL, "--", "launch.trian", "--workdir={tmp}/run"),
        says=("'launch.trian'", "did you mean launch.train?"),
    ),
    Mistake(
        name="training without a workdir",
        arguments=(*LOCAL, "--", "launch.train", "--config=configs/demo.py"),
        says=("--workdir must be given to launch.train",),
    ),
    Mistake(
        name="a flag that the agents set",
        arguments=(*LOCAL, *TRAIN, "--process_id=1"),
        says=("--process_id after --", "the agents say that"),
    ),
    Mistake(
        name="a flag of another target",
        arguments=(*LOCAL, "--partition=gpu", *TRAIN),
        says=("unknown flag --partition",),
    ),
    Mistake(
        name="no process at all",
        arguments=(*LOCAL, "--processes=0", *TRAIN),
        says=("--processes", "not a positive integer"),
    ),
    Mistake(
        name="GPUs where there are none",
        arguments=(*LOCAL, "--gpus=all", *TRAIN),
        says=("--gpus=all: cannot ask nvidia-smi",),
        without_tools=True,
    ),
    Mistake(
        name="GPUs that do not divide",
        arguments=(*LOCAL, "--processes=2", "--gpus=0,1,2", *TRAIN),
        says=("3 GPUs cannot be divided evenly among 2 processes",),
    ),
    Mistake(
        name="a GPU twice",
        arguments=(*LOCAL, "--gpus=0,0", *TRAIN),
        says=("--gpus=0,0: a GPU is named twice",),
    ),
    Mistake(
        name="a phase that does not exist",
        arguments=(*LOCAL, "--silence=steping=3", *TRAIN),
        says=("--silence=steping=3: expected PHASE=SECONDS", "stepping"),
    ),
    Mistake(
        name="a workdir that is a file",
        arguments=(*LOCAL, "--", "launch.train", "--config=configs/demo.py", "--workdir={tmp}/file"),
        says=("--workdir={tmp}/file", "expected a folder that can be made and written"),
    ),
    Mistake(
        name="ranks that are no numbers",
        arguments=(*LOCAL, "--ranks=first", *TRAIN),
        says=("--ranks=first: expected numbers of processes",),
    ),
    Mistake(
        name="a mistake that a detached agent finds",
        arguments=(*LOCAL, "--detach", "--processes=2", "--gpus=0,1,2", *TRAIN),
        says=("3 GPUs cannot be divided evenly among 2 processes",),
    ),
    Mistake(
        name="no Slurm here",
        arguments=(*SLURM, *TRAIN),
        says=("no sbatch on this machine",),
        without_tools=True,
    ),
    Mistake(
        name="an ill-written host file",
        arguments=(*SSH, "--host_file={tmp}/hosts", *TRAIN),
        says=("{tmp}/hosts", "line 2", "slots"),
    ),
    Mistake(
        name="no ssh here",
        arguments=(*SSH, "--host_file={tmp}/good_hosts", *TRAIN),
        says=("there is no `ssh` on this machine",),
        without_tools=True,
    ),
    Mistake(
        name="an image name with a space",
        arguments=(*JOBSET, "--image=my image:1", "--tpu=v5e:4x4", *TRAIN),
        says=("--image='my image:1'",),
    ),
    Mistake(
        name="a topology that does not exist",
        arguments=(*JOBSET, "--image=a/b:1", "--tpu=v5e:3x3", *TRAIN),
        says=("--tpu=v5e:3x3", "4x4"),
    ),
    Mistake(
        name="no kubectl here",
        arguments=(*JOBSET, "--image=a/b:1", "--tpu=v5e:4x4", *TRAIN_IN_BUCKET),
        says=("kubectl",),
        without_tools=True,
    ),
    Mistake(
        name="no gcloud here",
        arguments=(
            *TPU_VM,
            "--tpu_name=a",
            "--zone=us-west4-a",
            "--project=my-project",
            "--accelerator_type=v5litepod-16",
            *TRAIN_IN_BUCKET,
        ),
        says=("gcloud",),
        without_tools=True,
    ),
    Mistake(
        name="status of no job",
        arguments=("launch.submit", "status", "--workdir={tmp}/run"),
        says=("no job was submitted with this workdir",),
    ),
    Mistake(
        name="cancel without a workdir",
        arguments=("launch.submit", "cancel"),
        says=("--workdir must be given",),
    ),
    Mistake(
        name="an agent of several hosts without a rendezvous",
        arguments=(*AGENT, "--hosts=2", "--host=0", "--job_id=7", *TRAIN),
        says=("--rendezvous must be given",),
    ),
    Mistake(
        name="a rendezvous without a port",
        arguments=(*AGENT, "--hosts=2", "--host=0", "--job_id=7", "--rendezvous=node0", *TRAIN),
        says=("--rendezvous: expected HOST:PORT", "'node0'"),
    ),
    Mistake(
        name="a host that is none of them",
        arguments=(*AGENT, "--hosts=2", "--host=2", "--job_id=7", "--rendezvous=node0:1234", *TRAIN),
        says=("--host=2: expected 0 to 1 for --hosts=2",),
    ),
    Mistake(
        name="an agent without a command", arguments=(*AGENT, "--"), says=("expected a command after --",)
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name.replace(" ", "_"))
def test_a_mistake_is_told_and_nothing_is_started(mistake, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "hosts").write_text("node0 slots=4\nnode1 slots=many\n")
    (tmp_path / "good_hosts").write_text("node0\nnode1\n")
    environment = dict(os.environ) | ({"PATH": str(tmp_path)} if mistake.without_tools else {})

    done = subprocess.run(
        [sys.executable, "-m", *(argument.format(tmp=tmp_path) for argument in mistake.arguments)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == mistake.code, done.stderr
    for said in mistake.says:
        assert said.format(tmp=tmp_path) in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    inputs = write_inputs(tmp_path_factory.mktemp("inputs"))
    return write_config(tmp_path_factory.mktemp("config") / "config.py", tiny_config(inputs))


@pytest.mark.multiprocess
def test_three_processes_for_a_batch_of_eight_end_with_2_and_are_not_restarted(config_file, tmp_path):
    command = ["launch.train", f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "launch.submit",
            "--to=local",
            "--processes=3",
            "--devices_per_process=1",
            "--",
        ]
        + command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )

    assert done.returncode == 2, done.stderr
    assert "config.batch_size=8 cannot be split evenly over the 3 devices" in done.stdout
    assert [path.name for path in (tmp_path / "run/attempts").glob("0*")] == ["000"]
