"""Jobs of clusters and of several machines that run out of memory go on with the next plan."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from launcher.cluster import Cluster, LaunchSpec
from launcher.documents import write_document
from launcher.errors import LaunchError, Terminated, WorkerOutOfMemory
from launcher.job import Engine
from launcher.memory import Category, HeldMemory, HostEstimate, Phase
from launcher.recovery import left_without_memory
from launcher.run import node
from launcher.run.launch import prepare_run
from launcher.run.ledger import read_order, read_replans
from launcher.run.lock import sole_launcher, works_on
from launcher.run.node import note_failure
from launcher.run_paths import RunPaths
from launcher.run_record import Status, WorkerOutcome
from launcher.units import format_bytes
from tests.test_end_to_end import TIMEOUT_SECONDS, document_of, launch, started, wait_for
from tests.test_recovery import long_job, losses
from tests.tiny_job import PREDICTED, tiny_order

OF_RANKS_BYTES = 128 << 20
"""What a rank of two has more than a process alone, in its threads' stacks for the most part."""


def pod(paths: RunPaths, limit_bytes: int, rank: int = 0) -> subprocess.Popen[str]:
    """What a pod of a cluster runs, with so much private memory."""
    command = [sys.executable, "-m", "launcher.run.node", str(paths.root)]
    limits = (limit_bytes, limit_bytes)
    return subprocess.Popen(
        [*command, "--rank", str(rank), "--address", "127.0.0.1", "--port", "29517"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, limits),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def words_of(pod: subprocess.Popen[str]) -> str:
    """What a pod says on stderr until it ends."""
    return pod.communicate(timeout=TIMEOUT_SECONDS)[1]


def on_kubernetes(tiny: Path, cache: Path, folder: Path) -> list[str]:
    """The long job as a cluster's."""
    names = "launch.cluster=kubernetes", "launch.image=mine", "launch.volume=runs"
    shared = f"launch.volume_path={folder.parent}", f"run_dir={folder / 'run'}"
    return [*long_job(tiny, cache, folder), *names, *shared]


@pytest.mark.thorough
def test_a_cluster_job_that_runs_out_of_memory_goes_on_where_it_runs(
    tiny: Path, cache: Path, tmp_path: Path, limit_bytes: int
) -> None:
    paths = RunPaths(tmp_path / "run")
    prepared = launch(on_kubernetes(tiny, cache, tmp_path), tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    before = read_order(paths)
    machine = pod(paths, limit_bytes)
    said = words_of(machine)
    assert machine.returncode == 0, said
    assert "out of memory in train_step" in said and "trying    " in said
    after = read_order(paths)
    assert after.plan.activation_checkpointing is not before.plan.activation_checkpointing
    assert after.job == before.job
    (replan,) = read_replans(paths)
    assert (replan.phase, replan.by_user, replan.taken) == (Phase.TRAIN_STEP, False, after.plan)
    assert replan.from_step > 0 and len(losses(str(paths.root))) == 5
    assert json.loads(paths.plan.read_text())["plan"]["activation_checkpointing"] == (
        after.plan.activation_checkpointing.value
    )


def test_machines_that_run_out_of_memory_together_go_on_where_they_run(
    tiny: Path, cache: Path, tmp_path: Path, limit_bytes: int
) -> None:
    """One of two machines has the long text; neither is started a second time."""
    paths = RunPaths(tmp_path / "run")
    job = [*on_kubernetes(tiny, cache, tmp_path), "hardware.num_nodes=2"]
    prepared = launch(job, tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    before = read_order(paths)
    machines = [pod(paths, limit_bytes + OF_RANKS_BYTES, rank) for rank in (0, 1)]
    said = [words_of(machine) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(said)
    after = read_order(paths)
    (replan,) = read_replans(paths)
    assert (replan.phase, replan.failed, replan.taken) == (Phase.TRAIN_STEP, before.plan, after.plan)
    assert replan.from_step > 0 and len(losses(str(paths.root))) == 5
    assert "trying    " in said[0] and "trying    " not in said[1]
    assert not any(paths.failure(rank).exists() for rank in (0, 1))
    assert paths.measured(0).exists() and paths.measured(1).exists()


@pytest.mark.thorough
def test_machines_that_were_started_by_hand_go_on_where_they_run(
    tiny: Path, cache: Path, tmp_path: Path, limit_bytes: int
) -> None:
    """`launch` itself is machine 0; the other one runs the command that it prints."""
    paths = RunPaths(tmp_path / "run")
    places = "launch.cluster=manual", "launch.main_address=127.0.0.1", f"run_dir={paths.root}"
    job = [*long_job(tiny, cache, tmp_path), *places, "hardware.num_nodes=2", "launch.main_port=29527"]
    limit = limit_bytes + OF_RANKS_BYTES
    main = started(job, tmp_path, data_limit_bytes=limit)
    wait_for(lambda: paths.node_command(1).exists() and paths.worker.exists(), main)
    other = subprocess.Popen(
        ["sh", str(paths.node_command(1))],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        stderr=subprocess.PIPE,
        text=True,
    )
    output, errors = main.communicate(timeout=2 * TIMEOUT_SECONDS)
    said = words_of(other)
    assert (main.returncode, other.returncode) == (0, 0), f"{output}{errors}{said}"
    (replan,) = read_replans(paths)
    assert (replan.phase, replan.taken) == (Phase.TRAIN_STEP, read_order(paths).plan)
    assert replan.from_step > 0 and len(losses(str(paths.root))) == 5
    assert "trying    " in errors


@pytest.mark.thorough
def test_a_job_of_several_machines_is_resumed_with_the_next_plan(
    tiny: Path, cache: Path, tmp_path: Path
) -> None:
    """Of the run there is only what its workers would have left."""
    paths = RunPaths(tmp_path / "run")
    job = [*on_kubernetes(tiny, cache, tmp_path), "hardware.num_nodes=2", "launch.max_replans=1"]
    assert launch(job, tmp_path).returncode == 0
    before = read_order(paths)
    assert left_without_memory(before, paths) is None, "it has not begun"
    ended = WorkerOutcome(
        Status.OUT_OF_MEMORY, "no room on rank 1", 1, None, None, 0.0, None, None, rank=1, world_size=2
    )
    write_document(paths.outcome(1), replace(ended, phase=Phase.TRAIN_STEP))
    note_failure(paths, 1, WorkerOutOfMemory("no room on rank 1"))
    resumed = launch([f"resume={paths.root}", "output=json"], tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "out of memory in train_step: rank 1 on host" in resumed.stderr
    after = read_order(paths)
    assert after.predicted.peak_device_bytes < 0.9 * before.predicted.peak_device_bytes
    assert (
        document_of(resumed)["plan"]["activation_checkpointing"] == after.plan.activation_checkpointing.value
    )
    assert after.plan.global_batch_size == before.plan.global_batch_size
    again = launch([f"resume={paths.root}", "output=json"], tmp_path)
    assert again.returncode == 0 and read_order(paths) == after, "it failed once, and shrinks once"


NODE_WITHOUT_MEMORY = """
import sys
from launcher.errors import WorkerOutOfMemory
from launcher.run import node

def run_node(*words):
    raise WorkerOutOfMemory("no room on rank 0")

node.run_node = run_node
sys.exit(node.main(sys.argv))
"""
"""A machine's launcher whose workers end at once for want of memory; all that follows is real."""


def test_a_launcher_that_is_ended_while_it_plans_leaves_a_run_that_goes_on(
    tiny: Path, tmp_path: Path
) -> None:
    paths = RunPaths(tmp_path / "run")
    order = tiny_order(tiny, Engine.NONE, num_devices=1, launch=LaunchSpec(Cluster.KUBERNETES))
    predicted = replace(PREDICTED, host=HostEstimate(0, (), 0))
    prepare_run(paths, replace(order, predicted=predicted), {})
    before = paths.worker.read_bytes()
    place = "--rank", "0", "--address", "127.0.0.1", "--port", "29537"
    launcher = subprocess.Popen(
        [sys.executable, "-c", NODE_WITHOUT_MEMORY, str(paths.root), *place],
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: paths.lock.exists() and paths.lock.read_text() != "", launcher)
    planner = psutil.Process(int(paths.lock.read_text()))
    assert planner.ppid() == launcher.pid
    with (
        pytest.raises(LaunchError, match=f"in use: another launch, process {planner.pid}"),
        sole_launcher(paths),
    ):
        pass
    wait_for(lambda: planner.children(recursive=True), launcher)
    tracing = planner.children(recursive=True)
    began = time.monotonic()
    launcher.send_signal(signal.SIGTERM)
    said = words_of(launcher)
    assert time.monotonic() - began < 20
    assert launcher.returncode == Terminated.exit_code == 143, said
    assert "error: stopped before there was a next plan, after: no room on rank 0" in said
    assert f"`launch resume={paths.root}` goes on" in said
    assert not works_on(planner.pid, paths.root) and not any(process.is_running() for process in tracing)
    with sole_launcher(paths):
        assert paths.worker.read_bytes() == before and not paths.replans.exists()
        assert left_without_memory(read_order(paths), paths) is not None, "a resume takes the next plan"


def test_a_rehearsal_that_ended_well_is_not_where_memory_ran_out(tmp_path: Path) -> None:
    """On a cluster nobody notes the rehearsal's findings; its outcomes say that it is over."""
    paths = RunPaths(tmp_path)
    order = tiny_order(Path("/models/tiny"), Engine.NONE, num_devices=1)
    order = replace(order, job=replace(order.job, launch=LaunchSpec(Cluster.KUBERNETES)))
    ended = WorkerOutcome(Status.DONE, "", 2, None, None, 0.0, None, None, rank=0, world_size=1)
    short = replace(ended, status=Status.OUT_OF_MEMORY, message="no room", phase=Phase.EVALUATION)
    for act, outcome in ((paths.rehearsal, ended), (paths, short)):
        act.root.mkdir(parents=True, exist_ok=True)
        write_document(act.worker, order)
        act.phase(0).write_text("save")
        write_document(act.outcome(0), outcome)
    note_failure(paths, 0, WorkerOutOfMemory("no room"))
    found = left_without_memory(order, paths)
    assert found is not None and found.phase is Phase.EVALUATION
    write_document(paths.rehearsal.outcome(0), replace(short, phase=Phase.GENERATION))
    paths.outcome(0).unlink()
    found = left_without_memory(order, paths)
    assert found is not None and found.phase is Phase.GENERATION


@pytest.mark.parametrize("max_replans", [0, 1])
def test_a_cluster_says_the_bill_when_nothing_is_tried_any_more(
    max_replans: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Workers that ended so are played; what says the bill is the process that does so on machine 0."""
    paths = RunPaths(tmp_path / "run")
    order = tiny_order(Path("/models/tiny"), Engine.NONE, num_devices=1)
    launch = LaunchSpec(Cluster.KUBERNETES, image="mine", rehearse=False, max_replans=max_replans)
    prepare_run(paths, replace(order, job=replace(order.job, launch=launch)), {})

    def full(*_: object) -> WorkerOutcome:
        ended = WorkerOutcome(
            Status.OUT_OF_MEMORY, "no room", 1, None, None, 0.0, None, None, rank=0, world_size=1
        )
        held = HeldMemory(5 << 20, None, None, None, {Category.PARAMETERS: 3 << 20})
        write_document(paths.outcome(0), replace(ended, phase=Phase.TRAIN_STEP, held=held))
        raise WorkerOutOfMemory("no room")

    monkeypatch.setattr(node, "run_node", full)
    on_machine = ["--rank", "0", "--address", "127.0.0.1", "--port", "29517"]
    assert node.main(["node", str(paths.root), *on_machine]) == 4
    said = capfd.readouterr().err
    assert said.count("no next plan: ") == max_replans, "there is no such model to plan for"
    assert "predicted at most in train_step: 1 B alive: inputs 1 B" in said
    five, three, two = (format_bytes(number << 20) for number in (5, 3, 2))
    assert f"measured after the failure: {five} in use: parameters {three}, all else {two}" in said
    assert said.count("predicted at most") == 1 and said.index("predicted at most") < said.index("error: ")


def test_what_ended_otherwise_keeps_its_plan(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    alone = tiny_order(Path("/models/tiny"), Engine.NONE, num_devices=1)
    cluster = replace(alone, job=replace(alone.job, launch=LaunchSpec(Cluster.KUBERNETES)))
    none = replace(cluster, job=replace(cluster.job, launch=LaunchSpec(Cluster.KUBERNETES, max_replans=0)))
    note_failure(paths, 0, WorkerOutOfMemory("the kernel ended rank 0"))
    found = left_without_memory(cluster, paths)
    assert found is not None and (found.status, found.phase) == (Status.OUT_OF_MEMORY, None)
    assert left_without_memory(alone, paths) is None, "`launch` itself tried what there was"
    assert left_without_memory(none, paths) is None
    note_failure(paths, 0, LaunchError("a port was in use"))
    assert left_without_memory(cluster, paths) is None
