"""Jobs of clusters and of several machines that run out of memory go on with the next plan."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.cluster import Cluster, LaunchSpec
from launcher.documents import write_document
from launcher.errors import LaunchError, WorkerOutOfMemory
from launcher.job import Engine
from launcher.memory import Phase
from launcher.recovery import left_without_memory
from launcher.run.ledger import read_order, read_replans
from launcher.run.node import note_failure
from launcher.run_paths import RunPaths
from launcher.run_record import Status, WorkerOutcome
from tests.test_end_to_end import TIMEOUT_SECONDS, document_of, launch
from tests.test_recovery import long_job, losses
from tests.tiny_job import tiny_order


def pod(paths: RunPaths, limit_bytes: int) -> subprocess.CompletedProcess[str]:
    """What a pod of a cluster runs, with so much private memory."""
    command = [sys.executable, "-m", "launcher.run.node", str(paths.root)]
    limits = (limit_bytes, limit_bytes)
    return subprocess.run(
        [*command, "--rank", "0", "--address", "127.0.0.1", "--port", "29517"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, limits),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


def on_kubernetes(tiny: Path, cache: Path, folder: Path) -> list[str]:
    """The long job as a cluster's."""
    names = "launch.cluster=kubernetes", "launch.image=mine", "launch.volume=runs"
    shared = f"launch.volume_path={folder.parent}", f"run_dir={folder / 'run'}"
    return [*long_job(tiny, cache, folder), *names, *shared]


def test_a_cluster_job_that_runs_out_of_memory_goes_on_where_it_runs(
    tiny: Path, cache: Path, tmp_path: Path, limit_bytes: int
) -> None:
    paths = RunPaths(tmp_path / "run")
    prepared = launch(on_kubernetes(tiny, cache, tmp_path), tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    before = read_order(paths)
    finished = pod(paths, limit_bytes)
    assert finished.returncode == 0, finished.stderr
    assert "out of memory in train_step" in finished.stderr and "trying    " in finished.stderr
    after = read_order(paths)
    assert after.plan.activation_checkpointing is not before.plan.activation_checkpointing
    assert after.job == before.job
    (replan,) = read_replans(paths)
    assert (replan.phase, replan.by_user, replan.taken) == (Phase.TRAIN_STEP, False, after.plan)
    assert replan.from_step > 0 and len(losses(str(paths.root))) == 5
    assert json.loads(paths.plan.read_text())["plan"]["activation_checkpointing"] == (
        after.plan.activation_checkpointing.value
    )


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
