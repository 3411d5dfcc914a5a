"""The loader's threads and worker processes: they live as long as what started them, and no longer."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest

from pgdist.data.loader import evaluation_batches, train_batches
from pgdist.data.order import ExampleOrder
from tests.data.conftest import TOKENIZER

LENGTH = 24
SIZE = 8


def prefetch_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if "MainThread" not in thread.name}


def wait_until(condition, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def stop_by_close(batches) -> None:
    next(batches)
    batches.close()


def stop_by_close_before_the_first(batches) -> None:
    batches.close()


def stop_by_exhaustion(batches) -> None:
    assert len(list(batches)) == 6


def stop_by_forgetting(batches) -> None:
    next(batches)


def stop_by_exception(batches) -> None:
    with contextlib.suppress(RuntimeError), batches:
        next(batches)
        raise RuntimeError


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "stop",
    [
        stop_by_close,
        stop_by_close_before_the_first,
        stop_by_exhaustion,
        stop_by_forgetting,
        stop_by_exception,
    ],
)
@pytest.mark.parametrize("what", ["training", "prompts"])
def test_a_stopped_iterator_leaves_no_thread_and_no_process(make_source, tokenizer, stop, workers, what):
    def start():
        shared = {"tokenizer": tokenizer, "image_size": SIZE, "text_length": LENGTH, "workers": workers}
        if what == "prompts":
            source = make_source(12)
            return evaluation_batches(source=source, batch_size=2, rows=[0, 1], prompt_only=True, **shared)
        source = make_source(10)
        shared |= {"seed": 3, "start_step": 0, "num_steps": 6}
        return train_batches(source=source, batch_size=8, rows=range(8), **shared)

    threads, children = prefetch_threads(), set(psutil.Process().children())
    stop(start())

    def left() -> list:
        processes = [one for one in psutil.Process().children() if one not in children]
        processes = [one for one in processes if "resource_tracker" not in " ".join(one.cmdline())]
        return processes + list(prefetch_threads() - threads)

    assert wait_until(lambda: not left()), left()


def test_closing_twice_is_fine_and_a_closed_iterator_does_not_go_on(make_source, tokenizer):
    batches = evaluation_batches(
        source=make_source(20),
        tokenizer=tokenizer,
        image_size=SIZE,
        text_length=LENGTH,
        batch_size=2,
        rows=[0],
    )
    next(batches)
    batches.close()
    batches.close()
    assert list(batches) == []


def test_an_exhausted_iterator_stays_exhausted(make_source, tokenizer):
    batches = evaluation_batches(
        source=make_source(3),
        tokenizer=tokenizer,
        image_size=SIZE,
        text_length=LENGTH,
        batch_size=2,
        rows=[0],
    )
    assert len(list(batches)) == 2
    assert list(batches) == []


PROGRAM = textwrap.dedent("""
    import os, sys, time
    from pgdist.data.jsonl import JsonlSource
    from pgdist.data.loader import train_batches
    from pgdist.data.tokenizer import Tokenizer

    def main(data, tokenizer, workers, then):
        batches = train_batches(
            source=JsonlSource(data), tokenizer=Tokenizer(tokenizer), image_size=8, text_length=24, seed=3,
            batch_size=8, rows=range(8), start_step=0, num_steps=10**6, workers=int(workers),
        )
        index = [next(batches).arrays["index"].tolist() for _ in range(3)]
        print(index, flush=True)
        if then == "wait":
            sys.stdin.readline()
            print([next(batches).arrays["index"].tolist() for _ in range(60)][-1], flush=True)
            time.sleep(60)
        if then == "raise":
            raise RuntimeError("on purpose")

    if __name__ == "__main__":
        main(*sys.argv[1:])
""")


@pytest.fixture
def program(tmp_path, make_source):
    """Starts a program, in a process group of its own, that loads ten examples with absl flags unparsed."""
    (tmp_path / "program.py").write_text(PROGRAM)
    path = make_source(10).path
    started = []

    def start(workers: int, then: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, tmp_path / "program.py", path, str(TOKENIZER), str(workers), then],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


EXPECTED = [ExampleOrder(10, 3).ids(step, 8).tolist() for step in range(63)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_program_that_never_parsed_flags_and_never_closes_ends_silently(program, workers):
    process = program(workers, "end")
    out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == (f"{EXPECTED[:3]}\n", "", 0)


def test_a_program_that_fails_shows_its_own_error_and_ends(program):
    process = program(2, "raise")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.rstrip().endswith("RuntimeError: on purpose") and err.count("Traceback") == 1


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_workers_go_on_when_a_signal_reaches_the_whole_group(program, name):
    """A scheduler signals every process of a job; the trainer decides when its workers end."""
    process = program(2, "wait")
    assert process.stdout.readline() == f"{EXPECTED[:3]}\n"
    workers = workers_of(process)
    assert len(workers) == 2
    for worker in workers:
        worker.send_signal(getattr(signal, name))
    time.sleep(0.5)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == f"{EXPECTED[62]}\n"
    assert all(worker.is_running() for worker in workers)


def test_workers_leave_when_the_program_is_killed(program):
    process = program(2, "wait")
    assert process.stdout.readline() == f"{EXPECTED[:3]}\n"
    workers = workers_of(process)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert len(workers) == 2 and not alive


def test_a_killed_worker_is_an_error_and_not_a_hang(make_source, tokenizer):
    batches = train_batches(
        source=make_source(10),
        tokenizer=tokenizer,
        image_size=SIZE,
        text_length=LENGTH,
        seed=3,
        batch_size=8,
        rows=range(8),
        start_step=0,
        num_steps=10**6,
        workers=1,
    )
    with batches:
        next(batches)
        [worker] = [
            one for one in psutil.Process().children() if "resource_tracker" not in " ".join(one.cmdline())
        ]
        worker.kill()
        with pytest.raises(RuntimeError, match="Worker process was terminated unexpectedly"):
            for _ in range(1000):
                next(batches)
