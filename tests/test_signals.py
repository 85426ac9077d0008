"""A scheduler's termination of a whole job is the launcher's affair; the parent's ends a worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.run.supervise import supervise

WORKER = """
import sys, threading, time
from launcher.worker.signals import heed_parent_alone
heed_parent_alone()
print(threading.active_count(), flush=True)
time.sleep(60)
"""
SCHEDULED = """
import os, pathlib, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
stranger = "import os, signal, sys; [os.kill(int(pid), signal.SIGTERM) for pid in sys.argv[1:]]"
subprocess.run([sys.executable, "-c", stranger, str(os.getpid()), str(child.pid)])  # to everyone, as Slurm does
time.sleep(0.5)
print("alive", child.poll(), flush=True)
"""


@pytest.fixture
def worker() -> subprocess.Popen[str]:
    """A worker that was started as under Slurm, and whose parent is this process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[1],
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert process.stdout is not None and process.stdout.readline() == "2\n"
    return process


def test_a_worker_obeys_its_parent_alone(worker: subprocess.Popen[str]) -> None:
    try:
        stranger = f"import os; os.kill({worker.pid}, {int(signal.SIGTERM)})"
        subprocess.run([sys.executable, "-c", stranger], check=True)
        time.sleep(0.5)
        assert worker.poll() is None
        os.kill(worker.pid, signal.SIGTERM)
        assert worker.wait(10) == -signal.SIGTERM
    finally:
        worker.kill()
        worker.communicate()


@pytest.mark.parametrize(("shields", "survives"), [(True, True), (False, False)])
def test_what_is_shielded_outlives_a_termination(shields: bool, survives: bool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = (sys.executable, "-c", SCHEDULED)
    ending = supervise(
        command, dict(os.environ), log, tmp_path / "pid", lambda line: None, 30, shields=shields
    )
    assert ("alive None" in log.read_text()) is survives
    assert ending.exit_code == (0 if survives else -signal.SIGTERM)
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
