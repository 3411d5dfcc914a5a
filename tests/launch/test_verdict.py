from __future__ import annotations

import json
import subprocess
import sys

import pytest

from launch.attempts import Attempts
from launch.verdict import decide, verdict
from tests.tiny_runs import ROOT


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], 0),
        ([42, 42], 42),
        ([0, 42], 42),  # one was through when the others were asked
        ([2, 2, 2, 2], 2),
        ([134, 134, 2, 134], 2),  # a user's mistake in one, and JAX aborts its peers
        ([43, 137], 43),
        ([137], 137),
        ([143, 137], 143),
        ([134, 134], 43),
        ([42, 137], 43),  # one was lost while it saved: there may be no state
        ([42, 43], 43),
        ([1, 43, 42], 1),
        ([1, 4], 4),
        ([1, 3], 3),
        ([3, 2], 2),
        ([0, 134], 43),
        ([17, 43], 17),  # no code of ours: as permanent as a bug
    ],
)
def test_a_jobs_code_is_the_most_permanent_of_its_processes(codes, expected):
    assert verdict(codes) == expected


def test_failures_use_up_the_budget_and_preemptions_do_not(tmp_path):
    asked = {"workdir": str(tmp_path), "job_id": "7", "max_restarts": 2}

    decisions = [decide(code=code, **asked) for code in (43, 42, 42, 137, 42, 43)]

    assert [decision.restart for decision in decisions] == [True, True, True, True, True, False]
    assert [decision.failures for decision in decisions] == [1, 1, 1, 2, 2, 3]
    assert "given up after 2 restarts" in decisions[-1].reason


def test_another_job_has_a_budget_of_its_own(tmp_path):
    assert not decide(workdir=str(tmp_path), job_id="7", code=43, max_restarts=0).restart
    assert decide(workdir=str(tmp_path), job_id="8", code=43, max_restarts=1).restart


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4])
def test_what_a_restart_does_not_mend_is_not_restarted(code, tmp_path):
    decision = decide(workdir=str(tmp_path), job_id="7", code=code, max_restarts=5)

    assert not decision.restart and decision.code == code


def test_the_verdict_in_the_workdir_outweighs_what_the_scheduler_saw(tmp_path):
    attempt = Attempts(str(tmp_path)).claim(job_id="7")
    attempt.write_verdict({"code": 42, "reason": "preempted, state saved"})
    attempt.release()

    assert decide(workdir=str(tmp_path), job_id="7", code=143, max_restarts=0).code == 42
    assert decide(workdir=str(tmp_path), job_id="other", code=143, max_restarts=0).code == 143


def test_a_try_that_ended_before_it_began_is_not_judged_by_the_one_before(tmp_path):
    attempt = Attempts(str(tmp_path)).claim(job_id="7")
    attempt.write_verdict({"code": 42, "reason": "preempted, state saved"})
    attempt.release()
    asked = {"workdir": str(tmp_path), "job_id": "7", "max_restarts": 1}

    assert decide(code=42, **asked).restart
    assert not decide(code=127, **asked).restart  # no python on the node, say
    assert decide(code=137, **asked).restart
    assert not decide(code=137, **asked).restart


def test_a_cancelled_job_is_not_restarted(tmp_path):
    Attempts(str(tmp_path)).cancel(job_id="7")

    assert not decide(workdir=str(tmp_path), job_id="7", code=42, max_restarts=5).restart
    assert decide(workdir=str(tmp_path), job_id="8", code=42, max_restarts=5).restart


@pytest.mark.parametrize(("code", "word"), [(43, "restart"), (2, "end"), (0, "end")])
def test_a_script_gets_one_word_and_the_code(code, word, tmp_path):
    flags = [f"--workdir={tmp_path}/a b;$(touch x)", "--job_id=7", f"--code={code}", "--max_restarts=1"]

    done = subprocess.run(
        [sys.executable, "-m", "launch.verdict", *flags], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert (done.returncode, done.stdout) == (code, word + "\n")
    assert f"pgdist: code {code}" in done.stderr


def test_half_a_file_is_no_file(tmp_path):
    attempts = Attempts(str(tmp_path))
    attempts.folder.mkdir()
    (attempts.folder / "restarts.json").write_text('{"job_id": "7", "fail')

    assert decide(workdir=str(tmp_path), job_id="7", code=43, max_restarts=1).failures == 1
    assert json.loads((attempts.folder / "restarts.json").read_text())["failures"] == 1
