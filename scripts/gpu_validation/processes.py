"""The child processes: one that predicts, one that holds the device, and one that gets ready to."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from launcher.documents import from_json, read_document, to_json, write_document
from launcher.errors import LaunchError
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.run.render import ALLOCATOR_SETTINGS, worker_environment
from scripts.gpu_validation.jobs import ROOT, ValidationJob, settings
from scripts.gpu_validation.orders import Answer, PredictionOrder, RunOrder
from scripts.gpu_validation.results import Machine, Outcome, Status

LAST_WORDS = 800
"""Characters kept of the log of a process that failed."""
PROBE_SECONDS = 120.0
"""How long the probe may take, the first import of all libraries included."""
PREDICT = "scripts.gpu_validation.predict"
PROBE = "scripts.gpu_validation.probe"
DEVICE_RUN = "scripts.gpu_validation.device_run"


def child_environment(
    hardware: HardwareSpec, settings: Mapping[str, str], inherited: Mapping[str, str]
) -> dict[str, str]:
    """The environment that the launcher gives its worker, without a network, and with the settings of a job."""
    environment = {name: value for name, value in inherited.items() if name not in ALLOCATOR_SETTINGS}
    paths = [str(ROOT), *filter(None, [inherited.get("PYTHONPATH", "")])]
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths), **settings}
    return environment | worker_environment(hardware, environment)


def tracer_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """An environment without a device: what the tracer would take of it would be missing in the measurements."""
    environment = child_environment(HardwareSpec(kind=DeviceKind.CPU), {}, inherited)
    return environment | {"OMP_NUM_THREADS": "1"}  # fake tensors compute nothing


class Child:
    """A Python process of our own, with a log, in a process group that ends with it.

    Args:
        module: What it runs.
        arguments: Its command line.
        environment: Its whole environment.
        folder: Where its log goes.
        is_read: Whether its output is read by us, and not logged.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        *,
        is_read: bool = False,
    ) -> None:
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".log", delete=False) as stream:
            self._log = Path(stream.name)
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if is_read else stream,
                stderr=stream,
                env=dict(environment),
                cwd=ROOT,
                text=True,
                process_group=0,  # and not a session: what ends our own session ends the children too
            )

    def last_words(self) -> str:
        """The end of the log."""
        return self._log.read_text(encoding="utf-8", errors="replace")[-LAST_WORDS:].strip()

    def end(self) -> None:
        """Ends the process and its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def tell(self, line: str) -> None:
        """Writes the one line that the process waits for."""
        assert self.process.stdin is not None  # a pipe
        with suppress(OSError):  # where it has ended already, its log says why
            self.process.stdin.write(line + "\n")
            self.process.stdin.close()


class Predictor:
    """Predicts beside the device.

    Args:
        names: Jobs, in the order in which they will be asked for.
        hardware: Of the device.
        environment: Its whole environment.
        folder: For its order and log.
    """

    def __init__(
        self, names: Sequence[str], hardware: HardwareSpec, environment: Mapping[str, str], folder: Path
    ) -> None:
        order = folder / f"predict-{time.monotonic_ns()}.json"
        write_document(order, PredictionOrder(tuple(names), hardware))
        self._child = Child(PREDICT, [str(order)], environment, folder, is_read=True)
        self._lines: queue.Queue[str] = queue.Queue()
        self._answers: dict[str, Answer] = {}
        threading.Thread(target=self._read, daemon=True).start()

    def answer(self, name: str, seconds: float) -> Answer | None:
        """The answer for a job; None when there is none in time."""
        deadline = time.monotonic() + seconds
        while name not in self._answers:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            if not line:
                self._lines.put("")  # for whoever asks next
                return Answer(name, None, f"predicting ended: {self._child.last_words()}")
            answer = from_json(Answer, line)
            self._answers[answer.name] = answer
        return self._answers[name]

    def _read(self) -> None:
        assert self._child.process.stdout is not None  # a pipe
        for line in self._child.process.stdout:
            if line.startswith("{"):
                self._lines.put(line)
        self._lines.put("")

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *failure: object) -> None:
        self._child.end()


class Device:
    """Runs one job after another on the device, each in a process of its own.

    While one runs, the next process imports the libraries; it takes nothing of the device before its order.

    Args:
        hardware: Of the device.
        folder: For outcomes and logs.
    """

    def __init__(self, hardware: HardwareSpec, folder: Path) -> None:
        self._hardware = hardware
        self._folder = folder
        self._waiting: tuple[Mapping[str, str], Child] | None = None

    def get_ready(self, job: ValidationJob) -> None:
        """Starts the process for a job, if none with its settings waits already."""
        wanted = settings(job)
        if self._waiting is not None and self._waiting[0] == wanted:
            return
        self.dismiss()
        environment = child_environment(self._hardware, wanted, os.environ)
        self._waiting = wanted, Child(DEVICE_RUN, [], environment, self._folder)

    def run(
        self, job: ValidationJob, limit_seconds: float, following: ValidationJob | None, snapshot: str = ""
    ) -> Outcome:
        """Runs a job.

        Args:
            job: The job.
            limit_seconds: When it is ended.
            following: The job after it, which gets ready meanwhile; None: there is none.
            snapshot: Where its timeline goes; empty: nowhere.
        """
        self.get_ready(job)
        assert self._waiting is not None  # just made
        child, self._waiting = self._waiting[1], None
        outcome = self._folder / f"outcome-{child.process.pid}.json"
        order = RunOrder(job.name, self._hardware, str(outcome), snapshot)
        began = time.monotonic()
        child.tell(to_json(order, indent=None))
        if following is not None:
            self.get_ready(following)
        try:
            child.process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            return Outcome(
                Status.TIMED_OUT, f"after {limit_seconds:.0f} s: {child.last_words()}", limit_seconds
            )
        finally:
            child.end()
        seconds = time.monotonic() - began
        try:
            return replace(read_document(outcome, Outcome), seconds=seconds)
        except LaunchError:
            words = f"exit code {child.process.returncode}: {child.last_words()}"
            return Outcome(Status.FAILED, words, seconds)

    def dismiss(self) -> None:
        """Ends the process that waits."""
        if self._waiting is not None:
            self._waiting[1].end()
            self._waiting = None

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *failure: object) -> None:
        self.dismiss()


def probe(hardware: HardwareSpec, folder: Path) -> Machine:
    """Reads the machine in a bare process.

    Raises:
        LaunchError: When it can't be read.
    """
    target = folder / "machine.json"
    child = Child(PROBE, [str(target)], child_environment(hardware, {}, os.environ), folder)
    with suppress(subprocess.TimeoutExpired):
        child.process.wait(PROBE_SECONDS)
    child.end()
    if not target.exists():
        raise LaunchError(f"the device can't be read: {child.last_words()}", "does torch see it?")
    return read_document(target, Machine)
