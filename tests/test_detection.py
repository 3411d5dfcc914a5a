"""Which job a process takes itself to be of: its flags, our variables, a cluster, or none."""

from __future__ import annotations

import sys
import types

import pytest

from pgdist.detection import find_membership
from pgdist.errors import ConfigError

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
OURS = {"PGDIST_COORDINATOR": "n0:1234", "PGDIST_NUM_PROCESSES": "4", "PGDIST_PROCESS_ID": "1"}


@pytest.fixture
def environment(monkeypatch):
    """Sets variables; none that tell of a job are there before."""
    for name in (*SLURM, *OPEN_MPI, *OURS, "PGDIST_ATTEMPT", "CUDA_VISIBLE_DEVICES", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)

    def set_all(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


def test_without_flags_variables_and_cluster_a_process_is_alone(environment):
    place = find_membership()
    assert (place.num_processes, place.process_id, place.coordinator) == (1, 0, "")


def test_flags_tell_of_a_job(environment):
    place = find_membership(coordinator="[::1]:80", num_processes=4, process_id=3, local_device_ids="0,2")
    assert (place.coordinator, place.num_processes, place.process_id) == ("[::1]:80", 4, 3)
    assert (place.local_device_ids, place.why) == ((0, 2), "flags")


def test_variables_tell_of_a_job_and_flags_come_before_them(environment):
    environment({**OURS, "PGDIST_LOCAL_DEVICE_IDS": "5"})
    place = find_membership()
    assert (place.coordinator, place.num_processes, place.process_id) == ("n0:1234", 4, 1)
    assert (place.local_device_ids, place.why) == ((5,), "PGDIST_ variables")
    place = find_membership(process_id=0, local_device_ids="0,1")
    assert (place.coordinator, place.process_id, place.local_device_ids) == ("n0:1234", 0, (0, 1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "a:1"}, "--num_processes and --process_id missing"),
        ({"num_processes": 2}, "--coordinator and --process_id missing"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "expected HOST:PORT, such as .*'a'"),
        ({"coordinator": "a:0", "num_processes": 2, "process_id": 0}, "expected HOST:PORT"),
        ({"coordinator": "a:99999", "num_processes": 2, "process_id": 0}, "expected HOST:PORT"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "--process_id: expected 0 to 1 .* 2"),
        ({"local_device_ids": "0-3"}, "--local_device_ids: expected numbers such as 0,1, found '0-3'"),
    ],
)
def test_flags_that_cannot_be_true_are_named(environment, given, message):
    with pytest.raises(ConfigError, match=message):
        find_membership(**given)


def test_a_variable_that_is_no_number_is_named(environment):
    environment({**OURS, "PGDIST_PROCESS_ID": "one"})
    with pytest.raises(ConfigError, match="PGDIST_PROCESS_ID: expected a whole number, found 'one'"):
        find_membership()


def test_a_slurm_step_is_detected_and_one_process_a_host_has_all_its_devices(environment):
    environment(SLURM)
    place = find_membership()
    assert (place.num_processes, place.process_id, place.why) == (3, 2, "a Slurm step")
    assert place.coordinator.startswith("gpu07:")
    assert place.local_device_ids is None  # JAX would take device 0 alone


@pytest.mark.parametrize(
    ("visible", "share"),
    [(None, (1,)), ("0,1", (1,)), ("4,5,6,7", (2, 3)), ("3", None), ("0,1,2", (1,))],
)
def test_processes_of_one_host_share_its_devices(environment, visible, share):
    environment({**OPEN_MPI, **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})})
    place = find_membership()
    assert (place.num_processes, place.process_id, place.why) == (4, 3, "Open MPI")
    assert place.coordinator.startswith("10.96.0.1:")
    assert place.local_device_ids == share
    assert find_membership(local_device_ids="7").local_device_ids == (7,)


@pytest.mark.parametrize(
    "variables",
    [
        {**SLURM, "SLURM_STEP_ID": str(0xFFFFFFFA)},  # a shell in an allocation of three tasks
        {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {**SLURM, "PGDIST_ATTEMPT": "000"},  # its agent knows of one process alone
        {**SLURM, "PGDIST_NUM_PROCESSES": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # as every pod sees it
    ],
)
def test_what_looks_like_a_cluster_and_is_no_job_of_several_is_not_joined(environment, variables, recwarn):
    environment(variables)
    assert find_membership().num_processes == 1
    assert not recwarn.list


def test_a_cluster_that_is_there_and_tells_too_little_is_an_error_with_the_way_out(environment):
    environment({**SLURM, "SLURM_NTASKS": "many"})
    with pytest.raises(
        ConfigError, match="started by a Slurm step, but .*many.*--num_processes=1 if it is alone"
    ):
        find_membership()


def test_a_jax_that_does_not_tell_of_clusters_leaves_flags_and_variables(environment, monkeypatch):
    environment(SLURM)
    monkeypatch.setitem(sys.modules, "jax._src.clusters", types.ModuleType("clusters"))
    assert find_membership().num_processes == 1
    environment(OURS)
    assert find_membership().num_processes == 4
