"""What is applied to a Kubernetes cluster, held against the API's schemas and against what the cluster makes of it.

The command is the real one, in a process of its own. There is no cluster here: the schemas are the API's own facts,
kubectl itself reads the YAML, and `small_cluster.py` (test_jobset_runs.py) does with a JobSet what its controller does.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fastjsonschema
import pytest
import yaml

from launch.targets.tpu_slices import read_slice
from tests.launch.goldens import check_golden
from tests.launch.small_cluster import expand

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "tests/launch/schemas/jobset_v1alpha2.json"

IMAGE = "--image=europe-docker.pkg.dev/project/images/pgdist:v1"
WORK = "--volume=work:/work"
TRAIN = ["--", "launch.train", "--config=configs/notebook.py", "--workdir=/work/cows"]
TPU = [IMAGE, WORK, "--tpu=v5e:4x4"]

CASES = {
    "tpu": [*TPU, *TRAIN],
    "multislice": [
        *[*TPU, "--slices=2", "--spot", "--namespace=research", "--queue=tpus", "--service_account=trainer"],
        *[
            "--max_restarts=3",
            "--grace=300",
            "--volume=gs://cow-pictures:/data",
            *TRAIN,
            "--config.batch_size=256",
        ],
    ],
    "gpu": [
        *[IMAGE, WORK, "--gpu=nvidia-h100-80gb", "--nodes=2", "--gpus_per_node=8", "--processes_per_node=8"],
        *["--shm=64Gi", "--env=NCCL_DEBUG=INFO", "--secret_env=HF_TOKEN=hub:token", *TRAIN],
    ],
    "cpu": [
        *[IMAGE, WORK, "--nodes=2", "--devices_per_process=4", "--cpu=8", "--memory=16Gi"],
        *["--node_selector=pool=large", "--toleration=dedicated=training:NoSchedule", *TRAIN],
    ],
    "one_node": [IMAGE, "--", "launch.env"],
}


def submit(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.submit", "--to=jobset", *arguments],
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def manifest(*arguments: str) -> dict[str, Any]:
    done = submit("--dry_run", *arguments)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def pod(rendered: dict[str, Any]) -> dict[str, Any]:
    return job(rendered)["template"]["spec"]


def job(rendered: dict[str, Any]) -> dict[str, Any]:
    return rendered["spec"]["replicatedJobs"][0]["template"]["spec"]


def container(rendered: dict[str, Any]) -> dict[str, Any]:
    return pod(rendered)["containers"][0]


@pytest.fixture(scope="module")
def validate():
    return fastjsonschema.compile(json.loads(SCHEMA.read_text()))


@pytest.mark.parametrize("case", CASES)
def test_a_manifest_is_what_the_api_takes_and_what_was_looked_at(case, validate):
    done = submit("--dry_run", *CASES[case])

    assert done.returncode == 0, done.stderr
    validate(yaml.safe_load(done.stdout))
    check_golden(f"jobset_{case}.txt", done.stdout)


def test_the_schema_finds_what_the_api_would_refuse(validate):
    good = manifest(*CASES["multislice"])
    container(good)["imagePullPolice"] = "Always"
    with pytest.raises(fastjsonschema.JsonSchemaException, match="imagePullPolice"):
        validate(good)
    del container(good)["imagePullPolice"]
    good["spec"]["failurePolicy"]["rules"][0]["action"] = "Fail"
    with pytest.raises(fastjsonschema.JsonSchemaException, match="action"):
        validate(good)
    good["spec"]["failurePolicy"]["rules"][0]["action"] = "FailJobSet"
    container(good)["env"].append({"name": "COUNT", "value": 3})
    with pytest.raises(fastjsonschema.JsonSchemaException, match="value"):
        validate(good)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl")
def test_kubectl_reads_the_same_texts_from_the_yaml(tmp_path):
    odd = [
        "1e3",
        "0x1F",
        "yes",
        "null",
        "~",
        "2020-01-01",
        "a: b",
        "- a",
        "#",
        "'",
        '"',
        "\\",
        "é",
        "=",
        "1_0",
        "",
        "{}",
    ]
    variables = [f"--env=ODD_{number}={value}" for number, value in enumerate(odd)]
    done = submit("--dry_run", *TPU, *variables, *TRAIN, *odd)
    assert done.returncode == 0, done.stderr

    read = subprocess.run(
        ["kubectl", "annotate", "--local", "--filename=-", "--output=json", "a=b"],
        input=done.stdout,
        env=os.environ | {"HOME": str(tmp_path), "KUBECONFIG": str(tmp_path / "none")},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert read.returncode == 0, read.stderr
    seen = json.loads(read.stdout)
    assert seen["metadata"].pop("annotations").pop("a") == "b"
    expected = yaml.safe_load(done.stdout)
    expected["metadata"].pop("annotations")
    assert seen == expected
    assert [entry["value"] for entry in container(seen)["env"] if entry["name"].startswith("ODD_")] == odd
    assert container(seen)["args"][-len(odd) :] == odd


def test_the_words_of_the_command_reach_the_agent_as_they_were_typed(tmp_path):
    name = "a b;$(touch x) $PGDIST_JOBSET_UID $$ $(PGDIST_JOBSET_UID) \"'`touch y`"
    rendered = manifest(IMAGE, WORK, "--nodes=2", f"--env=ODD={name}", *TRAIN[:-1], f"--workdir=/work/{name}")
    (tmp_path / "python").write_text('#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done\n')
    (tmp_path / "python").chmod(0o755)
    known = {"PGDIST_JOBSET_UID": "uid", "JOB_COMPLETION_INDEX": "1"}
    command = [expand(word, known) for word in container(rendered)["command"] + container(rendered)["args"]]

    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=known | {"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        timeout=10,
    )

    words = done.stdout.decode().split("\0")[:-1]
    assert words[:4] == ["-m", "launch.agent", "--job_id=uid", "--host=1"]
    assert words.count(f"--workdir=/work/{name}") == 2
    assert "--" in words and words[words.index("--") + 1 :] == [
        "launch.train",
        TRAIN[2],
        f"--workdir=/work/{name}",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["python"]
    (odd,) = [entry["value"] for entry in container(rendered)["env"] if entry["name"] == "ODD"]
    assert expand(odd, known) == name


@pytest.mark.parametrize(
    "tpu, chips_per_host, hosts, accelerator",
    [
        ("v4:2x2x1", 4, 1, "tpu-v4-podslice"),
        ("v4:4x4x8", 4, 32, "tpu-v4-podslice"),
        ("v5p:2x2x2", 4, 2, "tpu-v5p-slice"),
        ("v5e:1x1", 1, 1, "tpu-v5-lite-podslice"),
        ("v5e:2x4", 4, 2, "tpu-v5-lite-podslice"),
        ("v5e:16x16", 4, 64, "tpu-v5-lite-podslice"),
        ("v6e:4x8", 4, 8, "tpu-v6e-slice"),
        ("tpu7x:4x4x4", 4, 16, "tpu7x"),
    ],
)
def test_a_slice_has_a_pod_for_each_of_its_hosts(tpu, chips_per_host, hosts, accelerator):
    tpu_slice = read_slice(tpu)

    assert (tpu_slice.hosts, tpu_slice.chips_per_host) == (hosts, chips_per_host)
    assert tpu_slice.accelerator == accelerator


def test_eight_chips_can_stand_on_one_host():
    rendered = manifest(IMAGE, WORK, "--tpu=v5e:2x4", "--chips_per_host=8", *TRAIN)

    assert job(rendered)["completions"] == 1
    assert container(rendered)["resources"] == {"limits": {"google.com/tpu": 8}}
    assert not [word for word in container(rendered)["args"] if "hosts" in word or "rendezvous" in word]


def test_the_hosts_of_all_slices_have_numbers_of_their_own_and_one_address_to_meet():
    rendered = manifest(*CASES["multislice"])
    script = container(rendered)["command"][2].replace("exec python", "echo")

    def host(index: int, number: int) -> str:
        known = {"PGDIST_SLICE": str(index), "JOB_COMPLETION_INDEX": str(number), "PGDIST_JOBSET_UID": "u"}
        said = subprocess.run(
            ["/bin/sh", "-c", expand(script, known)], env=known, capture_output=True, text=True
        )
        return re.search(r"--host=(\d+)", said.stdout)[1]

    assert [host(index, number) for index in range(2) for number in range(4)] == list("01234567")
    assert "--hosts=8" in container(rendered)["args"]
    first = f"{rendered['metadata']['name']}-hosts-0-0.{rendered['metadata']['name']}"
    assert f"--rendezvous={first}:8490" in container(rendered)["args"]
    variables = {entry["name"]: entry.get("value") for entry in container(rendered)["env"]}
    assert variables["MEGASCALE_COORDINATOR_ADDRESS"] == first
    assert variables["MEGASCALE_NUM_SLICES"] == "2"


def test_a_workdir_in_a_bucket_needs_no_volume():
    rendered = manifest(IMAGE, "--tpu=v5e:4x4", *TRAIN[:-1], "--workdir=gs://cows/run")

    assert container(rendered)["args"].count("--workdir=gs://cows/run") == 2
    assert len(pod(rendered)["volumes"]) == 1


def test_the_kubelet_waits_longer_than_the_agent():
    assert pod(manifest("--grace=300.5", *CASES["tpu"]))["terminationGracePeriodSeconds"] == 331


MISTAKES = {
    "no image": (["--tpu=v5e:4x4", *TRAIN], "--image must be given"),
    "image with a space": (["--image=my image", *TPU[1:], *TRAIN], "--image='my image'"),
    "image in capitals": (["--image=eu.gcr.io/P/pgdist", *TPU[1:], *TRAIN], "--image="),
    "no such topology": (
        [IMAGE, WORK, "--tpu=v5e:3x3", *TRAIN],
        "--tpu=v5e:3x3: a v5e has no slices of 3x3; there are 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16",
    ),
    "sides in another order": ([IMAGE, WORK, "--tpu=v4:4x4x2", *TRAIN], "did you mean 2x4x4?"),
    "no topology": ([IMAGE, WORK, "--tpu=v5e", *TRAIN], "such as v5e:4x4"),
    "no such generation": ([IMAGE, WORK, "--tpu=v9:4x4", *TRAIN], "v4, v5p, v5e, v6e, tpu7x"),
    "hosts not filled": (
        [*TPU, "--chips_per_host=8", *TRAIN],
        "the 16 chips of a v5e:4x4 stand on hosts of 4",
    ),
    "slices of one host": ([IMAGE, WORK, "--tpu=v5e:2x2", "--slices=2", *TRAIN], "--slices=2"),
    "two kinds": ([*TPU, "--gpu=nvidia-l4", *TRAIN], "--gpu means nothing with --tpu"),
    "slices of GPUs": ([IMAGE, WORK, "--gpu=any", "--slices=2", *TRAIN], "--slices means nothing with --gpu"),
    "uneven": ([IMAGE, WORK, "--gpu=any", "--processes_per_node=3", *TRAIN], "--processes_per_node=3"),
    "name": ([*TPU, "--name=My_Job", *TRAIN], "--name=My_Job"),
    "name too long": ([*TPU, f"--name={'a' * 50}", *TRAIN], "at most 47"),
    "namespace": ([*TPU, "--namespace=a.b", *TRAIN], "--namespace='a.b'"),
    "queue": ([*TPU, "--queue=Q", *TRAIN], "--queue='Q'"),
    "service account": ([*TPU, "--service_account=a b", *TRAIN], "--service_account='a b'"),
    "env without a value": ([*TPU, "--env=A", *TRAIN], "--env='A'"),
    "env name": ([*TPU, "--env=1A=b", *TRAIN], "--env='1A=b'"),
    "env of ours": ([*TPU, "--env=MEGASCALE_PORT=1", *TRAIN], "the launcher sets MEGASCALE_PORT itself"),
    "env twice": ([*TPU, "--env=A=1", "--env=A=2", *TRAIN], "A is given twice"),
    "secret": ([*TPU, "--secret_env=A=b", *TRAIN], "NAME=SECRET:KEY"),
    "selector": ([*TPU, "--node_selector=pool", *TRAIN], "--node_selector='pool'"),
    "selector's label": ([*TPU, "--node_selector=a b=c", *TRAIN], "--node_selector='a b=c'"),
    "toleration": ([*TPU, "--toleration=a:Never", *TRAIN], "NoSchedule, PreferNoSchedule, NoExecute"),
    "volume": ([IMAGE, "--tpu=v5e:4x4", "--volume=work", *TRAIN], "--volume='work'"),
    "volume's claim": ([IMAGE, "--tpu=v5e:4x4", "--volume=Work:/work", *TRAIN], "'Work' is no name"),
    "volume twice": ([*TPU, "--volume=other:/work", *TRAIN], "/work is mounted twice"),
    "bucket": ([*TPU, "--volume=gs://A B:/data", *TRAIN], "'A B' is no name of a bucket"),
    "shm": ([*TPU, "--shm=16 GB", *TRAIN], "--shm='16 GB'"),
    "memory": ([*TPU, "--memory=lots", *TRAIN], "--memory='lots'"),
    "workdir on no volume": ([*TPU, *TRAIN[:-1], "--workdir=runs/cows"], "mounted are: /work"),
    "workdir beside the volume": ([*TPU, *TRAIN[:-1], "--workdir=/work/../tmp"], "mounted are: /work"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_anything_is_applied(mistake, tmp_path):
    arguments, message = MISTAKES[mistake]
    (tmp_path / "kubectl").write_text("#!/bin/sh\ntouch was_called\n")
    (tmp_path / "kubectl").chmod(0o755)

    done = submit(*arguments, env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})

    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "was_called").exists()


def test_without_kubectl_the_message_says_what_to_do(tmp_path):
    done = submit(*CASES["tpu"], env=os.environ | {"PATH": str(tmp_path)})

    assert done.returncode == 2
    assert "needs kubectl" in done.stderr and "--dry_run" in done.stderr


@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl")
def test_without_a_cluster_kubectl_is_quoted(tmp_path):
    configuration = tmp_path / "config"
    configuration.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}],  # nobody listens
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                "users": [{"name": "u", "user": {}}],
            }
        )
    )

    done = submit("--context=c", *CASES["tpu"], env=os.environ | {"KUBECONFIG": str(configuration)})
    assert done.returncode == 2
    assert "kubectl get jobset" in done.stderr and "127.0.0.1:9" in done.stderr
