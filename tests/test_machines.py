"""Two machines, for real: two network namespaces with a cable between them, a launcher in each, gloo between the ranks.

Needs Linux, root and `ip`; skips with the reason elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher.cluster import Cluster, LaunchSpec
from launcher.documents import write_document
from launcher.job import Engine, Method
from launcher.run.status import ordered_run, run_status
from launcher.run_paths import RunPaths
from launcher.run_status import RunState
from tests.tiny_job import tiny_order, write_tiny_model

ADDRESSES = ("10.77.31.1", "10.77.31.2")
NAMES = ("launcher-test-0", "launcher-test-1")
TIMEOUT_SECONDS = 180
DRIVER = """
import sys
from pathlib import Path
from launcher.documents import read_document
from launcher.errors import LauncherError
from launcher.run.endings import raise_for_outcome
from launcher.run.launch import launch_worker, prepare_run
from launcher.run_paths import RunPaths
from launcher.run_record import WorkerOrder
paths, order = RunPaths(Path(sys.argv[1])), read_document(Path(sys.argv[2]), WorkerOrder)
def show(line):
    print(line, flush=True)
try:
    prepare_run(paths, order, {})
    raise_for_outcome(launch_worker(paths, order, show), paths, order.plan.world_size)
except LauncherError as failure:
    print(f"error: {failure}", flush=True)
    sys.exit(failure.exit_code)
"""


def why_not() -> str:
    """Why two network namespaces can't be had here; empty when they can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "`ip` is not installed (package iproute2)"
    tried = subprocess.run(
        ["ip", "netns", "add", "launcher-test"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        return f"network namespaces are not allowed here: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", "launcher-test"], check=False)
    return ""


REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces that reach each other."""
    for name in NAMES:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", "lt0", "netns", NAMES[0], "type", "veth", "peer", "name", "lt1", "netns", NAMES[1])
        for index, name in enumerate(NAMES):
            ip("-n", name, "addr", "add", f"{ADDRESSES[index]}/24", "dev", f"lt{index}")
            ip("-n", name, "link", "set", f"lt{index}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield NAMES
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return folder


class Pair:
    """A run on both machines."""

    def __init__(self, folder: Path, tiny: Path, max_steps: int = 4, connect_seconds: int = 60) -> None:
        self.paths = RunPaths(folder / "run")
        launch = LaunchSpec(Cluster.MANUAL, ADDRESSES[0], 29611, connect_seconds)
        order = tiny_order(
            tiny,
            Engine.DDP,
            method=Method.LORA,
            num_devices=1,
            num_nodes=2,
            launch=launch,
            training={"max_steps": max_steps},
        )
        write_document(folder / "order.json", order)
        self.main = self.start(
            0, sys.executable, "-c", DRIVER, str(self.paths.root), str(folder / "order.json")
        )

    def start(self, machine: int, *command: str, **environment: str) -> subprocess.Popen[str]:
        root = str(Path(__file__).resolve().parents[1])
        return subprocess.Popen(
            ["ip", "netns", "exec", NAMES[machine], *command],
            env={**os.environ, "PYTHONPATH": root, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def start_other(self, **environment: str) -> subprocess.Popen[str]:
        """Runs the command that was printed for node 1."""
        wait_for(lambda: self.paths.node_command(1).exists() and self.paths.worker.exists())
        return self.start(1, "sh", str(self.paths.node_command(1)), **environment)

    def wait_for_step(self, step: int) -> None:
        wait_for(
            lambda: self.paths.metrics.exists() and len(self.paths.metrics.read_text().splitlines()) >= step
        )

    def worker(self, rank: int) -> int:
        return int(self.paths.pid(rank).read_text())


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.2)


def finish(process: subprocess.Popen[str], seconds: float = TIMEOUT_SECONDS) -> tuple[int, str]:
    """Exit code and output of a process that must end by then."""
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def remaining(paths: RunPaths) -> list[str]:
    """Processes that still work on a run."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if str(paths.root) in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(" ".join(words))
    return found


def test_two_machines_train_together(machines: tuple[str, str], tiny: Path, tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny)
    other = pair.start_other()
    code, output = finish(pair.main)
    assert code == 0, output + pair.paths.log.read_text()
    assert finish(other)[0] == 0
    assert f"sh {pair.paths.node_command(1)}" in output
    losses = [
        json.loads(line)["loss"] for line in pair.paths.metrics.read_text().splitlines() if '"loss"' in line
    ]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert (pair.paths.model / "adapter_model.safetensors").exists()
    assert pair.paths.measured(0).exists() and pair.paths.measured(1).exists()
    assert "[rank 1] " in pair.paths.node_log(1).read_text()
    status = run_status(*ordered_run(pair.paths.root))
    assert (status.state, status.step, status.cluster) == (RunState.FINISHED, 4, Cluster.MANUAL)
    assert remaining(pair.paths) == []


@pytest.mark.thorough
def test_a_rank_that_dies_on_the_other_machine_is_named_and_all_end(
    machines: tuple[str, str], tiny: Path, tmp_path: Path
) -> None:
    pair = Pair(tmp_path, tiny, max_steps=10_000)
    other = pair.start_other()
    pair.wait_for_step(2)
    status = run_status(*ordered_run(pair.paths.root))
    assert status.state is RunState.RUNNING and [rank.is_alive for rank in status.ranks] == [True, True]
    os.kill(pair.worker(1), signal.SIGKILL)
    began = time.monotonic()
    code, output = finish(pair.main)
    assert time.monotonic() - began < 30
    assert code == 6, output
    assert "rank 1 on host" in output and "SIGKILL" in output
    code, output = finish(other)
    assert code == 6 and "rank 1 on host" in output and "SIGKILL" in output
    status = run_status(*ordered_run(pair.paths.root))
    assert status.state is RunState.FAILED and "SIGKILL" in status.message
    assert remaining(pair.paths) == []


def test_a_machine_that_vanishes_is_named_and_all_end(
    machines: tuple[str, str], tiny: Path, tmp_path: Path
) -> None:
    pair = Pair(tmp_path, tiny, max_steps=10_000)
    other = pair.start_other()
    pair.wait_for_step(2)
    ip("-n", NAMES[1], "link", "set", "lt1", "down")  # the cable is pulled
    try:
        began = time.monotonic()
        code, output = finish(pair.main)
        assert time.monotonic() - began < 30
        assert code == 6, output
        assert "node 1 on host" in output and "is gone" in output
        code, output = finish(other)
        assert code == 6 and "node 0 is gone" in output
        assert remaining(pair.paths) == []
    finally:
        ip("-n", NAMES[1], "link", "set", "lt1", "up")


def test_machines_that_do_not_meet_say_so(machines: tuple[str, str], tiny: Path, tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny, connect_seconds=3)
    code, output = finish(pair.main)
    assert code == 6 and "nodes 1 did not report within 3 s" in output
    code, output = finish(pair.start_other())  # node 0 is not there any more
    assert (
        code == 6 and f"node 1 on host {os.uname().nodename} can't reach node 0 at {ADDRESSES[0]}" in output
    )
    assert remaining(pair.paths) == []


def test_a_port_in_use_is_named(machines: tuple[str, str], tiny: Path, tmp_path: Path) -> None:
    listener = (
        "import socket, time; s = socket.create_server(('', 29612)); print('up', flush=True); time.sleep(60)"
    )
    blocker = subprocess.Popen(
        ["ip", "netns", "exec", NAMES[0], sys.executable, "-c", listener], stdout=subprocess.PIPE, text=True
    )
    try:
        assert blocker.stdout is not None and blocker.stdout.readline() == "up\n"
        code, output = finish(Pair(tmp_path, tiny).main)
        assert code == 6 and "port 29612" in output and "launch.main_port" in output
    finally:
        blocker.kill()
        blocker.communicate()


def test_other_libraries_on_the_other_machine_are_refused(
    machines: tuple[str, str], tiny: Path, tmp_path: Path
) -> None:
    """The other machine has metadata of another version of peft before its own."""
    shadow = tmp_path / "shadow" / "peft-0.0.1.dist-info"
    shadow.mkdir(parents=True)
    (shadow / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.0.1\n")
    pair = Pair(tmp_path, tiny)
    wait_for(lambda: pair.paths.worker.exists())
    command = pair.paths.node_command(1)
    text = command.read_text()
    command.write_text(text.replace("export PYTHONPATH=", f"export PYTHONPATH={shadow.parent}:"))
    code, output = finish(pair.start_other())
    assert code == 6 and "peft 0.0.1 there and" in output
    code, output = finish(pair.main)
    assert code == 6 and "peft 0.0.1 there and" in output


def test_a_folder_that_is_not_shared_is_named(machines: tuple[str, str], tiny: Path, tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny, connect_seconds=40)
    wait_for(lambda: pair.paths.worker.exists())
    script = pair.paths.node_command(1).read_text().replace(str(pair.paths.root), str(tmp_path / "elsewhere"))
    code, output = finish(pair.start(1, "sh", "-c", script))
    assert code == 6 and "is not there" in output
    code, output = finish(pair.main)
    assert code == 6 and f"{ADDRESSES[1]} called, and saw another run directory or none" in output
