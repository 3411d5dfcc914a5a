"""What `submit --to=ssh` reads, renders and decides; a real sshd is met in tests/ssh.

Scripts are run by a real bash. Where a test needs an `ssh`, it is a script that runs here what it is to run
there.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.attempts import Attempts
from launch.submission import Submission
from launch.targets import ssh_probe, ssh_ship
from launch.targets.host_file import Host
from launch.targets.ssh_connection import CODES, Ssh, quote_path, render
from launch.targets.ssh_launcher import Launcher
from launch.targets.ssh_preflight import Place, check_hosts, probe_script
from pgdist.errors import ConfigError
from tests.launch.goldens import check_golden

ROOT = Path(__file__).parents[2]
NASTY = "a b;$(touch x)'\"`touch x`&*"


def test_ssh_connects_as_told_and_the_users_options_win():
    ssh = Ssh(options=("ConnectTimeout=3", "ProxyJump=gate"), config="my config", identity="key")
    command = ssh.command(Host(name="gpu1", user="alice", port=2222), "bash", "-s")

    assert command[:6] == ["ssh", "-T", "-F", "my config", "-i", "key"]
    assert command.index("ConnectTimeout=3") < command.index("ConnectTimeout=10")  # the first one counts
    assert "BatchMode=yes" in command
    assert command[-8:] == ["-p", "2222", "-l", "alice", "--", "gpu1", "bash", "-s"]


def test_the_first_machine_is_reached_by_the_name_that_ssh_knows(tmp_path):
    (tmp_path / "config").write_text("Host gpu1\n  HostName 10.0.0.5\n")
    ssh = Ssh(config=str(tmp_path / "config"))

    if shutil.which("ssh") or os.environ.get("CI"):
        assert ssh.address(Host(name="gpu1")) == "10.0.0.5"
    assert ssh.address(Host(name="gpu1", address="gpu1.internal")) == "gpu1.internal"


def dry_run(tmp_path: Path, hosts: str, *flags: str, workdir: str = "/shared/runs/cows") -> str:
    (tmp_path / "hosts.txt").write_text(hosts)
    job = ["launch.train", "--config=configs/notebook.py", f"--workdir={workdir}"]
    command = ["-m", "launch.submit", "--to=ssh", "--dry_run", f"--host_file={tmp_path}/hosts.txt"]
    command += ["-F", "/dev/null", "--remote_dir=/shared/pgdist", *flags, "--", *job]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


DRY_RUNS = {
    "one_host": ("gpu1 slots=8\n", ["--gpus=all", "--setup=source .venv/bin/activate"]),
    "three_hosts": (
        "10.0.0.1 slots=2\nalice@10.0.0.2:2222 slots=4\n10.0.0.3 dir=~/code\n",
        ["--ssh_option=ProxyJump=gate", "--devices_per_process=2", "--remote_python=~/env/bin/python"],
    ),
    "nasty_names": (
        "10.0.0.1\n10.0.0.2\n",
        [f"--remote_dir=/shared/{NASTY}", f"--remote_python=/opt/{NASTY}/python", "--port=4000"],
    ),
}


@pytest.mark.parametrize("case", DRY_RUNS)
def test_a_dry_run_shows_all_that_would_run(case, tmp_path):
    hosts, flags = DRY_RUNS[case]
    workdir = f"/shared/{NASTY}" if case == "nasty_names" else "/shared/runs/cows"
    text = dry_run(tmp_path, hosts, *flags, workdir=workdir)

    check_golden(f"ssh_{case}.txt", text)
    for script in text.split("# SCRIPT\n"):
        check_with_shellcheck(script)


def check_with_shellcheck(script: str) -> None:
    if not shutil.which("shellcheck") and not os.environ.get("CI"):
        return
    checked = subprocess.run(
        ["shellcheck", "--shell=bash", "--exclude=SC2016", "-"],
        input=script,
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert checked.returncode == 0, checked.stdout


def test_the_scripts_of_preflight_and_shipping_pass_shellcheck():
    place = Place(directory=f"~/{NASTY}", python="python3", setup=f"source {shlex.quote(NASTY)}")
    check_with_shellcheck(probe_script(place, port=29400))
    check_with_shellcheck(render("ssh_ship", directory=quote_path(f"~/{NASTY}")))


def agent_script(place: Place, arguments: list[str], *, silence: float = 30) -> str:
    words = place.words()
    command = " ".join([words["python"], *map(shlex.quote, arguments)])
    return render("ssh_agent", **words, host="h", command=command, silence=silence, sign_of_life="here")


def fake_python(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


def test_names_full_of_shell_are_just_names_on_the_other_machine(tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / NASTY).mkdir(parents=True)
    fake_python(home / NASTY / "env" / "python", 'pwd; printf \'%s\\n\' "$MARK" "$@"')
    place = Place(directory=f"~/{NASTY}", python="env/python", setup="export MARK='set up'; cat")
    script = agent_script(place, [f"--workdir={NASTY}", "--", "launch.train", "two\nlines"])

    done = subprocess.run(
        ["bash", "-s"],
        input=script,
        env=os.environ | {"HOME": str(home)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
    )

    assert done.stdout == f"{home}/{NASTY}\nset up\n--workdir={NASTY}\n--\nlaunch.train\ntwo\nlines\n"
    assert done.returncode == 0
    assert not list(tmp_path.rglob("x"))


@pytest.mark.parametrize(
    ("place", "code"),
    [
        (Place(directory="/no/such", python="python3", setup=""), CODES["directory"]),
        (Place(directory="/", python="python3", setup="no-such-command"), CODES["setup"]),
        (Place(directory="/", python="python3", setup="if broken"), CODES["setup"]),
        (Place(directory="/", python="no/python", setup=""), CODES["python"]),
    ],
)
def test_a_script_that_cannot_begin_says_why_by_its_code(place, code):
    done = subprocess.run(["bash", "-s"], input=agent_script(place, []), text=True, capture_output=True)
    assert done.returncode == code


def test_half_a_script_does_nothing(tmp_path):
    python = fake_python(tmp_path / "python", f"touch {tmp_path}/started")
    script = agent_script(Place(directory="/", python=str(python), setup=""), [])

    subprocess.run(["bash", "-s"], input=script[: script.rindex("main")], text=True, capture_output=True)

    assert not (tmp_path / "started").exists()


def test_an_agent_hears_the_launcher_until_it_falls_silent(tmp_path):
    python = fake_python(tmp_path / "python", "cat; echo end of input")
    script = agent_script(Place(directory="/", python=str(python), setup=""), [], silence=1)
    with subprocess.Popen(["bash", "-s"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as bash:
        bash.stdin.write(script + "here\nstop\nhere\n")
        bash.stdin.flush()

        assert bash.stdout.readline() == "stop\n"  # signs of life are not for the agent
        assert bash.stdout.readline() == "end of input\n"  # though the connection is open
        assert bash.wait(timeout=10) == 0


def test_a_fingerprint_is_of_the_code_and_nothing_else(tmp_path):
    def probe(folder: Path) -> dict:
        done = subprocess.run(
            ["bash", "-s"],
            input=probe_script(Place(directory=str(folder), python=sys.executable, setup=""), port=0),
            text=True,
            capture_output=True,
            timeout=60,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        )
        line = next(line for line in done.stdout.splitlines() if line.startswith(ssh_probe.MARK))
        return json.loads(line.removeprefix(ssh_probe.MARK))

    for package in ("launch", "pgdist"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    here, copy = probe(ROOT), probe(tmp_path)
    assert here["code"] == copy["code"] == ssh_probe.describe()["code"] != None  # noqa: E711
    assert here["jax"] and here["python"] == list(sys.version_info[:3])

    with (tmp_path / "pgdist" / "errors.py").open("a") as file:
        file.write("# changed\n")
    assert probe(tmp_path)["code"] != here["code"]


@pytest.fixture
def stub_ssh(tmp_path, monkeypatch):
    """An `ssh` that runs here what it is to run on another machine; one named `down` cannot be reached."""
    text = """
    while [ "$1" != -- ]; do shift; done
    if [ "$2" = down ]; then echo "ssh: connect to host down: Connection refused" >&2; exit 255; fi
    shift 2
    exec "$@"
    """
    fake_python(tmp_path / "bin" / "ssh", text)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return Ssh()


def launcher(ssh: Ssh, scripts: list[str], lines: list[str], *, names: str = "a b", **fields) -> Launcher:
    defaults = {"workdir": "", "max_restarts": 2, "backoff": 0.01, "grace": 5, "silence": "", "detach": False}
    submission = Submission(name="job", module="launch.env", arguments=(), **(defaults | fields))
    hosts = [Host(name=name) for name in names.split()]
    return Launcher(
        submission=submission, job_id="1", ssh=ssh, hosts=hosts, scripts=scripts, facts={}, show=lines.append
    )


def counting(path: Path, codes: str) -> str:
    """A script that ends with the next of the codes, each time it runs."""
    return f"echo >>{path}; codes=({codes}); exit ${{codes[$(wc -l <{path}) - 1]}}\n"


def test_a_job_is_started_again_until_it_has_finished(stub_ssh, tmp_path):
    lines = []
    scripts = [counting(tmp_path / "a", "42 42 137 42 43 0"), "exit 0\n"]
    scripts[1] = counting(tmp_path / "b", "42 42 137 42 43 0")

    assert launcher(stub_ssh, scripts, lines).run() == 0
    assert (tmp_path / "a").read_text().count("\n") == 6
    assert "pgdist: the job has ended with code 0: finished" in lines


def test_a_job_that_fails_again_and_again_is_given_up(stub_ssh, tmp_path):
    lines = []

    assert launcher(stub_ssh, [counting(tmp_path / "a", "137 137 137 137")], lines, names="a").run() == 137
    assert (tmp_path / "a").read_text().count("\n") == 3
    assert "given up after 2 restarts" in lines[-1]


@pytest.mark.parametrize("code", [1, 2, 3, 4])
def test_what_will_fail_again_is_not_started_again(code, stub_ssh, tmp_path):
    scripts = [counting(tmp_path / "a", str(code)), f"exit {code}\n"]

    assert launcher(stub_ssh, scripts, []).run() == code


def test_a_machine_that_is_lost_costs_restarts_and_is_named(stub_ssh):
    lines = []

    assert launcher(stub_ssh, ["exit 43\n", ""], lines, names="a down", max_restarts=1).run() == 43
    assert lines.count("pgdist: down: the connection or its agent was lost") == 2
    assert "down: ssh: ssh: connect to host down: Connection refused" in lines


def test_agents_that_do_not_end_with_the_others_are_ended(stub_ssh, monkeypatch):
    monkeypatch.setattr("launch.targets.ssh_launcher._SECONDS_TOGETHER", 0.5)
    monkeypatch.setattr("launch.targets.ssh_launcher._SECONDS_TO_DIE", 0.5)
    scripts = ["exit 2\n", "while read -r line; do [ $line = kill ] && exit 137; done\n"]
    assert launcher(stub_ssh, scripts, []).run() == 2

    assert launcher(stub_ssh, ["exit 2\n", "exec sleep 60\n"], []).run() == 2  # deaf


def test_preflight_tells_the_mistakes_of_all_machines_at_once(stub_ssh, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    good = Place(directory=str(ROOT), python=sys.executable, setup="")
    hosts = [Host(name=name) for name in ("a", "b", "c", "d", "e", "down", "g")]
    (tmp_path / "empty").mkdir()
    bare = fake_python(tmp_path / "bare", f'exec {sys.executable} -S "$@"')
    old = fake_python(tmp_path / "old", f"echo 'hello from the login script'; exec {sys.executable} \"$@\"")
    places = [
        good,
        Place(directory=f"{tmp_path}/none", python=sys.executable, setup=""),
        Place(directory=f"{tmp_path}/empty", python=f"{tmp_path}/python3", setup=""),
        Place(directory=str(ROOT), python=str(old), setup=""),
        Place(directory=str(ROOT), python=sys.executable, setup="echo oops; exit 1"),
        good,
        Place(directory=f"{tmp_path}/empty", python=str(bare), setup=""),
    ]

    with pytest.raises(ConfigError) as raised:
        check_hosts(stub_ssh, hosts, places, port=0)

    mistakes = str(raised.value).splitlines()
    assert [mistake.partition(":")[0] for mistake in mistakes] == ["b", "c", "e", "down", "g"]
    assert f"no folder {tmp_path}/none there" in mistakes[0]
    assert f"no {tmp_path}/python3 there; say where it is with --remote_python=PATH" in mistakes[1]
    assert "oops" in mistakes[2]
    assert "cannot connect: ssh: connect to host down: Connection refused. It must work" in mistakes[3]
    assert "try: ssh down true" in mistakes[3]
    assert f"no pgdist in {tmp_path}/empty; --remote_dir names the folder" in mistakes[4]


def test_other_code_than_here_is_refused(stub_ssh, tmp_path):
    for package in ("launch", "pgdist"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "launch" / "env.py").write_text("# another\n")
    places = [Place(directory=str(folder), python=sys.executable, setup="") for folder in (ROOT, tmp_path)]

    with pytest.raises(ConfigError, match=r"^b: the pgdist in .* is not the one that you are starting"):
        check_hosts(stub_ssh, [Host(name="a"), Host(name="b")], places, port=0)


def test_a_port_that_is_taken_is_told_before_the_job_starts(stub_ssh):
    place = Place(directory=str(ROOT), python=sys.executable, setup="")
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^a: port {port} is taken there"):
            check_hosts(stub_ssh, [Host(name="a"), Host(name="b")], [place, place], port=port)


def test_without_ssh_the_user_is_told_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    place = Place(directory=str(ROOT), python=sys.executable, setup="")
    with pytest.raises(ConfigError, match=r"no `ssh` on this machine: install OpenSSH's client"):
        check_hosts(Ssh(), [Host(name="a")], [place], port=0)


def test_what_git_lists_is_what_is_sent(stub_ssh, tmp_path):
    checkout = tmp_path / "checkout"
    (checkout / "pgdist").mkdir(parents=True)
    files = {
        "pgdist/a.py": "old",
        "pgdist/gone.py": "",
        ".gitignore": "/data/\n",
        "data/big": "no",
        "ü b.py": "",
    }
    (checkout / "data").mkdir()
    for name, text in files.items():
        (checkout / name).write_text(text)
    git = ["git", "-C", str(checkout)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "pgdist"], check=True)
    (checkout / "pgdist" / "a.py").write_text("new")
    (checkout / "pgdist" / "gone.py").unlink()

    directories = [f"{tmp_path}/there/{NASTY}/{number}" for number in range(2)]
    ssh_ship.ship(stub_ssh, [Host(name="a"), Host(name="b")], directories, ssh_ship.pack(checkout))

    for directory in directories:
        sent = sorted(
            str(path.relative_to(directory)) for path in Path(directory).rglob("*") if path.is_file()
        )
        assert sent == [".gitignore", "pgdist/a.py", "ü b.py"]
        assert (Path(directory) / "pgdist" / "a.py").read_text() == "new"
    assert not list(tmp_path.rglob("x"))


def test_a_folder_that_git_does_not_know_cannot_be_sent(tmp_path):
    with pytest.raises(ConfigError, match=r"--ship sends what git lists of .*--remote_dir"):
        ssh_ship.pack(tmp_path)


def test_a_machine_without_room_for_the_code_is_named(stub_ssh, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^a: no folder .*file/x"):
        ssh_ship.ship(stub_ssh, [Host(name="a")], [f"{tmp_path}/file/x"], b"")


def test_an_attempt_that_did_not_begin_is_not_judged_by_the_one_before(stub_ssh, tmp_path):
    workdir = tmp_path / "work"
    attempt = Attempts(str(workdir)).claim(job_id="1")
    attempt.write_verdict({"code": 42, "reason": "preempted, state saved"})
    attempt.release()
    lines = []

    scripts = [counting(tmp_path / "a", "42 2")]
    assert launcher(stub_ssh, scripts, lines, names="a", workdir=str(workdir)).run() == 2
    assert "pgdist: preempted, state saved; starting again in 0.01 s" in lines

    scripts = [counting(tmp_path / "b", "42 43 43 43 43")]
    assert launcher(stub_ssh, scripts, [], names="a", workdir=str(workdir)).run() == 43
    assert (tmp_path / "b").read_text().count("\n") == 4
