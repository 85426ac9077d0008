"""Slurm, for real: a batch job on two nodes trains and reports, saves when it is stopped, and goes on when queued again.

The cluster is the tests' own (tests/slurm_cluster.py); the tests that need it skip with the reason elsewhere.
To accept new text: LAUNCHER_ACCEPT_GOLDEN=1 pytest tests/test_slurm.py, then read the difference in git.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import Cluster, LaunchSpec, SubmittedJob
from launcher.documents import read_document
from launcher.errors import LaunchError
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import Engine, Method
from launcher.memory import Category, HostEstimate, MemoryEstimate, Phase, PhasePeak
from launcher.run.launch import prepare_run
from launcher.run.ledger import read_replans
from launcher.run.slurm import batch_script, node_memory_bytes, slurm_state, submit, submit_command
from launcher.run.status import run_status
from launcher.run_paths import RunPaths
from launcher.run_record import RunRecord, Status, WorkerOrder
from launcher.run_status import RunState, RunStatus
from tests.slurm_cluster import slurm_cluster, why_no_slurm
from tests.test_recovery import long_job
from tests.test_render import RUN, assert_golden
from tests.tiny_job import PREDICTED, tiny_order, write_tiny_model

TIMEOUT_SECONDS = 240
REASON = why_no_slurm()
needs_slurm = pytest.mark.skipif(bool(REASON), reason=REASON)
GIB = 1 << 30


# ------------------------------------------------------------------------------------------------------- script


def on_gpus(launch: LaunchSpec) -> WorkerOrder:
    """An order for two nodes with eight GPUs each, whose processes need 20 GiB of host memory."""
    hardware = HardwareSpec(name="h100_80g", kind=DeviceKind.CUDA, num_devices=8, num_nodes=2)
    order = tiny_order(Path("/models/tiny"), Engine.DDP, num_devices=2, num_nodes=2, launch=launch)
    peak = PhasePeak(Phase.LOAD, 19 * GIB, {Category.PARAMETERS: 19 * GIB})
    estimate = MemoryEstimate(PREDICTED.phases, {}, 0, host=HostEstimate(GIB, (peak,), 0))
    plan = replace(order.plan, num_devices=8)
    return replace(order, job=replace(order.job, hardware=hardware), plan=plan, predicted=estimate)


def script(order: WorkerOrder) -> str:
    return batch_script(RUN, order, {"PYTHONPATH": "/home/me/launcher"}, "/home/me", "/usr/bin/python3")


def test_golden_scripts() -> None:
    spec = LaunchSpec(
        Cluster.SLURM,
        cpus_per_device=12,
        time_limit_minutes=600,
        partition="gpu",
        account="lab",
        requeue=True,
        options=("--constraint=h100", "--mail-type=END"),
        setup=("module load cuda/12.8",),
    )
    assert_golden("slurm_two_nodes.sbatch", script(on_gpus(spec)))
    alone = tiny_order(
        Path("/models/tiny"), Engine.NONE, num_devices=1, launch=LaunchSpec(Cluster.SLURM, "10.0.0.1", 29600)
    )
    assert_golden("slurm_one_device.sbatch", script(alone))


def test_memory_is_that_of_the_processes_of_a_node_and_the_headroom() -> None:
    order = on_gpus(LaunchSpec(Cluster.SLURM))
    assert node_memory_bytes(order) * 0.95 == pytest.approx((8 * 20 + 1) * GIB)
    given = on_gpus(LaunchSpec(Cluster.SLURM, memory_bytes=7))
    assert node_memory_bytes(given) == 7
    assert node_memory_bytes(replace(order, predicted=PREDICTED)) == 0


@pytest.mark.parametrize(
    ("name", "output"), [("a%jb", "a%%jb"), ("a\\b%j", "a\\\\b%j"), ("a 'b'\n\"c\"", "a 'b'\n\"c\"")]
)
def test_no_pattern_is_found_in_the_logs_path(name: str, output: str) -> None:
    assert f"--output=/runs/{output}/slurm.log" in submit_command(RunPaths(Path("/runs") / name))


def test_without_sbatch_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="`sbatch` is not on this machine") as failure:
        submit(RunPaths(tmp_path))
    assert f"sbatch --parsable --chdir={tmp_path}" in failure.value.hint


# --------------------------------------------------------------------------------------------------- for real


@pytest.fixture(scope="module")
def configuration() -> Iterator[Path]:
    with slurm_cluster() as file:
        yield file


@pytest.fixture
def slurm(configuration: Path, monkeypatch: pytest.MonkeyPatch, clean_environment: None) -> Path:
    monkeypatch.setenv("SLURM_CONF", str(configuration))
    return configuration


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return folder


@dataclass
class Batch:
    """A submitted run."""

    paths: RunPaths
    order: WorkerOrder

    def status(self) -> RunStatus:
        return run_status(self.paths, self.order)

    def wait(self, reached: Callable[[RunStatus], bool]) -> RunStatus:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not reached(status := self.status()):
            assert time.monotonic() < deadline, (status, self.log())
            time.sleep(0.3)
        return status

    def log(self) -> str:
        files = (self.paths.batch_log, self.paths.log, self.paths.node_log(1))
        return "\n".join(file.read_text(errors="replace")[-4000:] for file in files if file.exists())


def submitted(folder: Path, tiny: Path, max_steps: int = 4, num_nodes: int = 2, **launch: Any) -> Batch:
    spec = LaunchSpec(Cluster.SLURM, cpus_per_device=1, connect_seconds=60, **launch)
    engine = Engine.DDP if num_nodes > 1 else Engine.NONE
    order = tiny_order(
        tiny,
        engine,
        method=Method.LORA,
        num_devices=1,
        num_nodes=num_nodes,
        launch=spec,
        training={"max_steps": max_steps},
    )
    paths = RunPaths(folder / "run")
    prepare_run(paths, order, {})
    submit(paths)
    return Batch(paths, order)


def tell(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.mark.thorough
@needs_slurm
def test_a_job_on_two_nodes_trains_and_reports(slurm: Path, tiny: Path, nasty_path: Path) -> None:
    batch = submitted(nasty_path / "100%j\nof it", tiny)
    status = batch.wait(lambda status: status.state is RunState.RUNNING and status.step > 0)
    assert status.slurm_state == "RUNNING" and [rank.is_alive for rank in status.ranks] == [True, True]
    status = batch.wait(lambda status: status.slurm_state == "COMPLETED")
    assert (status.state, status.step, status.max_steps) == (RunState.FINISHED, 4, 4), batch.log()
    record = read_document(batch.paths.record, RunRecord)  # the job itself wrote it
    assert record.outcome.status is Status.DONE and len(record.measured_ranks) == 2
    assert record.outcome.first_loss is not None and status.loss is not None
    assert status.loss < record.outcome.first_loss
    log = batch.paths.batch_log.read_text()
    assert "state     finished" in log and "peak of phase, MiB" in log
    assert (batch.paths.model / "adapter_model.safetensors").exists()


@pytest.mark.thorough
@needs_slurm
def test_a_cancelled_job_saves_a_checkpoint_and_stays_cancelled(
    slurm: Path, tiny: Path, tmp_path: Path
) -> None:
    batch = submitted(tmp_path, tiny, max_steps=10_000, requeue=True)
    status = batch.wait(lambda status: status.step >= 2)
    assert status.job is not None
    tell("scancel", status.job.job_id)
    status = batch.wait(lambda status: status.slurm_state == "CANCELLED")
    assert status.state is RunState.INTERRUPTED, batch.log()
    assert "a checkpoint was saved" in status.message
    assert status.last_checkpoint.startswith(str(batch.paths.checkpoints))


@needs_slurm
def test_a_job_whose_time_is_up_saves_and_continues_when_it_is_queued_again(
    slurm: Path, tiny: Path, tmp_path: Path
) -> None:
    batch = submitted(tmp_path, tiny, max_steps=20, num_nodes=1, requeue=True)
    status = batch.wait(lambda status: status.step >= 2)
    assert status.job is not None
    tell("scancel", "--batch", "--signal=USR1", status.job.job_id)  # what Slurm does before the time is up
    status = batch.wait(lambda status: status.state is RunState.PENDING)
    assert status.last_checkpoint, batch.log()
    saved = int(status.last_checkpoint.rpartition("-")[2])
    assert 2 <= saved < 20
    status = batch.wait(lambda status: status.slurm_state == "COMPLETED")
    assert (status.state, status.step) == (RunState.FINISHED, 20), batch.log()
    logged = [json.loads(line) for line in batch.paths.metrics.read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == list(range(1, 21))  # none lost, none twice


@needs_slurm
def test_what_slurm_refuses_is_quoted(slurm: Path, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="invalid partition") as failure:
        submitted(tmp_path, tiny, partition="nowhere")
    assert "job.sbatch" in failure.value.hint
    status = run_status(RunPaths(tmp_path / "run"), tiny_order(tiny, Engine.DDP))
    assert status.state is RunState.PREPARED


def launch(*arguments: str, cwd: Path) -> tuple[int, str, str]:
    command: Sequence[str] = (sys.executable, "-m", "launcher.cli", *arguments)
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@needs_slurm
def test_the_command_line_submits_and_follows(slurm: Path, tiny: Path, tmp_path: Path) -> None:
    code, out, err = launch(
        "hardware=cpu",
        f"model.path={tiny}",
        "data=file",
        f"data.path={tiny / 'train.jsonl'}",
        "data.format=text",
        "data.max_length=64",
        "training.max_steps=2",
        "training.precision=fp32",
        "run_dir=run",
        "launch.cluster=slurm",
        "launch.cpus_per_device=1",
        "launch.options=['--comment=mine']",
        "output=json",
        cwd=tmp_path,
    )
    assert code == 0, err
    document = json.loads(out)
    assert document["state"] == "submitted" and document["job_id"].isdigit()
    deadline = time.monotonic() + TIMEOUT_SECONDS
    state = ""
    while state != "COMPLETED":
        assert time.monotonic() < deadline, (tmp_path / "run" / "slurm.log").read_text()
        time.sleep(0.5)
        state = slurm_state(SubmittedJob(document["job_id"]))
    code, out, err = launch("action=status", "run_dir=run", "output=json", cwd=tmp_path)
    status = json.loads(out)
    assert code == 0 and status["state"] == "finished", err + out
    assert status["job_id"] == document["job_id"] and status["slurm_state"] == "COMPLETED"
    assert status["step"] == 2 and status["measured"]["peak_allocated_bytes"] > 0
    code, out, err = launch("action=status", "run_dir=run", cwd=tmp_path)
    assert code == 0 and "state     finished" in out and "step      2/2" in out


@pytest.mark.thorough
@needs_slurm
def test_a_job_that_runs_out_of_memory_goes_on_in_its_allocation(
    slurm: Path, tiny: Path, tmp_path: Path, limit_bytes: int
) -> None:
    """The limit is set in the job's script, before the launcher of its one machine starts."""
    root = tmp_path / "run"
    cluster = (
        "launch.cluster=slurm",
        "launch.cpus_per_device=1",
        f"launch.setup=['ulimit -d {limit_bytes >> 10}']",
        "launch.memory_bytes=8000000000",
    )
    code, out, err = launch(
        *long_job(tiny, tmp_path / "traces", tmp_path), *cluster, f"run_dir={root}", cwd=tmp_path
    )
    assert code == 0, err
    paths, job = RunPaths(root), SubmittedJob(json.loads(out)["job_id"])
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while slurm_state(job) != "COMPLETED":
        assert time.monotonic() < deadline, (slurm_state(job), paths.batch_log.read_text())
        time.sleep(0.5)
    log = paths.batch_log.read_text()
    assert "out of memory in train_step" in log and "trying    " in log
    (replan,) = read_replans(paths)
    assert replan.from_step > 0
    assert read_document(paths.record, RunRecord).plan == replan.taken
