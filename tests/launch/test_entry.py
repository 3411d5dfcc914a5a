"""How a command ends: its exit code, and what it prints, for each way to end."""

import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

COMMAND = '''
"""A command for tests."""
import os, signal, sys, time
from absl import flags, logging
from launch import entry
from pgdist import errors

{flags}

def main(*arguments):
{body}

if __name__ == "__main__":
    entry.run(main, name="test", usage=__doc__{options})
'''


@pytest.fixture
def start(tmp_path):
    """Starts a command whose main() has the given body; returns the process, its output in pipes."""
    processes = []

    def start(body, *arguments, flags="", options="", **popen):
        script = tmp_path / f"command_{len(processes)}.py"
        script.write_text(
            COMMAND.format(body=textwrap.indent(textwrap.dedent(body), "    "), flags=flags, options=options)
        )
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | popen
        process = subprocess.Popen([sys.executable, str(script), *arguments], env=environment, **streams)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def _end(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("pass", 0, ""),
        ("return 0", 0, ""),
        ("sys.exit(7)", 7, ""),
        ("sys.exit('why')", 1, "why"),
        ("raise errors.ConfigError('field x')", 2, "pgdist: error: field x"),
        ("raise errors.DataError('line 3')", 3, "pgdist: error: line 3"),
        ("raise errors.WeightsError('no file')", 3, "pgdist: error: no file"),
        ("raise errors.DivergedError('loss is nan')", 4, "pgdist: error: loss is nan"),
        ("raise errors.Preempted('saved')", 42, "pgdist: saved"),
        ("raise errors.PeerLostError('host 3')", 43, "pgdist: error: host 3"),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", 130, "pgdist: interrupted"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", -15, ""),
    ],
)
def test_every_end_has_its_code_and_no_traceback(start, body, code, message):
    returned, out, err = _end(start(body))
    assert (returned, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


def test_a_bug_shows_its_traceback_and_ends_with_1(start):
    returned, _, err = _end(start("raise ValueError('boom')"))
    assert returned == 1
    assert "Traceback" in err and "ValueError: boom" in err and "python -m launch.env" in err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--wrokdir=x", "pgdist: error: unknown flag --wrokdir; did you mean --workdir?"),
        ("x.png", "pgdist: error: unexpected argument 'x.png'"),
    ],
)
def test_a_wrong_command_line_ends_with_2_in_one_line(start, argument, message):
    returned, out, err = _end(start("pass", argument, flags="flags.DEFINE_string('workdir', None, 'Where.')"))
    assert (returned, out) == (2, "")
    assert err.startswith(message) and err.count("\n") == 1


def test_flags_that_must_be_given_are_named_together(start):
    own = "for name in ('config', 'workdir', 'to'): flags.DEFINE_string(name, None, 'That.')"
    body = "entry.require('config', 'workdir', 'to')"
    returned, _, err = _end(start(body, "--to=here", "--workdir=", flags=own))
    assert (returned, err) == (2, "pgdist: error: --config and --workdir must be given; see --help\n")


def test_arguments_without_a_flag_reach_a_command_that_takes_them(start):
    returned, out, _ = _end(start("print(arguments)", "a.png", "b.png", options=", positional='[IMAGE...]'"))
    assert (returned, out) == (0, "('a.png', 'b.png')\n")


def test_help_goes_to_stdout_and_shows_only_our_flags(start):
    own = "import grain; flags.DEFINE_bool('dry', False, 'Dry.')"
    returned, out, err = _end(start("pass", "--help", flags=own))
    assert (returned, err) == (0, "")
    assert "--[no]dry" in out and "grain" not in out and "logtostderr" not in out


def test_help_of_everything_has_the_libraries_flags(start):
    returned, out, _ = _end(start("pass", "--helpfull", flags="import grain"))
    assert returned == 0
    assert "grain" in out and "logtostderr" in out


def test_libraries_only_warn_and_we_inform(start):
    body = """
        from pgdist import cluster
        logging.info("of a library")
        logging.warning("warned by a library")
        exec(compile("logging.info('ours')", cluster.__file__, "exec"), {"logging": logging})
    """
    _, out, err = _end(start(body))
    assert out == "" and "ours" in err and "warned by a library" in err and "of a library" not in err
    assert "of a library" in _end(start(body, "--verbosity=0"))[2]


def test_a_reader_that_goes_away_ends_a_command_quietly(start):
    body = """
        print("ready", flush=True)
        sys.stdin.read()
        for _ in range(10_000):
            print("x" * 1000)
    """
    process = start(body, stdin=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    process.stdin.close()
    err = process.stderr.read()
    assert (process.wait(timeout=60), err) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_not_a_success(start):
    with open("/dev/full", "w") as full:
        process = start("print('answer')", stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "No space left" in err


def test_simulated_devices_are_what_jax_sees(start):
    body = """
        entry.simulate_devices(3)
        import jax
        print(jax.devices())
    """
    returned, out, _ = _end(start(body))
    assert returned == 0 and out.count("CpuDevice") == 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("entry.simulate_devices(0)", "give a number of at least 1"),
        ("import jax; jax.devices(); entry.simulate_devices(3)", "JAX has already started, on 8 cpu devices"),
    ],
)
def test_devices_that_cannot_be_simulated_are_a_mistake_of_the_command_line(start, body, message):
    returned, _, err = _end(start(body))
    assert returned == 2 and message in err and "Traceback" not in err


def test_the_entry_does_not_wait_for_jax():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, launch.entry; print('jax' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "False\n"


# Two processes that add up over both at every step until one of them does something else at the sixth.
JOB = """
    index, port, failing, how = int(arguments[0]), *arguments[1:]
    entry.simulate_devices(2)
    import jax, numpy as np
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    x = jax.make_array_from_callback((4,), sharding, lambda i: np.ones(4)[i])
    for step in range(10):
        print(float(jax.jit(lambda x: x.sum())(x)), flush=True)
        time.sleep(0.05)
        if step == 5 and index == int(failing):
            print("failing", file=sys.stderr, flush=True)
            exec(how)
"""


@pytest.fixture
def start_job(start):
    def start_job(*, failing, how):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        options = ", positional='ARGUMENTS'"
        return [start(JOB, str(i), port, str(failing), how, options=options) for i in range(2)]

    return start_job


@pytest.mark.multiprocess
def test_a_job_that_finishes_ends_with_0_everywhere(start_job):
    assert [_end(process)[0] for process in start_job(failing=0, how="pass")] == [0, 0]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("how", "code"),
    [("raise errors.DataError('bad')", 3), ("raise ValueError('boom')", 1), ("raise KeyboardInterrupt", 130)],
)
@pytest.mark.parametrize("failing", [0, 1])
def test_a_failing_process_of_a_job_leaves_at_once_with_its_own_code(start_job, failing, how, code):
    process = start_job(failing=failing, how=how)[failing]
    while (line := process.stderr.readline()) and line != "failing\n":
        pass
    start = time.monotonic()
    process.wait(timeout=60)
    assert process.returncode == code
    assert time.monotonic() - start < 5  # JAX's barrier would hold it for minutes


# Two processes that meet the same mistake, one of them later.
MISTAKE = """
    index, port, late = arguments
    entry.simulate_devices(1)
    import jax
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
    time.sleep(index == late)
    raise errors.ConfigError("wrong for all")
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("late", ["0", "1"])
def test_processes_that_fail_alike_all_keep_their_code(start, late):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    job = [start(MISTAKE, index, port, late, options=", positional='ARGUMENTS'") for index in "01"]
    for returned, _, err in [_end(process) for process in job]:
        assert returned == 2, err
        assert "wrong for all" in err


@pytest.mark.multiprocess
@pytest.mark.parametrize("how", ["raise errors.DataError('bad')", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_process_that_loses_its_peer_says_so_and_may_be_restarted(start_job, how):
    process = start_job(failing=0, how=how)[1]
    returned, _, err = _end(process)
    assert returned == 43
    assert "another process of this job has gone" in err


def test_a_command_that_fails_does_not_wait_for_what_it_compiles():
    code = (
        "import threading\n"
        "from launch import entry\nfrom pgdist.errors import ConfigError\nfrom pgdist.train import compilation\n"
        "def main():\n"
        "    threading.Thread(target=threading.Event().wait, name=compilation.THREAD).start()  # for ever\n"
        "    raise ConfigError('no such thing')\n"
        "entry.run(main, name='x', usage='')"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, "pgdist: error: no such thing\n")
