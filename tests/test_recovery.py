"""Rehearsals leave nothing behind, and jobs that run out of memory end all the same: real processes, a real limit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher import recovery
from launcher.checkpoints import last_checkpoint
from launcher.documents import from_json, to_json
from launcher.errors import WorkerOutOfMemory
from launcher.job import Engine
from launcher.memory import (
    RESIDENT,
    Category,
    HeldMemory,
    Interval,
    MeasuredPhase,
    MemoryEstimate,
    MemoryMeasurement,
    Phase,
    PhasePeak,
)
from launcher.reconciliation import findings
from launcher.recovery import difference, run_to_the_end
from launcher.report.rehearsal import bill_at_failure
from launcher.run import node
from launcher.run.endings import raise_for_outcome
from launcher.run.launch import prepare_run
from launcher.run.ledger import note_replan, read_order, read_replans
from launcher.run.rehearse import rehearsal_order
from launcher.run_paths import RunPaths
from launcher.run_record import Replan, Status, WorkerOutcome
from launcher.units import MIB
from scripts.endurance import MOMENTS, endure_all
from scripts.memory_limits import write_texts
from tests.memory_group import memory_group
from tests.test_end_to_end import TIMEOUT_SECONDS, document_of, launch, quoted, started, wait_for
from tests.tiny_job import ARCHITECTURE, tiny_order

LONG = 2048


def arguments(tiny: Path, cache: Path, data: Path) -> list[str]:
    """A job whose batches are as long as their longest text."""
    return [
        f"'model.path={tiny}'".strip("'"),
        f"data.path={data}",
        "data.format=text",
        "data.packing=false",
        "training.precision=fp32",
        "training.report_to=[]",
        "hardware=cpu",
        f"trace_cache={cache}",
        "output=json",
    ]


def losses(run_dir: str) -> list[float]:
    """Logged losses, step by step; of a step that was trained twice the last one."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return [by_step[step] for step in sorted(by_step)]


def short_job(tiny: Path, cache: Path, folder: Path) -> list[str]:
    """A job with every phase but merging."""
    data = write_texts(folder / "rows.jsonl", [20 + 3 * number for number in range(40)])
    return [
        *arguments(tiny, cache, data),
        "data.max_length=512",
        "training.global_batch_size=4",
        "training.max_steps=3",
        "training.save_steps=3",
        "evaluation=held_out",
        "evaluation.num_examples=6",
        "generation=samples",
        "generation.prompt_length=40",
        "generation.max_new_tokens=30",
    ]


@pytest.mark.thorough
def test_a_rehearsal_runs_the_longest_batch_and_is_put_away(tiny: Path, cache: Path, tmp_path: Path) -> None:
    result = launch([*short_job(tiny, cache, tmp_path), f"run_dir={tmp_path / 'run'}"], tmp_path)
    assert result.returncode == 0, result.stderr
    document = document_of(result)
    assert document["outcome"]["steps"] == 3 and document["replans"] == []
    shown = document["rehearsal"]
    assert shown["findings"] == []
    assert max(length for _, length in shown["shapes"]) == 20 + 3 * 33, "the last six rows are held out"
    for phase in ("load", "train_step", "optimizer_step", "evaluation", "generation", "save"):
        predicted = shown["predicted_by_phase_bytes"][phase]
        assert predicted == pytest.approx(shown["measured_by_phase_bytes"][phase], rel=0.03), phase
    left = {path.name for path in (tmp_path / "run" / "rehearsal").iterdir()}
    assert {"worker.log", "measured.rank0.json", "findings.json"} <= left
    assert not left & {"checkpoints", "model", "generations.jsonl"}


@pytest.mark.thorough
def test_a_rehearsed_run_is_the_same_bit_for_bit(tiny: Path, cache: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("true", "false")]
    for folder in folders:
        job = [*short_job(tiny, cache, tmp_path), f"launch.rehearse={folder.name}", f"run_dir={folder}"]
        assert launch(job, tmp_path).returncode == 0
    weights = [(folder / "model" / "adapter_model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    assert losses(str(folders[0])) == losses(str(folders[1]))


def long_job(tiny: Path, cache: Path, folder: Path) -> list[str]:
    """One long text among short ones: attention scores of 4 heads x 2048 x 2048 floats, kept in each of six layers."""
    data = write_texts(folder / "rows.jsonl", [40] * 9 + [LONG] + [40] * 14)
    return [
        *arguments(tiny, cache, data),
        f"data.max_length={LONG}",
        "training.global_batch_size=4",
        "training.max_steps=5",
        "training.save_steps=1",
        "planner.pin.attention=eager",
        "planner.pin.loss=chunked",
        "hardware.memory_bytes=1000000000000",
        "launch.rehearse=false",
    ]


def worker_is_gone(paths: RunPaths) -> bool:
    """Whether nothing of a run's workers is left, accelerate included; the launcher has only to plan, then."""
    mine = (os.getpid(), *(parent.pid for parent in psutil.Process().parents()))
    found = psutil.process_iter(["pid", "cmdline"])
    commands = [process.info["cmdline"] or [] for process in found if process.info["pid"] not in mine]
    return not any(str(paths.root) in command for command in commands)


def test_a_job_that_runs_out_of_memory_goes_on_with_the_next_plan(
    tiny: Path, cache: Path, tmp_path: Path, limit_bytes: int
) -> None:
    """The same job without a limit is what the loss curve must be. While the next plan is made nobody else may enter."""
    job, paths = long_job(tiny, cache, tmp_path), RunPaths(tmp_path / "disturbed")
    child = started([*job, f"run_dir={paths.root}"], tmp_path, data_limit_bytes=limit_bytes)
    wait_for(lambda: paths.outcome(0).exists() and worker_is_gone(paths), child)
    child.send_signal(signal.SIGSTOP)
    assert not paths.replans.exists(), "the next plan is not there yet"
    second = launch([f"resume={paths.root}"], tmp_path)
    child.send_signal(signal.SIGCONT)
    assert second.returncode == 6 and f"another launch, process {child.pid}, runs in it" in second.stderr
    stdout, stderr = child.communicate(timeout=TIMEOUT_SECONDS)
    assert child.returncode == 0, stderr
    document = json.loads(stdout)
    (replan,) = document["replans"]
    assert replan["phase"] == "train_step"
    assert replan["from_step"] > 0, "the long text is not in the first batch"
    before, after = replan["failed"], replan["taken"]
    assert before["activation_checkpointing"] == "none" and after["activation_checkpointing"] != "none"
    for name in ("method", "rank", "max_length", "optimizer", "precision"):
        assert before[name] == after[name]
    assert document["plan"] == after and document["outcome"]["steps"] == 5
    assert json.loads((Path(document["run_dir"]) / "plan.json").read_text())["plan"] == after
    undisturbed = launch(job, tmp_path)
    assert undisturbed.returncode == 0, undisturbed.stderr
    expected = losses(document_of(undisturbed)["run_dir"])
    assert losses(document["run_dir"]) == pytest.approx(expected, abs=1e-5)
    shown = launch(["action=report", f"run_dir={document['run_dir']}"], tmp_path)
    assert "recovered out of memory in train_step" in shown.stdout, shown.stdout


@pytest.mark.thorough
def test_an_evaluation_without_memory_shrinks_its_own_batch(
    tiny: Path, cache: Path, tmp_path: Path, limit_bytes: int
) -> None:
    held_out = write_texts(tmp_path / "held_out.jsonl", [LONG] * 4)
    job = [
        *arguments(tiny, cache, write_texts(tmp_path / "rows.jsonl", [40] * 24)),
        f"data.max_length={LONG}",
        "training.global_batch_size=4",
        "training.max_steps=2",
        "training.save_steps=1",
        "planner.pin.attention=eager",
        "hardware.memory_bytes=1000000000000",
        "launch.rehearse=false",
        "launch.max_replans=3",
        "evaluation=held_out",
        f"evaluation.path={held_out}",
        "evaluation.steps=1",
        "evaluation.batch_size=4",
    ]
    result = launch(job, tmp_path, data_limit_bytes=limit_bytes)
    assert result.returncode == 0, result.stderr
    document = document_of(result)
    assert document["replans"] and {replan["phase"] for replan in document["replans"]} == {"evaluation"}
    assert all(replan["taken"] == replan["failed"] == document["plan"] for replan in document["replans"])
    assert document["replans"][0]["change"] == "evaluation.batch_size 4 -> 2"


def test_a_rehearsal_is_the_order_in_short() -> None:
    order = tiny_order(Path("/models/tiny"), Engine.DDP, gradient_accumulation_steps=8, micro_batch_size=3)
    short = rehearsal_order(order)
    assert short.rehearses and short.job.training.max_steps == 2
    assert short.plan.gradient_accumulation_steps == 2 and short.plan.micro_batch_size == 3
    assert short.job.training.global_batch_size == short.plan.global_batch_size == 12
    assert short.job.training.save_steps is None and short.job.evaluation == order.job.evaluation
    assert difference(order.plan, short.plan) == "gradient_accumulation_steps 8 -> 2"


def measured(phases: dict[Phase, int], **resident: int) -> MemoryMeasurement:
    weighed: dict[Category, int] = {category: resident.get(category.value, 0) for category in RESIDENT}
    peaks = tuple(MeasuredPhase(phase, size, None, None) for phase, size in phases.items())
    return MemoryMeasurement(0, "by hand", peaks, weighed, ())


def test_findings_name_what_there_was_more_of() -> None:
    def peak(phase: Phase, size: int) -> PhasePeak:
        return PhasePeak(
            phase, size, {Category.PARAMETERS: 600 * MIB, Category.ACTIVATIONS: size - 600 * MIB}
        )

    phases, parameters = (peak(Phase.TRAIN_STEP, 1000 * MIB), peak(Phase.SAVE, 700 * MIB)), 600 * MIB
    high = Interval(990 * MIB, 1010 * MIB, 0.95, 20, is_new_architecture=False)
    predicted = MemoryEstimate(phases, {Category.PARAMETERS: parameters}, 0, high)
    seen = {Phase.TRAIN_STEP: 1010 * MIB, Phase.SAVE: 710 * MIB}
    assert findings(predicted, measured(seen, parameters=parameters)) == ()
    (found,) = findings(predicted, measured({**seen, Phase.SAVE: 710 * MIB + 1}, parameters=parameters))
    assert (found.phase, found.expected_bytes, found.category) == (Phase.SAVE, 710 * MIB, "working_set")
    (found,) = findings(predicted, measured({**seen, Phase.TRAIN_STEP: 1200 * MIB}, parameters=790 * MIB))
    assert (found.category, found.category_excess_bytes) == ("parameters", 190 * MIB)
    told_apart = {Category.PARAMETERS: 600 * MIB, Category.LOGITS_AND_LOSS: 600 * MIB}
    step = MeasuredPhase(Phase.TRAIN_STEP, 1200 * MIB, None, None, told_apart)
    (found,) = findings(predicted, replace(measured({}, parameters=parameters), phases=(step,)))
    assert (found.category, found.category_excess_bytes) == ("logits_and_loss", 600 * MIB)
    precise = replace(predicted, interval=replace(high, high_bytes=1000 * MIB))
    assert findings(precise, measured({Phase.SAVE: 702 * MIB}, parameters=parameters)) == ()


@pytest.mark.thorough
def test_a_job_that_shrinks_in_vain_ends_with_the_bill(tiny: Path, cache: Path, tmp_path: Path) -> None:
    """Layers are recomputed at the second try, and the scores of one are still too much: the bound is reached."""
    data = write_texts(tmp_path / "rows.jsonl", [LONG] * 8)
    job: list[Any] = [
        *arguments(tiny, cache, data),
        f"data.max_length={LONG}",
        "training.global_batch_size=8",
        "training.max_steps=2",
        "planner.pin.attention=eager",
        "planner.pin.micro_batch_size=8",
        "hardware.memory_bytes=1000000000000",
        "launch.max_replans=1",
    ]
    result = launch(job, tmp_path, data_limit_bytes=2 << 30)
    assert result.returncode == 4, result.stderr
    assert "in the rehearsal" in result.stderr and "can't allocate memory" in result.stderr
    document = document_of(result)
    (replan,) = document["replans"]
    assert replan["in_rehearsal"] and replan["failed"]["activation_checkpointing"] == "none"
    assert document["plan"] == replan["taken"] != replan["failed"]
    assert document["outcome"]["phase"] == "train_step"
    held = document["outcome"]["held"]
    parameters = document["predicted"]["resident_bytes"]["parameters"]
    assert held["resident_bytes"]["parameters"] == parameters
    assert parameters < held["allocated_bytes"] < held["process_peak_bytes"]
    assert replan["held"]["resident_bytes"] == held["resident_bytes"]
    predicted, measured = result.stderr[
        result.stderr.index("predicted at most in train_step") :
    ].splitlines()[:2]
    assert "activations" in predicted
    assert measured.startswith("measured after the failure: ") and "all else" in measured


KILLED_THEN_SHORT = """
import json, os, pathlib, resource, sys, time
run, group, done = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), json.loads(sys.argv[3])
batch = json.loads((run / "worker.json").read_text())["job"]["evaluation"]["batch_size"]
(run / "worker.rank0.pid").write_text(str(os.getpid()))
(run / "worker.rank0.phase").write_text("evaluation")
with (run / "batches").open("a") as stream:
    stream.write(f"{batch}\\n")
if batch == 4:
    (group / "cgroup.procs").write_text(str(os.getpid()))
    bytearray(os.urandom(1 << 20) * 256)
resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28))
try:
    bytearray(1 << 29)
except MemoryError:
    done |= {"status": "out_of_memory", "message": "MemoryError: again"}
(run / "outcome.rank0.json").write_text(json.dumps(done))
"""


def test_a_kill_for_want_of_memory_leads_to_the_next_plan_and_the_bound_to_an_end(
    tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel ends the first worker, which can't say a word; the second one has no memory either, and says so."""
    group = memory_group(f"launcher-replan-{os.getpid()}", 64 << 20)
    order = tiny_order(tiny, Engine.NONE, num_devices=1)
    job = replace(
        order.job,
        evaluation=replace(order.job.evaluation, enabled=True, steps=1, num_examples=4, batch_size=4),
        launch=replace(order.job.launch, max_replans=1),
        model=replace(order.job.model, architecture=ARCHITECTURE),
        trace_cache=str(cache),
    )
    order, paths, shown = replace(order, job=job), RunPaths(tmp_path / "run"), list[str]()
    prepare_run(paths, order, {})
    earlier = Replan(None, "of an earlier launch", False, order.plan, order.plan, "nothing", 0)
    note_replan(paths, earlier)
    done = to_json(WorkerOutcome(Status.DONE, "", 0, None, None, 0.0, None, None, 1))
    program = (sys.executable, "-c", KILLED_THEN_SHORT, str(paths.root), str(group), done)
    monkeypatch.setattr(node, "worker_command", lambda paths, plan, node: program)
    try:
        last, outcome = run_to_the_end(order, paths, shown.append, lambda order: None, lambda order: {})
    finally:
        group.rmdir()
    assert (paths.root / "batches").read_text().split() == ["4", "2"]
    kept, replan = read_replans(paths)
    assert kept == earlier, "what an earlier launch tried stays, and does not count"
    assert (replan.phase, replan.change) == (Phase.EVALUATION, "evaluation.batch_size 4 -> 2")
    assert "signal SIGKILL" in replan.message and replan.held is None
    assert outcome.status is Status.OUT_OF_MEMORY and outcome.message == "MemoryError: again"
    assert last.job.evaluation.batch_size == 2 and read_order(paths) == last
    with pytest.raises(WorkerOutOfMemory) as caught:
        raise_for_outcome(outcome, paths)
    assert caught.value.exit_code == 4
    assert "only the prediction is known" in bill_at_failure(last.predicted, outcome)


def test_the_phase_of_a_failure_is_that_of_the_rank_that_failed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, paths = tiny_order(tiny, Engine.DDP, num_devices=2), RunPaths(tmp_path / "run")
    order = replace(order, job=replace(order.job, launch=replace(order.job.launch, max_replans=0)))
    prepare_run(paths, order, {})

    def aborts(*_: object, **__: object) -> WorkerOutcome:
        for rank, phase in enumerate((Phase.TRAIN_STEP, Phase.SAVE)):
            paths.phase(rank).write_text(phase.value)
        raise WorkerOutOfMemory("rank 1 aborted", rank=1)

    monkeypatch.setattr(recovery, "launch_worker", aborts)
    _, outcome = run_to_the_end(order, paths, lambda line: None, lambda order: None, lambda order: {})
    assert (outcome.rank, outcome.phase) == (1, Phase.SAVE)


def test_the_bill_at_a_failure_has_what_was_measured_beside_what_was_predicted() -> None:
    peak = PhasePeak(
        Phase.TRAIN_STEP, 900 * MIB, {Category.PARAMETERS: 600 * MIB, Category.ACTIVATIONS: 300 * MIB}
    )
    predicted = MemoryEstimate((peak,), {}, 0)
    held = HeldMemory(700 * MIB, 950 * MIB, 1000 * MIB, None, {Category.PARAMETERS: 600 * MIB})
    short = WorkerOutcome(Status.OUT_OF_MEMORY, "", 3, None, None, 1.0, None, None, 1, phase=Phase.TRAIN_STEP)
    assert bill_at_failure(predicted, replace(short, held=held)).splitlines() == [
        "predicted at most in train_step: 900.0 MiB alive: parameters 600.0 MiB, activations 300.0 MiB",
        "measured after the failure: 700.0 MiB in use: parameters 600.0 MiB, all else 100.0 MiB; "
        "at most 950.0 MiB in that phase; 1000.0 MiB reserved",
    ]
    assert "only the prediction is known" in bill_at_failure(predicted, short)
    assert from_json(WorkerOutcome, to_json(replace(short, held=held))) == replace(short, held=held)


@pytest.mark.thorough
def test_a_job_that_is_killed_while_it_saves_ends_with_the_same_weights(tmp_path: Path) -> None:
    """scripts/endurance.py does this twenty times, in steps and rehearsals too."""
    (found,) = endure_all(tmp_path, [MOMENTS.index("save")], random.Random(1))
    assert found.is_same and found.resumed_from > 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_while_saving_costs_no_checkpoint(
    tiny: Path, cache: Path, tmp_path: Path, small_disk: Path
) -> None:
    """Somebody else fills the disk after the first checkpoint; when there is room again the run goes on."""
    data = write_texts(tmp_path / "rows.jsonl", [200] * 40)
    run_dir = small_disk / "run"
    job = [
        *arguments(tiny, cache, data),
        "data.max_length=128",
        "training.global_batch_size=4",
        "training.max_steps=4",
        "training.save_steps=1",
        "training.save_total_limit=1",
        "launch.rehearse=false",
        f"run_dir={run_dir}",
    ]
    log = tmp_path / "log"
    with log.open("w") as stream:
        child = subprocess.Popen(
            [sys.executable, "-m", "launcher.cli", *map(quoted, job)], stdout=stream, stderr=stream, text=True
        )
        wait_for(lambda: last_checkpoint(run_dir / "checkpoints") is not None, child)
        filler = small_disk / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as full:
            while True:
                full.write(bytes(1 << 16))
        assert child.wait(TIMEOUT_SECONDS) == 6, log.read_text()
    assert "is full" in log.read_text()
    assert last_checkpoint(run_dir / "checkpoints") is not None
    filler.unlink()
    result = launch([f"resume={run_dir}", "output=json"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert document_of(result)["outcome"]["steps"] == 4


@pytest.mark.thorough
def test_a_disk_too_small_for_an_engine_s_checkpoints_is_known_after_the_rehearsal(
    tiny: Path, cache: Path, tmp_path: Path, small_disk: Path
) -> None:
    """What one of them takes, the rehearsal has shown; no plan says it. A thousand of them don't fit."""
    data = write_texts(tmp_path / "rows.jsonl", [200] * 40)
    result = launch(
        [
            *arguments(tiny, cache, data),
            "data.max_length=128",
            "hardware.num_devices=2",
            "planner.pin.engine=ddp",
            "training.global_batch_size=4",
            "training.max_steps=1000",
            "training.save_steps=1",
            f"run_dir={small_disk / 'run'}",
        ],
        tmp_path,
    )
    assert result.returncode == 6, result.stderr
    assert "for checkpoints and models; its file system has" in result.stderr
    assert "rehearsal in" in result.stderr, "it was right until then"
    assert not (small_disk / "run" / "metrics.jsonl").exists()
