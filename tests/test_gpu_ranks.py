"""Jobs of two ranks on one card, as far as a machine without a GPU can prove them: plans, environments, file, table."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.documents import read_document, write_document
from launcher.engine_limits import engine_limits
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import Checkpointing, Engine, Method
from launcher.memory import Category, MeasuredPhase, MemoryEstimate, MemoryMeasurement, Phase, PhasePeak
from launcher.run.supervise import Ending
from launcher.run_paths import RunPaths
from launcher.run_record import WorkerOrder
from scripts.accuracy_ranks import RankJob
from scripts.gpu_validation import rank_run
from scripts.gpu_validation.rank_jobs import ADDRESS, CHOICES, NUM_RANKS, rank_jobs, spec_of
from scripts.gpu_validation.rank_predict import RankAnswer, RankPredictor, RankSubject, answer_file
from scripts.gpu_validation.rank_results import (
    RankResult,
    rank_line,
    rank_table,
    result_of,
    waiting_jobs,
    with_estimate,
    with_rank_result,
)
from scripts.gpu_validation.rank_run import RankRun, rank_environment, run_ranks
from scripts.gpu_validation.ranks import UNKNOWN, new_results
from scripts.gpu_validation.results import Status

GIB = 1 << 30
CARD = HardwareSpec(kind=DeviceKind.CUDA, product="A Card", memory_bytes=80 * GIB, context_bytes=GIB)
CPU = HardwareSpec(name="cpu", kind=DeviceKind.CPU, memory_bytes=8 * GIB)


def order_of(entry: RankJob, hardware: HardwareSpec = CARD) -> WorkerOrder:
    return WorkerOrder(spec_of(entry.plan, hardware, Path("model"), 29_123), entry.plan, UNKNOWN, "model", "")


def estimate(size_bytes: int) -> MemoryEstimate:
    phase = PhasePeak(Phase.TRAIN_STEP, size_bytes, {Category.PARAMETERS: size_bytes}, size_bytes + GIB)
    return MemoryEstimate((phase,), {}, GIB)


def measurement(rank: int, size_bytes: int) -> MemoryMeasurement:
    phase = MeasuredPhase(Phase.TRAIN_STEP, size_bytes, size_bytes + GIB, size_bytes + 2 * GIB)
    return MemoryMeasurement(rank, "a meter", (phase,), {}, ())


def measured(entry: RankJob, *sizes_bytes: int) -> RankResult:
    ranks = tuple(measurement(rank, size) for rank, size in enumerate(sizes_bytes))
    return result_of(entry, RankRun(Status.DONE, "", 30.0, ranks))


@pytest.fixture
def python_command(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets ranks run a line of Python, which finds its node's number in `rank`, in place of the worker."""

    def command(code: str) -> None:
        monkeypatch.setattr(
            rank_run,
            "worker_command",
            lambda paths, plan, node: (sys.executable, "-c", f"rank = {node.rank}\n{code}"),
        )

    return command


def test_no_engine_refuses_a_job_on_a_card() -> None:
    entries = rank_jobs(CARD)
    assert [entry.name for entry in entries] == [choice.name for choice in CHOICES]
    assert len({entry.name for entry in entries}) == len(entries) == 15
    for entry in entries:
        job = spec_of(entry.plan, CARD, Path("model"))
        assert engine_limits(job, entry.plan) == ()
        assert (entry.plan.num_nodes, entry.plan.num_devices) == (NUM_RANKS, 1)
        assert job.hardware.world_size == entry.plan.world_size
        assert (entry.plan.buckets is None) is (entry.plan.engine is Engine.NONE)
    assert entries[0].plan.activation_checkpointing is Checkpointing.FULL
    assert {entry.plan.method for entry in entries} == {Method.FULL, Method.LORA, Method.QLORA}


def test_a_cpu_has_the_same_jobs_in_one_precision() -> None:
    plans = [entry.plan for entry in rank_jobs(CPU)]
    assert len(plans) >= 12
    assert len({plan.precision for plan in plans}) == 1


@pytest.mark.parametrize("hardware", [CARD, CPU], ids=["card", "cpu"])
def test_ranks_pass_for_two_machines_that_meet_at_one_place(hardware: HardwareSpec) -> None:
    entry = rank_jobs(hardware)[0]
    order = order_of(entry, hardware)
    inherited = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:32", "HOME": "/home/user"}
    first, second = (rank_environment(order, entry.name, rank, inherited) for rank in range(2))
    assert first["NCCL_HOSTID"] != second["NCCL_HOSTID"]
    assert {**first, "NCCL_HOSTID": ""} == {**second, "NCCL_HOSTID": ""}
    assert first["NCCL_SOCKET_IFNAME"] == first["GLOO_SOCKET_IFNAME"] == "lo"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in first
    on_card = hardware is CARD
    assert first["CUDA_VISIBLE_DEVICES"] == ("0" if on_card else "")
    assert (first.get("PYTORCH_ALLOC_CONF") == "expandable_segments:True") is on_card


def test_jobs_that_run_together_share_no_name() -> None:
    names = {
        rank_environment(order_of(entry), entry.name, rank, {})["NCCL_HOSTID"]
        for entry in rank_jobs(CARD)
        for rank in range(2)
    }
    assert len(names) == 2 * len(CHOICES)


def test_commands_agree_in_address_and_port_and_differ_in_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, commands = rank_jobs(CARD)[0], {}

    def supervise(command: tuple[str, ...], *rest: object, **others: object) -> Ending:
        commands[command[command.index("--machine_rank") + 1]] = command
        return Ending(0, False, 0)

    monkeypatch.setattr(rank_run, "supervise", supervise)
    run_ranks(RunPaths(tmp_path), order_of(entry), entry.name, 1.0, {}, threading.Event())
    assert set(commands) == {"0", "1"}
    for command in commands.values():
        assert command[command.index("--main_process_ip") + 1] == ADDRESS
        assert command[command.index("--main_process_port") + 1] == "29123"


def test_a_rank_that_fails_ends_the_other_and_leaves_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python_command: Callable[[str], None]
) -> None:
    monkeypatch.setattr(rank_run, "FOLLOW_SECONDS", 0.2)
    python_command("import time; time.sleep(60 * (1 - rank)); raise SystemExit('no such card')")
    run = run_ranks(
        RunPaths(tmp_path), order_of(rank_jobs(CARD)[0]), "job", 30.0, os.environ, threading.Event()
    )
    assert run.status is Status.FAILED
    assert run.seconds < 20
    assert "[rank 0: another rank has failed]" in run.message
    assert "[rank 1: exit code 1]\nno such card" in run.message


def test_the_last_words_are_the_workers_own(tmp_path: Path, python_command: Callable[[str], None]) -> None:
    python_command("print(f'[rank {rank}] no such card\\ntorchrun: a worker failed'); raise SystemExit(1)")
    run = run_ranks(
        RunPaths(tmp_path), order_of(rank_jobs(CARD)[0]), "job", 30.0, os.environ, threading.Event()
    )
    assert run.message == "[rank 0: exit code 1]\nno such card\n[rank 1: exit code 1]\nno such card"


def test_ranks_are_ended_when_the_time_is_up(tmp_path: Path, python_command: Callable[[str], None]) -> None:
    python_command("import time; print('waiting', flush=True); time.sleep(60)")
    run = run_ranks(
        RunPaths(tmp_path), order_of(rank_jobs(CARD)[0]), "job", 1.0, os.environ, threading.Event()
    )
    assert run.status is Status.TIMED_OUT
    assert run.message.count("waiting") == 2


def test_the_table_reads_a_results_file(tmp_path: Path) -> None:
    low, high, broken = rank_jobs(CPU)[:3]
    results = new_results(CPU)
    results = with_rank_result(
        results, with_estimate(measured(high, 4 * GIB, 5 * GIB), estimate(5 * GIB), 1.0)
    )
    results = with_rank_result(results, measured(low, 4 * GIB, 2 * GIB))
    results = with_rank_result(
        results, with_estimate(measured(low, 4 * GIB, 2 * GIB), estimate(3 * GIB), 1.0)
    )
    results = with_rank_result(results, result_of(broken, RankRun(Status.FAILED, "no such card")))
    write_document(tmp_path / "ranks.json", results)
    read = read_document(tmp_path / "ranks.json", type(results))
    assert read == results
    table = rank_table(read)
    rows = [line for line in table.splitlines() if line.startswith(("| ddp", "| zero", "| fsdp"))]
    assert [row.split(" | ")[0] for row in rows] == [f"| {low.name}", f"| {high.name}"]
    assert "-25.000 %, +50.000 %" in rows[0]
    assert "| -25.00 % |" in rows[0]  # the step, of the rank that takes most
    assert "| -20.00 % | 1024, 1024 |" in rows[0]  # reserved: 4 GiB for 5
    assert f"- {broken.name}: failed, no such card" in table
    assert "peak -25.00 %/+50.00 %" in rank_line(read.jobs[1])


def test_a_file_is_continued_with_new_jobs_first() -> None:
    entries = rank_jobs(CPU)
    done = measured(entries[1], GIB, GIB)
    failed = result_of(entries[0], RankRun(Status.TIMED_OUT))
    assert waiting_jobs(entries[:4], [failed, done]) == [entries[2], entries[3], entries[0]]


def test_a_predictor_that_ends_says_why_and_one_that_is_late_says_nothing(tmp_path: Path) -> None:
    entry = rank_jobs(CPU)[0]
    write_document(answer_file(tmp_path, "there"), RankAnswer(estimate(GIB)))
    subject = RankSubject(entry.name, spec_of(entry.plan, CPU, Path()), entry.plan)
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONHOME": "/nowhere"}  # so that it can't even start
    with RankPredictor([subject], environment, tmp_path) as predictor:
        assert predictor.answer("there", 0.0) == RankAnswer(estimate(GIB))
        answer = predictor.answer(entry.name, 30.0)
    assert answer is not None and answer.estimate is None
    assert answer.message.startswith("predicting ended: ")
