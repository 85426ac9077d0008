"""The GPU validation, as far as a machine without a GPU can prove it: its jobs, its file, its table, its plumbing.

What only a card can prove is left untested here: torch's own record of allocations, NVML, and every number.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launcher.documents import read_document, write_document
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import JobSpec
from launcher.memory import Category, Phase
from launcher.plan import Plan
from launcher.planner.allocator import AllocatorMode
from scripts.gpu_validation.jobs import (
    CPU_JOBS,
    JOBS,
    STEPS,
    ValidationJob,
    architecture,
    by_name,
    missing_package,
    plan_of,
    settings,
    spec_of,
)
from scripts.gpu_validation.processes import child_environment, tracer_environment
from scripts.gpu_validation.results import (
    MAX_ATTEMPTS,
    JobResult,
    Machine,
    Outcome,
    PhaseBytes,
    Prediction,
    Results,
    Status,
    job_result,
    new_results,
    pairs_in_order,
    pending,
    phase_error_percent,
    step_error_percent,
    summary,
    table,
    with_prediction,
    with_result,
    worst,
)
from scripts.gpu_validation.schedule import detect_hardware, named_hardware, reason_against
from scripts.gpu_validation.snapshot import Recording, condense, write_timeline
from scripts.gpu_validation.weights import random_state

ROOT = Path(__file__).resolve().parent.parent
GIB = 1 << 30
CARD = HardwareSpec(kind=DeviceKind.CUDA, product="A Card", memory_bytes=80 * GIB, context_bytes=GIB)
MACHINE = Machine("A Card", "1.2", 80 * GIB, {"torch": "2.13.0"}, context_bytes=GIB // 2)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scripts.gpu_validation", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def prediction(**allocated_gib: float) -> Prediction:
    phases = {
        Phase(name): PhaseBytes(int(size * GIB), int(size * GIB) + GIB)
        for name, size in allocated_gib.items()
    }
    return Prediction(phases, {}, int(max(allocated_gib.values()) * GIB) + 2 * GIB, 0.5)


def measured(**allocated_gib: float) -> Outcome:
    phases = {
        Phase(name): PhaseBytes(int(size * GIB), int(size * GIB) + GIB, int(size * GIB) + 3 * GIB)
        for name, size in allocated_gib.items()
    }
    return Outcome(Status.DONE, "", 12.0, phases)


def result(job: ValidationJob, status: Status, attempts: int = 1) -> JobResult:
    return JobResult(job.name, job, {}, {}, 1.0, status, "", attempts)


# the jobs


@pytest.mark.parametrize("job", [*JOBS, *CPU_JOBS], ids=lambda job: job.name)
def test_every_job_is_legal(job: ValidationJob) -> None:
    spec, plan = spec_of(job, CARD), plan_of(job)
    assert isinstance(spec, JobSpec) and isinstance(plan, Plan)
    assert spec.training.max_steps == STEPS
    assert AllocatorMode(job.allocator)
    decoder = spec.model.architecture.get("text_config", spec.model.architecture)
    layers = decoder.get("num_hidden_layers", decoder.get("n_layer"))
    assert layers == (job.num_layers or layers)
    assert len(decoder.get("layer_types", [None] * layers)) == layers
    assert plan.max_length <= decoder.get("max_position_embeddings", decoder.get("n_positions"))


def test_names_tell_jobs_apart_and_knobs_are_all_there() -> None:
    assert len(JOBS) >= 40
    assert len(by_name()) == len(JOBS) + len(CPU_JOBS)
    assert {job.method for job in JOBS} == {"full", "lora", "qlora"}
    assert {job.checkpointing for job in JOBS} >= {"none", "selective", "full"}
    assert {job.allocator for job in JOBS} == {"expandable", "classic"}
    assert {job.attention for job in JOBS} == {"sdpa", "eager", "flash_attention_2"}
    assert len({job.model for job in JOBS}) >= 15


def test_a_shallower_model_keeps_the_facts_of_the_catalogue() -> None:
    job = next(job for job in JOBS if job.num_layers and job.model == "qwen3_30b_a3b")
    full = architecture(replace(job, num_layers=None))
    shallow = architecture(job)
    assert shallow == full | {"num_hidden_layers": job.num_layers}


def test_a_missing_package_is_named() -> None:
    job = next(job for job in JOBS if job.attention == "flash_attention_2")
    assert missing_package(job) == "flash_attn"  # never installed here
    assert missing_package(JOBS[0]) is None


# what is left to run


def test_finished_jobs_are_skipped_and_failed_ones_run_once_more() -> None:
    done, memory, failed, again, late, new = JOBS[:6]
    known = [
        result(done, Status.DONE),
        result(memory, Status.OUT_OF_MEMORY),
        result(failed, Status.FAILED, MAX_ATTEMPTS),
        result(again, Status.FAILED),
        result(late, Status.TIMED_OUT),
    ]
    assert pending(JOBS[:6], known) == [new, again, late]


def test_a_second_result_takes_the_place_of_the_first(tmp_path: Path) -> None:
    results = new_results(MACHINE, CARD)
    results = with_result(results, result(JOBS[0], Status.FAILED))
    results = with_result(results, result(JOBS[1], Status.DONE))
    results = with_result(results, result(JOBS[0], Status.DONE))
    assert [(known.name, known.attempts) for known in results.jobs] == [(JOBS[0].name, 2), (JOBS[1].name, 1)]
    write_document(tmp_path / "results.json", results)
    assert read_document(tmp_path / "results.json", Results) == results


def test_a_job_that_does_not_fit_is_not_run() -> None:
    assert reason_against(prediction(train_step=70.0), CARD) is None
    reason = reason_against(prediction(train_step=75.0), CARD)
    assert reason == "predicted 77.0 GiB, 76.0 GiB are usable"


# the table


def hand_made() -> Results:
    results = new_results(MACHINE, CARD)
    under = job_result(JOBS[0], prediction(load=10.0, train_step=19.0), measured(load=10.0, train_step=20.0))
    over = job_result(
        JOBS[1],
        prediction(load=4.0, train_step=8.0, optimizer_step=9.0, save=3.0),
        measured(load=5.0, train_step=8.0, optimizer_step=6.0),
    )
    over = replace(over, step_seconds=(9.0, 2.0, 2.5), predicted_step_seconds=1.5)
    return with_result(with_result(with_result(results, over), under), result(JOBS[2], Status.TIMED_OUT))


def test_table_has_signed_errors_with_under_predictions_first() -> None:
    head, _, first, second = table(hand_made()).splitlines()
    heads = ["load", "train_step", "optimizer_step", "evaluation", "save", "step, s", "step |"]
    assert head.split(" | ")[-7:] == heads
    # 19 for 20 GiB; reserved 20 for 21; on the device 21 for 23
    assert first == (
        f"| {JOBS[0].name} | 19.000 | 20.000 | -5.00 % | -4.76 % | -8.70 % | +0.00 % | -5.00 % |  |  |  |  |  |"
    )
    # the highest of the phases that were measured: 9 for 8 GiB
    assert second == (
        f"| {JOBS[1].name} | 9.000 | 8.000 | +12.50 % | +11.11 % | +0.00 % | -20.00 % | +0.00 % | +50.00 % |  |  | "
        "2.000 | -25 % |"
    )


def test_pairs_of_jobs_count_when_their_steps_are_apart() -> None:
    timed = [
        replace(hand_made().jobs[0], step_seconds=(9.0, measured), predicted_step_seconds=predicted)
        for measured, predicted in ((1.0, 2.0), (1.04, 1.0), (2.0, 1.5), (4.0, 5.0))
    ]
    # the first two are 4 % apart; of the other five pairs the one of the first and the third job is wrong
    assert pairs_in_order(timed) == (4, 5)
    assert step_error_percent(timed[2]) == -25.0
    assert step_error_percent(replace(timed[2], step_seconds=(9.0,))) is None


def test_summary_counts_and_names_what_has_no_result() -> None:
    words = summary(hand_made())
    assert "2 jobs: median absolute error 8.75 %, worst +12.50 %, under-predicted 1" in words
    assert (
        "held outside the allocator: 2048 to 2048 MiB, 512 MiB in a bare process, 1024 MiB assumed" in words
    )
    assert f"- {JOBS[2].name}: timed_out" in words


def test_table_of_a_file_is_printed(tmp_path: Path) -> None:
    write_document(tmp_path / "results.json", hand_made())
    printed = command("--table", str(tmp_path / "results.json"))
    assert printed.stdout.startswith(table(hand_made()))


def test_the_worst_job_is_the_one_whose_worst_phase_is_worst() -> None:
    assert [job.name for job in worst(hand_made(), 1)] == [JOBS[1].name]


def test_another_prediction_leaves_measurements_alone() -> None:
    before = hand_made().jobs[1]
    after = with_prediction(before, prediction(load=10.0, train_step=20.0))
    assert phase_error_percent(after, Phase.TRAIN_STEP) == 0.0
    assert (after.measured, after.seconds) == (before.measured, before.seconds)


# processes


def test_children_get_the_allocator_of_their_job_and_no_network() -> None:
    inherited = {
        "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync",
        "PATH": "/bin",
        "PYTHONPATH": "/carried",
    }
    usual = child_environment(CARD, settings(JOBS[0]), inherited)
    assert usual["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "TORCH_CUDNN_SDPA_DEPRIORITIZED" not in usual
    classic = replace(JOBS[0], allocator="classic", cudnn_attention=False)
    unusual = child_environment(CARD, settings(classic), inherited)
    assert unusual["PYTORCH_ALLOC_CONF"] == "expandable_segments:False"
    assert unusual["TORCH_CUDNN_SDPA_DEPRIORITIZED"] == "1"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in usual
    assert (usual["CUDA_VISIBLE_DEVICES"], usual["HF_HUB_OFFLINE"], usual["PATH"]) == ("0", "1", "/bin")
    assert usual["PYTHONPATH"].split(":")[0] == str(ROOT) and usual["PYTHONPATH"].endswith("/carried")
    assert tracer_environment(inherited)["CUDA_VISIBLE_DEVICES"] == ""


def test_random_weights_name_tied_ones_once_and_share_their_memory() -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=512,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = random_state(model)
    assert set(model.state_dict()) - set(state) == {"lm_head.weight"}
    assert len({value.untyped_storage().data_ptr() for value in state.values()}) == 1
    assert all(
        state[name].shape == shell.shape for name, shell in model.state_dict().items() if name in state
    )
    assert 0.01 < float(state["model.embed_tokens.weight"].std()) < 0.03


# timelines


def entry(action: str, addr: int, size: int, *frames: tuple[str, int, str]) -> dict[str, Any]:
    named = [dict(zip(("filename", "line", "name"), frame, strict=True)) for frame in frames]
    return {"action": action, "addr": addr, "size": size, "frames": named}


def test_a_record_becomes_births_and_releases(tmp_path: Path) -> None:
    linear = ("/opt/x/lib/python3.12/site-packages/torch/nn/modules/linear.py", 134, "forward")
    ours = ("/home/me/launcher/worker/train.py", 7, "load")
    trace = [
        entry("free_requested", 99, 5),  # from before the record
        entry("segment_map", 1000, 2 << 20),
        entry("alloc", 1000, 600, ours),
        entry("alloc", 2000, 300, linear),
        entry("alloc", 3000, 300, linear),
        entry("free_requested", 2000, 300),
        entry("free_completed", 2000, 300),
        entry("alloc", 2000, 100, ("/usr/me/own.py", 1, "f")),  # the address is used again
        entry("segment_unmap", 1000, 2 << 20),
        {"action": "snapshot"},
    ]
    roots = ["/opt/x/lib/python3.12", "/opt/x/lib/python3.12/site-packages", "/home/me", ""]
    timeline = condense(trace, [(0, Phase.LOAD), (1, Phase.TRAIN_STEP)], roots)
    assert timeline.sizes_bytes == (600, 300, 300, 100)
    assert timeline.events == (1, 2, 3, -2, 4)
    assert timeline.reserved == ((0, 2 << 20), (5, -(2 << 20)))
    assert (timeline.peak_event, timeline.peak_bytes) == (3, 1200)
    top, other = timeline.peak_blocks
    assert (top.size_bytes, top.count, other.size_bytes, other.count) in ((300, 2, 600, 1), (600, 1, 300, 2))
    frames = {top.frames, other.frames}
    assert frames == {("torch/nn/modules/linear.py:134 forward",), ("launcher/worker/train.py:7 load",)}
    write_timeline(tmp_path / "timeline.json.gz", "a job", timeline)
    written = json.loads(gzip.decompress((tmp_path / "timeline.json.gz").read_bytes()))
    assert written["job"] == "a job" and written["events"] == [1, 2, 3, -2, 4]


class CountingCuda:
    """Stands in for torch.cuda, which is not here: counts up with every look, and remembers nothing."""

    def __init__(self) -> None:
        self.looks = 0
        self.memory = SimpleNamespace(
            _record_memory_history=lambda **options: None,
            _snapshot=lambda: {"device_traces": [[]]},
        )

    def init(self) -> None: ...

    def current_device(self) -> int:
        return 0

    def memory_stats(self) -> dict[str, int]:
        self.looks += 1
        return {"allocation.all.allocated": 5 * self.looks, "allocation.all.freed": 2 * self.looks}


def test_phases_are_noted_as_model_and_optimizer_are_called() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
        )
    )
    recording = Recording(CountingCuda())
    recording.watch(model)
    optimizer = torch.optim.SGD(model.parameters())
    tokens = torch.ones(1, 4, dtype=torch.int64)
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.eval()
    model(input_ids=tokens)
    timeline = recording.stop()
    train, step = Phase.TRAIN_STEP, Phase.OPTIMIZER_STEP
    assert [phase for _, phase in timeline.phases] == [
        Phase.LOAD,
        train,
        step,
        train,
        step,
        train,
        Phase.EVALUATION,
    ]
    numbers = [number for number, _ in timeline.phases]
    assert numbers == sorted(set(numbers)) and numbers[0] == 0
    optimizer.step()  # the hooks are gone
    assert len(timeline.phases) == 7


# the whole, on this machine


def test_dry_run_predicts_for_a_card_that_is_not_here() -> None:
    asked = [
        number for number, job in enumerate(JOBS) if job.model == "llama3_2_1b" and job.method == "full"
    ][:2]
    run = command("--dry-run", "--hardware", "h100_80g", "--only", *map(str, asked))
    assert run.returncode == 0, run.stderr
    head, _, first, second = run.stdout.splitlines()
    assert "NVIDIA H100" in head
    for row, job in ((first, JOBS[asked[0]]), (second, JOBS[asked[1]])):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[0] == job.name
        device, load, step = (float(cell) for cell in cells[1:4])
        assert 2.3 < load < 2.4  # 1.24 billion parameters of two bytes, GiB
        assert load < step < device < 79


def test_hardware_by_name_and_without_a_card() -> None:
    assert named_hardware("h200_141g").product.startswith("NVIDIA H200")
    here = detect_hardware(cpu=True)
    assert here.kind is DeviceKind.CPU and here.memory_bytes > GIB


@pytest.mark.thorough
@pytest.mark.slow
def test_tiny_jobs_run_for_real_and_are_not_run_again(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    first = command("--cpu", "--out", str(out), "--only", "1", "--limit-seconds", "200")
    assert first.returncode == 0, first.stderr
    results = read_document(out, Results)
    (job,) = results.jobs
    assert (job.name, job.status, job.attempts) == (CPU_JOBS[1].name, Status.DONE, 1), job.message
    for phase in (Phase.TRAIN_STEP, Phase.OPTIMIZER_STEP):
        error = phase_error_percent(job, phase)
        assert error is not None and abs(error) < 0.3, phase
    for category in (Category.GRADIENTS, Category.OPTIMIZER_STATE):
        assert job.measured_resident_bytes[category] == job.predicted_resident_bytes[category]
    second = command("--cpu", "--out", str(out), "--only", "1")
    assert second.returncode == 0, second.stderr
    assert read_document(out, Results) == results
