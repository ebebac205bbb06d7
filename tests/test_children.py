"""Processes end with the one that they work for, and a command that is ended ends in order."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from verify import cli
from verify.children import cores
from verify.commands import doctor

pytestmark = [pytest.mark.correctness, pytest.mark.usefixtures("interruptible")]

ROOT = Path(__file__).parent.parent
SCRIPT = """
import multiprocessing, signal, time
from verify.children import pool
from verify.cli import terminable

if __name__ == "__main__":
    with terminable():
        try:
            with pool(2) as executor:
                interrupt = executor.submit(signal.getsignal, signal.SIGINT).result()
                for _ in range(4):
                    executor.submit(time.sleep, 600)
                pids = [process.pid for process in multiprocessing.active_children()]
                print(interrupt.name, *pids, flush=True)
                time.sleep(600)
        finally:
            print("in order", flush=True)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody waited for does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def gone(pids: list[int]) -> bool:
    """Whether processes end within ten seconds."""
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids))


@pytest.mark.parametrize(
    ("name", "in_order"), [("SIGTERM", True), ("SIGINT", True), ("SIGKILL", False)]
)
def test_processes_of_a_pool_end_with_the_one_that_they_work_for(tmp_path, name, in_order):
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    pids: list[int] = []
    try:
        interrupt, *words = process.stdout.readline().split()
        assert interrupt == "SIG_IGN", "an interrupt is the business of the one that they work for"
        pids = [int(word) for word in words]
        assert len(pids) == 2
        assert all(map(alive, pids))
        process.send_signal(getattr(signal, name))
        assert gone([process.pid, *pids])
        rest, _ = process.communicate(timeout=10)
        assert rest == ("in order\n" if in_order else "")
        assert process.returncode != 0
    finally:
        for pid in (process.pid, *pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_ended_ends_in_order(monkeypatch, capsys, number, status):
    """Told to end once more, it is not torn from what it does in the end."""
    ended = []

    def run(arguments):
        try:
            signal.raise_signal(number)
        finally:
            if number == signal.SIGTERM:
                signal.raise_signal(number)
            ended.append("in order")

    monkeypatch.setattr(doctor, "main", run)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["doctor"]) == status
    assert ended == ["in order"]
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_command_runs_in_a_thread_too(monkeypatch):
    monkeypatch.setattr(doctor, "main", lambda arguments: 7)
    found = []
    thread = threading.Thread(target=lambda: found.append(cli.main(["doctor"])))
    thread.start()
    thread.join(60)
    assert found == [7]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_cores_are_those_that_this_process_may_use():
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(every)})
    try:
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, every)
    assert cores() == len(every)
