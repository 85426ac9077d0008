"""Proves that tables are at most 80 columns wide, aligned and right, and that documents have every agreed key."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise

import pytest

from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import Attention, Checkpointing, JobSpec, Loss, Method, ModelSpec, Optimizer, Precision
from launcher.memory import (
    Category,
    DiskEstimate,
    MeasuredPhase,
    MemoryEstimate,
    MemoryMeasurement,
    Phase,
    PhasePeak,
    StepShape,
)
from launcher.plan import Plan, PlanChoice, Rejection
from launcher.report.documents import plan_document, record_document, run_fields
from launcher.report.layout import WIDTH, aligned, fits_width
from launcher.report.tables import (
    REJECTED_SHOWN,
    plan_text,
    reconciliation,
    run_text,
    runs_text,
)
from launcher.run_record import RunRecord, Status, WorkerOutcome
from launcher.units import GIB, MIB

PLAN = Plan(
    method=Method.LORA,
    rank=64,
    max_length=131072,
    micro_batch_size=16,
    gradient_accumulation_steps=1024,
    activation_checkpointing=Checkpointing.FULL,
    attention=Attention.EAGER,
    loss=Loss.CHUNKED,
    optimizer=Optimizer.ADAMW_TORCH_FUSED,
    precision=Precision.BF16_MIXED,
)


def peak(phase: Phase, **sizes: int) -> PhasePeak:
    by_category = {Category(name): size for name, size in sizes.items()}
    return PhasePeak(phase, sum(sizes.values()), by_category)


ESTIMATE = MemoryEstimate(
    phases=(
        peak(Phase.LOAD, parameters=400 * MIB),
        peak(Phase.TRAIN_STEP, parameters=400 * MIB, activations=500 * MIB, logits_and_loss=100 * MIB),
        peak(Phase.OPTIMIZER_STEP, parameters=400 * MIB, gradients=150 * MIB, optimizer_state=50 * MIB),
    ),
    resident_bytes={
        Category.PARAMETERS: 400 * MIB,
        Category.GRADIENTS: 150 * MIB,
        Category.OPTIMIZER_STATE: 50 * MIB,
    },
    context_bytes=GIB,
)
MEASURED = MemoryMeasurement(
    rank=0,
    meter="by hand",
    phases=(
        MeasuredPhase(Phase.LOAD, 500 * MIB, 600 * MIB, None),
        MeasuredPhase(Phase.TRAIN_STEP, 1250 * MIB, 1300 * MIB, 2000 * MIB),
        MeasuredPhase(Phase.OPTIMIZER_STEP, 480 * MIB, None, None),
    ),
    resident_bytes={
        Category.PARAMETERS: 400 * MIB,
        Category.GRADIENTS: 160 * MIB,
        Category.OPTIMIZER_STATE: 0,
    },
    shapes=(StepShape(2, 64), StepShape(2, 61)),
)
OUTCOME = WorkerOutcome(Status.DONE, "", 12, 2.25, 1.5, 61.0, 12345.6, 0.75, 1)
RECORD = RunRecord(
    run_dir="/runs/x",
    recipe="llama_lora",
    model="meta-llama/Llama-3.1-8B",
    hardware="a100_40g",
    started="2026-01-02T03:04:05+00:00",
    plan=PLAN,
    predicted=ESTIMATE,
    predicted_as_run=None,
    measured=MEASURED,
    outcome=OUTCOME,
    versions={"torch": "2.13.0"},
)
JOB = JobSpec(
    recipe="a_recipe_with_a_long_name_full",
    model=ModelSpec(path="HuggingFaceTB-and-friends/SmolLM2-135M-Instruct-long-name"),
    hardware=HardwareSpec(
        name="rtx4090_24g", kind=DeviceKind.CUDA, product="NVIDIA GeForce RTX 4090 of this machine"
    ),
)
LONG_REASON = (
    "train_step needs 123.4 GiB, 99.99 GiB over the budget; optimizer_state take 77.77 GiB of it all"
)


def choice(rejections: int = 3, *, feasible: bool = True) -> PlanChoice:
    rejected = tuple(
        Rejection(replace(PLAN, micro_batch_size=2 + i), f"{i}: {LONG_REASON}", i * GIB, 2 * GIB if i else 0)
        for i in range(rejections)
    )
    return PlanChoice(
        plan=PLAN if feasible else None,
        reason=LONG_REASON + "; " + LONG_REASON,
        estimate=ESTIMATE if feasible else None,
        runner_up=rejected[0].plan if feasible and rejected else None,
        runner_up_estimate=None,
        rejected=rejected,
        capacity_bytes=40 * GIB,
        headroom_bytes=2 * GIB,
        num_considered=rejections + 1,
        notes=("a note that is long enough to be wrapped " * 4,),
    )


def check_width(text: str) -> None:
    """At most 80 columns; a line may be longer only by one word that can't be broken."""
    for line in text.splitlines():
        assert line == line.rstrip()
        assert len(line) <= WIDTH or " " not in line[10:].strip(), line


def row(lines: list[str], name: str) -> list[str]:
    """The cells of the table row that begins with a name."""
    (line,) = [line for line in lines if line.strip().startswith(name)]
    return re.split(r"\s{2,}", line.strip())


# plans


@pytest.mark.parametrize("rejections", [0, 1, 3, 40])
@pytest.mark.parametrize("feasible", [True, False])
def test_plans_are_narrow(rejections: int, feasible: bool) -> None:
    check_width(plan_text(JOB, choice(rejections, feasible=feasible), 3.14))


def test_plan_says_what_was_taken_and_what_it_needs() -> None:
    text = plan_text(JOB, choice(), 3.14)
    words = " ".join(text.split())
    assert "lora rank 64, micro batch 16 x accumulation 1024, length 131072, checkpointing full" in words
    assert "40.00 GiB usable, 2.00 GiB headroom" in text
    lines = text.splitlines()
    assert row(lines, "train_step") == ["train_step", "1000.0 MiB"]
    assert row(lines, "activations") == ["activations", "500.0 MiB", "50.0 %"]
    assert row(lines, "tensors") == ["tensors", "1000.0 MiB", "100.0 %"]
    assert row(lines, "device") == ["device", "1.98 GiB"]
    assert "planned in 3.1 s" in lines


def test_largest_category_comes_first() -> None:
    lines = plan_text(JOB, choice(), 1.0).splitlines()
    places = [
        next(i for i, line in enumerate(lines) if line.startswith(f"  {name}"))
        for name in ("activations", "parameters", "logits_and_loss", "tensors")
    ]
    assert places == sorted(places)
    assert not any(line.startswith("  gradients") for line in lines)


def test_context_is_left_out_where_there_is_none() -> None:
    bare = replace(choice(), estimate=replace(ESTIMATE, context_bytes=0))
    assert "context" not in plan_text(JOB, bare, 1.0)


def test_plan_lists_the_nearest_and_counts_the_others() -> None:
    text = plan_text(JOB, choice(40), 1.0)
    assert "not taken (40 of 41 considered, nearest first)" in text
    assert text.count("\n  - ") == REJECTED_SHOWN
    assert f"and {40 - REJECTED_SHOWN} more; `output=json` lists all" in text
    assert "not taken" not in plan_text(JOB, choice(0), 1.0)


@pytest.mark.parametrize(
    ("disk", "words"),
    [
        (DiskEstimate(MIB, 2, 3 * MIB, 0), "5.00 MiB: model 3.00 MiB, 2 x checkpoint 1.00 MiB"),
        (DiskEstimate(MIB, None, 0, 0), "1.00 MiB: model 0 B, as many checkpoints as are due, each 1.00 MiB"),
        (DiskEstimate(0, 0, 3 * MIB, 0), "3.00 MiB: model 3.00 MiB per weight"),
        (DiskEstimate(0, 2, 0, 0), "0 B: model 0 B; 2 x checkpoint of a size that only the rehearsal tells"),
    ],
)
def test_the_disk_s_line_counts_checkpoints_and_says_what_nobody_knows(
    disk: DiskEstimate, words: str
) -> None:
    found = choice()
    estimate = replace(ESTIMATE, disk=disk)
    job = replace(JOB, model=replace(JOB.model, num_parameters=GIB))
    text = plan_text(job, replace(found, estimate=estimate), 1.0)
    check_width(text)
    assert f"disk {words}" in " ".join(text.split())


def test_no_plan_says_why() -> None:
    words = " ".join(plan_text(JOB, choice(feasible=False), 1.0).split())
    assert "no plan train_step needs 123.4 GiB" in words
    assert "because" not in words


# runs


def test_run_has_signed_errors() -> None:
    lines = run_text(RECORD).splitlines()
    assert row(lines, "load") == ["load", "400.00", "500.00", "-20.000 %"]
    assert row(lines, "train_step") == ["train_step", "1000.00", "1250.00", "-20.000 %"]
    assert row(lines, "optimizer_step") == ["optimizer_step", "600.00", "480.00", "+25.000 %"]
    assert row(lines, "highest after loading") == ["highest after loading", "1000.00", "1250.00", "-20.000 %"]
    assert row(lines, "parameters") == ["parameters", "400.00", "400.00", "+0.000 %"]
    assert row(lines, "gradients") == ["gradients", "150.00", "160.00", "-6.250 %"]
    assert row(lines, "optimizer_state") == ["optimizer_state", "50.00", "0.00", "-"]
    assert row(lines, "working set") == ["working set at the peak", "400.00", "690.00", "-42.029 %"]
    assert "loss      2.2500 at first, 1.5000 at last" in lines
    assert "speed     12,346 tokens/s, 0.75 s per step" in lines


def test_run_shows_what_memory_was_for_at_the_peak_of_each_phase() -> None:
    """Categories too small to be printed are left out; one that the meter saw and nobody predicted is not."""
    seen = {Category.PARAMETERS: 400 * MIB, Category.ACTIVATIONS: 450 * MIB, Category.TEMPORARIES: 9 * MIB}
    phases = (
        MeasuredPhase(Phase.LOAD, 400 * MIB, None, None, {Category.PARAMETERS: 400 * MIB}),
        MeasuredPhase(Phase.TRAIN_STEP, 859 * MIB + 5, None, None, {**seen, Category.BUFFERS: 5}),
    )
    lines = reconciliation(ESTIMATE, replace(MEASURED, phases=phases))
    assert [line.split()[0] for line in lines] == [
        *("peak", "load", "parameters"),
        *("train_step", "parameters", "activations", "logits_and_loss", "temporaries"),
        "highest",
    ]
    assert row(lines, "activations") == ["activations", "500.00", "450.00", "+11.111 %"]
    assert row(lines, "logits_and_loss") == ["logits_and_loss", "100.00", "0.00", "-"]
    assert row(lines, "temporaries") == ["temporaries", "0.00", "9.00", "-100.000 %"]
    assert not any("working set" in line for line in lines)
    document = run_fields(replace(RECORD, measured=replace(MEASURED, phases=phases)))["measured"]
    assert document["by_category_bytes"] == {
        name.value: size for name, size in {**seen, Category.BUFFERS: 5}.items()
    }
    assert document["by_phase_and_category_bytes"]["load"] == {"parameters": 400 * MIB}


def test_run_is_compared_with_the_prediction_for_what_ran() -> None:
    smaller = MemoryEstimate(
        (peak(Phase.TRAIN_STEP, parameters=1250 * MIB),), {Category.PARAMETERS: 400 * MIB}, 0
    )
    text = run_text(replace(RECORD, predicted_as_run=smaller))
    assert row(text.splitlines(), "train_step") == ["train_step", "1250.00", "1250.00", "+0.000 %"]
    words = " ".join(text.split())
    assert "batches were 2 x 64, 2 x 61 tokens" in words
    assert "allows for 16 x 131072, whose predicted peak is 1000.0 MiB" in words
    check_width(text)


def test_phases_seen_on_one_side_only_are_left_out() -> None:
    measured = replace(MEASURED, phases=(*MEASURED.phases, MeasuredPhase(Phase.SAVE, 9 * GIB, None, None)))
    lines = reconciliation(ESTIMATE, measured)
    assert not any(line.startswith("save") for line in lines)
    assert row(lines, "highest after loading")[2] == "1250.00"


@pytest.mark.parametrize("record", [RECORD, replace(RECORD, measured=None)])
def test_runs_are_narrow(record: RunRecord) -> None:
    failed = replace(
        OUTCOME, status=Status.OUT_OF_MEMORY, message="it failed because " * 12 + "\nsecond line"
    )
    fast = replace(OUTCOME, tokens_per_second=123456789.0, step_seconds=12345.0)
    for outcome in (OUTCOME, failed, fast, replace(OUTCOME, first_loss=None, tokens_per_second=None)):
        check_width(run_text(replace(record, outcome=outcome)))
    deep = replace(record, run_dir="/" + "/".join(["a_long_folder_name"] * 8))
    check_width(run_text(deep))
    assert deep.run_dir in run_text(deep)


def test_a_run_without_meter_says_so() -> None:
    text = run_text(replace(RECORD, measured=None))
    assert text.splitlines()[-1].startswith("memory    not measured")


def test_past_runs_are_listed_in_their_order() -> None:
    other = replace(RECORD, recipe="a_recipe_with_a_long_name_full", measured=None, predicted_as_run=ESTIMATE)
    interrupted = replace(RECORD, outcome=replace(OUTCOME, status=Status.OUT_OF_MEMORY))
    text = runs_text([RECORD, other, interrupted], ["a note"])
    lines = text.splitlines()
    assert len(lines) == 5
    assert re.split(r"\s{2,}", lines[1]) == [
        "2026-01-02 03:04",
        "llama_lora",
        "done",
        "1000.0 MiB",
        "1.22 GiB",
        "-20.000 %",
    ]
    assert re.split(r"\s{2,}", lines[2])[-3:] == ["1000.0 MiB", "-", "-"]
    assert lines[4] == "a note"
    check_width(text)
    assert lines[1].index("done") == lines[3].index("out_of_memory")


def test_a_long_recipe_gives_way_to_figures() -> None:
    records = [replace(RECORD, recipe=name * 5) for name in ("llama_lora", "x")]
    lines = runs_text(records, []).splitlines()
    assert max(map(len, lines)) == WIDTH and len(lines) == 3
    assert (
        "llama_lorallama" in lines[1]
        and "\N{HORIZONTAL ELLIPSIS}" in lines[1]
        and lines[1].endswith("-20.000 %")
    )
    assert "xxxxx  " in lines[2]


def test_no_runs() -> None:
    assert runs_text([], ["looked in `runs`"]) == "no runs\nlooked in `runs`"


def test_columns_are_aligned() -> None:
    lines = aligned([["name", "MiB", "error"], ["a", "10.00", "+1.5 %"], ["longer", "1.00", "-"]])
    assert lines == ["name      MiB   error", "a       10.00  +1.5 %", "longer   1.00       -"]
    ends = [
        [match.end() for match in re.finditer(r"\S+( %)?", line)]
        for line in run_text(RECORD).splitlines()
        if line.endswith(" %") or line.endswith("error")
    ]
    assert len(ends) >= 8
    assert all(one[-3:] == other[-3:] for one, other in pairwise(ends))


@pytest.mark.parametrize("spare", [-3, 0, 1, 3, 30, 200])
def test_the_first_column_gives_way_and_loses_nothing(spare: int) -> None:
    name = "base_model." * 30
    rows = [
        ["made by", "MiB", "share"],
        [f"  {name[: WIDTH - 27 + spare]}", "1234567.00 MiB", "100.0 %"],
        ["b", "1", "2"],
    ]
    lines = aligned(rows)
    assert max(map(len, lines)) == min(WIDTH, WIDTH + spare)
    assert fits_width(rows) == (spare <= 0) == (len(lines) == len(rows))
    assert lines[0].endswith("share") and lines[-1].endswith(" 2")
    figures = "  1234567.00 MiB  100.0 %"
    assert sum(line.endswith(figures) for line in lines) == 1
    kept = "".join(line.removesuffix(figures) for line in lines[1:-1])
    assert kept.replace(" ", "") == rows[1][0].strip()


def test_no_figure_is_lost_where_figures_alone_are_too_wide() -> None:
    rows = [["card", "plan", "peak"], ["a100_40g_and_more", "b" * 40, "c" * 40], ["l4_24g", "x", "23.66 GiB"]]
    lines = aligned(rows)
    assert lines[1].endswith(f"{'b' * 40}  {'c' * 40}") and lines[1].startswith("a100_40g_and")
    assert lines[2].strip() == "_more" and lines[3].startswith("l4_24g  ")


def test_wide_letters_take_two_cells() -> None:
    assert aligned([["\u6587\u5b57", "1"], ["abcdef", "22"]]) == ["\u6587\u5b57     1", "abcdef  22"]


# documents

PREDICTED_KEYS = {
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "peak_device_bytes",
    "peak_phase",
    "by_category_bytes",
    "by_phase_bytes",
    "host_peak_bytes",
    "step_seconds",
    "tokens_per_second",
}
PLAN_KEYS = {
    "method",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "activation_checkpointing",
    "zero_stage",
    "offload_optimizer",
    "offload_parameters",
    "attention",
    "loss",
    "rank",
}
DOCUMENT_KEYS = {
    "feasible",
    "plan",
    "predicted",
    "capacity_bytes",
    "headroom_bytes",
    "rejected",
    "run_dir",
    "versions",
    "planning_seconds",
}


@pytest.mark.parametrize("feasible", [True, False])
def test_plan_document_has_the_agreed_keys(feasible: bool) -> None:
    document = plan_document(choice(feasible=feasible), {"torch": "2"}, 1.5, "/runs/x")
    assert set(document) >= DOCUMENT_KEYS
    assert json.loads(json.dumps(document)) == document
    assert document["feasible"] is feasible
    assert (document["capacity_bytes"], document["headroom_bytes"]) == (40 * GIB, 2 * GIB)
    assert (document["run_dir"], document["planning_seconds"]) == ("/runs/x", 1.5)
    assert len(document["rejected"]) == 3
    for item in document["rejected"]:
        assert set(item) >= {"plan", "reason", "short_by_bytes"}
        assert set(item["plan"]) >= PLAN_KEYS
    if not feasible:
        assert document["plan"] is document["predicted"] is None
        return
    assert set(document["plan"]) >= PLAN_KEYS
    assert document["plan"]["activation_checkpointing"] == "full"
    assert set(document["predicted"]) >= PREDICTED_KEYS
    assert document["predicted"]["peak_allocated_bytes"] == 1000 * MIB
    assert document["predicted"]["peak_device_bytes"] == 1000 * MIB + GIB
    assert document["predicted"]["peak_phase"] == "train_step"
    assert sum(document["predicted"]["by_category_bytes"].values()) == 1000 * MIB
    assert document["predicted"]["by_phase_bytes"]["optimizer_step"] == 600 * MIB


def test_run_document_adds_the_measurement_with_the_keys_of_the_prediction() -> None:
    fields = run_fields(RECORD)
    assert set(fields["measured"]) >= PREDICTED_KEYS
    assert fields["measured"]["peak_allocated_bytes"] == 1250 * MIB
    assert fields["measured"]["peak_reserved_bytes"] == 1300 * MIB
    assert fields["measured"]["peak_device_bytes"] == 2000 * MIB
    assert fields["measured"]["peak_phase"] == "train_step"
    assert sum(fields["measured"]["by_category_bytes"].values()) == 1250 * MIB
    assert fields["measured"]["tokens_per_second"] == 12345.6
    assert fields["outcome"]["status"] == "done"
    assert json.loads(json.dumps(fields)) == fields
    assert run_fields(replace(RECORD, measured=None))["measured"] is None


def test_record_document_holds_everything_of_a_past_run() -> None:
    document = record_document(RECORD)
    assert {"plan", "predicted", "measured", "run_dir", "versions", "outcome", "recipe"} <= set(document)
    assert set(document["predicted"]) >= PREDICTED_KEYS
    assert json.loads(json.dumps(document)) == document
