"""Proves the nouns of memory, and that every document survives the way to disk and back, whole or not at all."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from launcher.documents import from_json, read_document, to_json, write_document, write_text
from launcher.errors import LaunchError
from launcher.hardware import DeviceKind, HardwareSpec, MatrixFlops
from launcher.job import (
    Attention,
    Checkpointing,
    ChoicesSpec,
    JobSpec,
    Loss,
    Method,
    MethodSpec,
    ModelSpec,
    Optimizer,
    PinSpec,
    PlannerSpec,
    Precision,
    TrainingSpec,
)
from launcher.memory import (
    RESIDENT,
    Category,
    MeasuredPhase,
    MemoryEstimate,
    MemoryMeasurement,
    Phase,
    PhasePeak,
    StepShape,
)
from launcher.plan import Plan
from launcher.run_record import RunRecord, Status, WorkerOrder, WorkerOutcome
from launcher.units import (
    GIB,
    KIB,
    MIB,
    format_bytes,
    format_change,
    format_gib,
    format_seconds,
    signed_percent,
)

LOAD = PhasePeak(Phase.LOAD, 70, {Category.PARAMETERS: 70})
STEP = PhasePeak(Phase.TRAIN_STEP, 110, {Category.PARAMETERS: 70, Category.ACTIVATIONS: 40})
UPDATE = PhasePeak(Phase.OPTIMIZER_STEP, 110, {Category.PARAMETERS: 70, Category.TEMPORARIES: 40})
ESTIMATE = MemoryEstimate((LOAD, STEP, UPDATE), {Category.PARAMETERS: 70, Category.GRADIENTS: 9}, 25)
MEASUREMENT = MemoryMeasurement(
    rank=0,
    meter="by hand",
    phases=(
        MeasuredPhase(Phase.LOAD, 71, None, None),
        MeasuredPhase(Phase.TRAIN_STEP, 109, 120, 145),
    ),
    resident_bytes={Category.PARAMETERS: 70},
    shapes=(StepShape(2, 64), StepShape(1, 33)),
)
PLAN = Plan(
    method=Method.LORA,
    rank=16,
    max_length=64,
    micro_batch_size=2,
    gradient_accumulation_steps=4,
    activation_checkpointing=Checkpointing.FULL,
    attention=Attention.EAGER,
    loss=Loss.PLAIN,
    optimizer=Optimizer.SGD,
    precision=Precision.BF16_MIXED,
)
JOB = JobSpec(
    recipe="r",
    run_dir="a b/c'd",
    model=ModelSpec(
        path="x/y", architecture={"hidden_size": 8, "layer_types": ["a", None], "rope": {"theta": 1e6}}
    ),
    method=MethodSpec(target_modules=("q", "k"), alpha=8, dropout=0.1),
    training=TrainingSpec(learning_rate=5e-4, max_steps=3, report_to=()),
    hardware=HardwareSpec(
        name="h", kind=DeviceKind.CUDA, memory_bytes=2**53 + 1, matrix_flops=MatrixFlops(bf16=312e12)
    ),
    planner=PlannerSpec(
        pin=PinSpec(method=Method.FULL, loss=Loss.PLAIN),
        choices=ChoicesSpec(method=(Method.FULL, Method.LORA), rank=(64, 16)),
        headroom=0.1,
    ),
)
OUTCOME = WorkerOutcome(Status.DONE, "", 3, 2.0, None, 4.5, 100.0, 0.5, 1)
RECORD = RunRecord(
    "d", "r", "m", "h", "2026-01-01T00:00:00+00:00", PLAN, ESTIMATE, None, MEASUREMENT, OUTCOME, {"t": "1"}
)
DOCUMENTS = [
    JobSpec(),
    JOB,
    PLAN,
    WorkerOrder(JOB, PLAN, ESTIMATE, 'weights of "x"', ""),
    RECORD,
    replace(RECORD, predicted_as_run=ESTIMATE, measured=None, outcome=replace(OUTCOME, status=Status.FAILED)),
    MEASUREMENT,
    OUTCOME,
]


# peaks


def test_parts_sum_to_the_peak() -> None:
    with pytest.raises(ValueError, match=r"train_step: categories sum to 110 bytes, the peak is 111"):
        PhasePeak(Phase.TRAIN_STEP, 111, dict(STEP.by_category_bytes))


def test_estimate_has_a_phase() -> None:
    with pytest.raises(ValueError, match="without phases"):
        MemoryEstimate((), {}, 0)


def test_peak_is_the_highest_phase_and_the_earliest_of_equals() -> None:
    assert ESTIMATE.peak is STEP
    assert replace(ESTIMATE, phases=(UPDATE, STEP)).peak is UPDATE
    assert replace(ESTIMATE, phases=(LOAD,)).peak is LOAD
    assert ESTIMATE.peak_allocated_bytes == 110
    assert ESTIMATE.peak_device_bytes == 135


def test_phases_are_found_by_name() -> None:
    assert ESTIMATE.phase(Phase.OPTIMIZER_STEP) is UPDATE
    assert ESTIMATE.phase(Phase.SAVE) is None
    assert MEASUREMENT.phase(Phase.TRAIN_STEP) is MEASUREMENT.phases[1]
    assert MEASUREMENT.phase(Phase.EVALUATION) is None
    assert MEASUREMENT.peak_allocated_bytes == 109


def test_residents_are_categories_that_outlive_a_step() -> None:
    assert set(RESIDENT) < set(Category)
    assert Category.ACTIVATIONS not in RESIDENT and Category.INPUTS not in RESIDENT


def test_nouns_are_frozen() -> None:
    for noun, name in ((STEP, "phase"), (ESTIMATE, "phases"), (StepShape(1, 2), "length"), (PLAN, "rank")):
        with pytest.raises(FrozenInstanceError):
            setattr(noun, name, None)


def test_step_shapes_compare_by_value() -> None:
    assert StepShape(2, 64) == StepShape(micro_batch_size=2, length=64) != StepShape(64, 2)


# plans


def test_a_plan_counts_its_tokens() -> None:
    assert PLAN.tokens_per_step == 2 * 4 * 64


@pytest.mark.parametrize("name", ["micro_batch_size", "gradient_accumulation_steps", "max_length"])
def test_a_plan_without_batch_or_length_is_none(name: str) -> None:
    with pytest.raises(ValueError, match="each must be at least 1"):
        Plan(**{**vars(PLAN), name: 0})


def test_rank_belongs_to_lora() -> None:
    with pytest.raises(ValueError, match="method lora with rank 0"):
        replace(PLAN, rank=0)
    with pytest.raises(ValueError, match="method full with rank 16"):
        replace(PLAN, method=Method.FULL)


# units


def test_units() -> None:
    assert [format_bytes(size) for size in (0, 1023, KIB, 5 * MIB // 2, 100 * GIB, -GIB)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "2.50 MiB",
        "100.0 GiB",
        "-1.00 GiB",
    ]
    assert [format_change(size) for size in (0, KIB, -GIB)] == ["0 B", "+1.00 KiB", "-1.00 GiB"]
    assert format_gib(3 * GIB // 2) == "1.500"
    assert (format_seconds(42.34), format_seconds(185.2)) == ("42.3 s", "3 min 05 s")
    assert signed_percent(90, 100) == -10.0


# documents


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: type(document).__name__)
def test_documents_survive_json(document: object, nasty_path: Path) -> None:
    kind = type(document)
    assert from_json(kind, to_json(document)) == document
    assert from_json(kind, to_json(document, indent=None)) == document
    assert "\n" not in to_json(document, indent=None)
    write_document(nasty_path / "new" / "d.json", document)
    assert read_document(nasty_path / "new" / "d.json", kind) == document


def test_enumerations_come_back_as_members() -> None:
    back = from_json(RunRecord, to_json(RECORD))
    assert back.plan.method is Method.LORA
    assert back.outcome.status is Status.DONE
    assert list(back.predicted.resident_bytes) == [Category.PARAMETERS, Category.GRADIENTS]
    assert from_json(JobSpec, to_json(JOB)).hardware.memory_bytes == 2**53 + 1


def test_invalid_documents_are_refused() -> None:
    broken = json.loads(to_json(ESTIMATE))
    broken["phases"][0]["allocated_bytes"] += 1
    with pytest.raises(ValueError, match="categories sum to 70"):
        from_json(MemoryEstimate, json.dumps(broken))
    with pytest.raises(ValueError, match="rank"):
        from_json(MemoryMeasurement, "{}")


def test_unreadable_documents_are_launch_errors(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"record\.json` does not exist"):
        read_document(tmp_path / "record.json", RunRecord)
    (tmp_path / "record.json").write_text(to_json(RECORD)[:-20])
    with pytest.raises(LaunchError, match="can't be read") as caught:
        read_document(tmp_path / "record.json", RunRecord)
    assert caught.value.hint


def test_a_failed_write_leaves_the_old_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "d.json"
    write_document(file, PLAN)
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_document(file, replace(PLAN, rank=8))
    assert read_document(file, Plan) == PLAN
    monkeypatch.undo()
    write_document(file, replace(PLAN, rank=8))
    assert read_document(file, Plan).rank == 8
    assert os.listdir(tmp_path) == ["d.json"]


def test_a_reader_sees_all_of_a_document_or_nothing(tmp_path: Path) -> None:
    file = tmp_path / "d.txt"
    texts = [letter * 200_000 for letter in "ab"]
    write_text(file, texts[0])
    stop = threading.Event()

    def keep_writing() -> None:
        while not stop.is_set():
            for text in texts:
                write_text(file, text)

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        seen = {file.read_text() for _ in range(300)}
    finally:
        stop.set()
        writer.join()
    assert seen <= set(texts)
