"""Explanations: by an imagined law whose figures can be worked by hand, and of a real small job by the command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.data_lengths import DataLengths
from launcher.explanation import Change
from launcher.job import (
    Checkpointing,
    ChoicesSpec,
    DataSpec,
    EvaluationSpec,
    JobSpec,
    Method,
    Objective,
    Optimizer,
    PinSpec,
    PlannerSpec,
)
from launcher.memory import Category, MemoryEstimate, Phase, PhasePeak
from launcher.plan import Grade, Plan, PlanChoice
from launcher.planner.explain import explain, savers, squeeze, verdict
from launcher.planner.marginal import marginal_changes
from launcher.planner.search import search
from launcher.report.explanation import explanation_document, explanation_text
from tests.imagined import FakeForecaster, Law, job_with
from tests.tiny_job import write_tiny_model

LAW = Law()


def explained(job: JobSpec, law: Law = LAW) -> tuple[PlanChoice, tuple[Change, ...]]:
    choice = search(job, FakeForecaster(law))
    assert choice.plan is not None
    return choice, marginal_changes(job, choice.plan, lambda _: FakeForecaster(law))


def fakes(job: JobSpec) -> FakeForecaster:
    return FakeForecaster(LAW)


def roomy(**planner: object) -> JobSpec:
    return job_with(10**9, PlannerSpec(headroom=0.0, **planner))  # type: ignore[arg-type]


def test_each_change_is_one_knob_with_its_own_price() -> None:
    choice, changes = explained(roomy())
    assert choice.plan is not None
    base, step = LAW.price(choice.plan), LAW.step(choice.plan)
    assert step is not None
    for change in changes:
        differing = {
            name
            for name in Plan.__dataclass_fields__
            if getattr(change.plan, name) != getattr(choice.plan, name)
        }
        assert differing <= {change.knob, "gradient_accumulation_steps", "rank"}, change
        assert change.saved_bytes == base.peak_device_bytes - LAW.price(change.plan).peak_device_bytes
        if change.knob == "data.packing":
            assert change.step_ratio is None  # nobody knows how much of the batches is padding
            continue
        changed = LAW.step(change.plan)
        assert changed is not None
        assert change.step_ratio == pytest.approx(step.tokens_per_second / changed.tokens_per_second)
    sizes = [change.saved_bytes for change in changes]
    assert sizes == sorted(sizes, key=lambda size: -(size or 0))


def test_what_changes_the_result_says_so() -> None:
    _, changes = explained(roomy())
    by_result = {change.knob: change.changes_result for change in changes}
    assert by_result == {
        "micro_batch_size": False,
        "activation_checkpointing": False,
        "loss": False,
        "attention": False,
        "data.packing": True,
        "precision": True,
        "max_length": True,
        "method": True,
        "rank": True,
        "optimizer": True,
    }


def test_a_pinned_knob_is_turned_too() -> None:
    pin = PinSpec(micro_batch_size=2, activation_checkpointing=Checkpointing.FULL)
    _, changes = explained(roomy(pin=pin))
    words = {change.words for change in changes if not change.changes_result}
    assert {"2 -> 1", "2 -> 4", "full -> none", "full -> selective", "full -> offload"} <= words


def test_packing_is_worth_the_padding_that_it_saves() -> None:
    """Three rows of 8 tokens and one of 64: batches of two are half padding or more, and packed rows have none."""
    job = replace(roomy(), data=DataSpec(max_length=64))
    choice = search(job, FakeForecaster(LAW))
    assert choice.plan is not None
    plan = replace(choice.plan, micro_batch_size=2, gradient_accumulation_steps=4)
    data = DataLengths("by hand", 4, (8, 8, 8, 64), (0, 0, 0, 0), 64)
    found = marginal_changes(job, plan, fakes, data)
    (packing,) = (change for change in found if change.knob == "data.packing")
    # of the six pairs of rows three are 64 long and three 8: 36 tokens on average for 22 real ones per row
    padded, packed = LAW.seconds(replace(plan, max_length=36)), LAW.seconds(plan)
    assert packing.step_ratio == pytest.approx((packed / (8 * 64)) / (padded / (8 * 22)), rel=0.02)
    back = replace(job, data=replace(job.data, packing=True))
    (padding,) = (
        change for change in marginal_changes(back, plan, fakes, data) if change.knob == "data.packing"
    )
    assert padding.words == "true -> false"
    assert packing.step_ratio is not None and padding.step_ratio == pytest.approx(1 / packing.step_ratio)


class EvaluationLaw(FakeForecaster):
    """An evaluation whose batch is what takes the memory: a byte, and a MiB, per row."""

    def __init__(self, job: JobSpec) -> None:
        super().__init__(LAW)
        self.rows = job.evaluation.batch_size or 0
        self.kept = 10**8 if job.evaluation.keep_logits else 0

    def estimate(self, plan: Plan, *, exact: bool = False) -> MemoryEstimate:
        step = super().estimate(plan, exact=exact)
        size = step.peak_device_bytes + ((self.rows or plan.micro_batch_size) << 20) + self.kept
        peak = PhasePeak(Phase.EVALUATION, size, {Category.ACTIVATIONS: size})
        return replace(step, phases=(*step.phases, peak))


def test_an_evaluation_s_batch_and_its_logits_are_turned_too() -> None:
    job = replace(roomy(), evaluation=EvaluationSpec(enabled=True, batch_size=8, keep_logits=True))
    choice = search(job, FakeForecaster(LAW))
    assert choice.plan is not None
    found = {
        (change.knob, change.words): change.saved_bytes
        for change in marginal_changes(job, choice.plan, EvaluationLaw)
        if change.knob.startswith("evaluation.")
    }
    assert found == {
        ("evaluation.batch_size", "8 -> 4"): 4 << 20,
        ("evaluation.batch_size", "8 -> 16"): -(8 << 20),
        ("evaluation.keep_logits", "true -> false"): 10**8,
    }


def test_more_memory_helps_where_it_is_short_and_not_where_it_is_not() -> None:
    kept = LAW.peak(search(roomy(), FakeForecaster(LAW)).plan or pytest.fail("roomy"))
    short = job_with(kept - 1)
    for job, words in ((short, "Memory is this job's limit: with 2 times as much it runs"), (roomy(), "not")):
        choice = search(job, FakeForecaster(LAW))
        found = explain(job, choice, fakes, lambda other: search(other, FakeForecaster(LAW)))
        assert words in found.verdict
        assert [item.factor for item in found.capacities] == [0.5, 1.0, 2.0]
        assert found.capacities[1].plan == choice.plan
        twice = replace(job, hardware=replace(job.hardware, memory_bytes=2 * job.hardware.memory_bytes))
        assert found.capacities[2].plan == search(twice, FakeForecaster(LAW)).plan


def test_more_memory_can_buy_a_better_choice_of_the_lists() -> None:
    choices = ChoicesSpec(method=(Method.FULL, Method.LORA))
    job = roomy(choices=choices, objective=Objective.MEMORY)
    full = search(job, FakeForecaster(LAW)).plan
    assert full is not None and full.method is Method.FULL
    short = replace(job, hardware=replace(job.hardware, memory_bytes=LAW.peak(full) - 1))
    choice = search(short, FakeForecaster(LAW))
    found = explain(short, choice, fakes, lambda other: search(other, FakeForecaster(LAW)))
    assert "the job gets full at length 64, choice 1 of its lists and not 2" in found.verdict


def test_nothing_fits_half_of_a_device_that_is_just_large_enough() -> None:
    smallest = search(roomy(objective=Objective.MEMORY), FakeForecaster(LAW)).plan
    assert smallest is not None
    job = job_with(LAW.peak(smallest) + 1)
    choice = search(job, FakeForecaster(LAW))
    found = explain(job, choice, fakes, lambda other: search(other, FakeForecaster(LAW)))
    half = found.capacities[0]
    assert half.plan is None and half.position == -1 and "none of" in half.reason
    text = explanation_text(found)
    assert "no plan; none of" in text
    assert max(map(len, text.splitlines())) <= 80
    assert json.loads(json.dumps(explanation_document(found)))["capacities"][0]["plan"] is None
    wide = {
        "engine": "ZeRO 3 + offload -> ZeRO 3 + offload of all",
        "activation_checkpointing": "selective -> offload",
        "optimizer": "paged_adamw_8bit -> adamw_8bit",
    }
    changes = [Change(knob, words, smallest, True, -(421 << 30), 1.61, True) for knob, words in wide.items()]
    lines = explanation_text(replace(found, changes=tuple(changes))).splitlines()
    assert max(map(len, lines)) <= 80 and any("ZeRO 3 + offload of all *" in line for line in lines)


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        (Phase.EVALUATION, "evaluation.batch_size 32"),
        (Phase.GENERATION, "generation.batch_size"),
        (Phase.MERGE, "method.merge"),
    ],
)
def test_a_setting_that_makes_the_peak_is_named(phase: Phase, words: str) -> None:
    job = replace(roomy(), evaluation=EvaluationSpec(enabled=True, batch_size=32))
    choice = search(job, FakeForecaster(LAW))
    estimate = MemoryEstimate(
        (
            PhasePeak(Phase.TRAIN_STEP, 100, {Category.ACTIVATIONS: 100}),
            PhasePeak(phase, 100 + 2**30, {Category.ACTIVATIONS: 100 + 2**30}),
        ),
        {},
        0,
    )
    found = explain(job, choice, fakes, lambda other: search(other, FakeForecaster(LAW)))
    sentence = verdict(job, replace(choice, estimate=estimate), found.capacities)
    assert sentence.startswith("A setting decides the highest moment") and words in sentence
    assert "1.00 GiB more than a training step" in sentence
    resident = {Category.PARAMETERS: 2**29}
    heavy = verdict(
        job, replace(choice, estimate=replace(estimate, resident_bytes=resident)), found.capacities
    )
    assert ("exceed the weights" in heavy) == (phase is Phase.GENERATION)


def test_full_fine_tuning_where_the_lists_allow_adapters_is_a_setting() -> None:
    allowing = ChoicesSpec(method=(Method.FULL, Method.LORA))
    smallest = search(roomy(choices=allowing, objective=Objective.MEMORY), FakeForecaster(LAW)).plan
    assert smallest is not None and smallest.method is Method.FULL
    verdicts = []
    for planner in ({"choices": allowing}, {"pin": PinSpec(method=Method.FULL)}):
        job = roomy(**planner)
        job = replace(job, hardware=replace(job.hardware, memory_bytes=LAW.peak(smallest) + 1))
        choice = search(job, FakeForecaster(LAW))
        assert choice.plan is not None and choice.plan.method is Method.FULL
        found = explain(job, choice, fakes, lambda other: search(other, FakeForecaster(LAW)))
        faster = tuple(
            replace(item, plan=choice.plan, position=0, tokens_per_second=100 * item.factor)
            for item in found.capacities
        )
        verdicts.append(verdict(job, choice, faster, changes=found.changes))
    assert verdicts[0].startswith(
        "A setting takes the memory, full fine-tuning where the job's lists allow lora"
    )
    assert verdicts[1].startswith("Memory is this job's limit")


def of_size(num_bytes: int) -> MemoryEstimate:
    return MemoryEstimate((PhasePeak(Phase.TRAIN_STEP, num_bytes, {Category.INPUTS: num_bytes}),), {}, 0)


def change(knob: str, saved: int, ratio: float, *, changes_result: bool = False) -> Change:
    plan = search(roomy(), FakeForecaster(LAW)).plan
    assert plan is not None
    return Change(knob, "a -> b", plan, changes_result, saved, ratio, True)


@pytest.mark.parametrize(
    ("used", "num_savers", "grade"),
    [
        (80, 2, Grade.COMFORTABLE),
        (85, 2, Grade.COMFORTABLE),
        (90, 2, Grade.TIGHT),
        (95, 2, Grade.SQUEEZED),
        (95, 1, Grade.TIGHT),
    ],
)
def test_the_grade_goes_by_what_is_free_and_by_the_savers(used: int, num_savers: int, grade: Grade) -> None:
    plan = search(roomy(), FakeForecaster(LAW)).plan
    assert plan is not None
    plan = replace(plan, activation_checkpointing=Checkpointing.FULL)
    if num_savers == 2:
        plan = replace(plan, optimizer=Optimizer.ADAMW_8BIT)
    assert len(savers(plan)) == num_savers
    found = squeeze(plan, of_size(used), 100, ())
    assert (found.grade, found.free_bytes) == (grade, 100 - used)
    assert bool(found.advice) is (grade is not Grade.COMFORTABLE)


def test_advice_is_the_cheapest_change_that_is_enough() -> None:
    plan = search(roomy(), FakeForecaster(LAW)).plan
    assert plan is not None
    changes = (
        change("free and fast, too little", 4, 1.0),
        change("enough, slow", 20, 1.3),
        change("enough", 12, 1.1),
        change("enough, another model", 12, 0.9, changes_result=True),
    )
    # 15 of 100 are wanted and 5 are free: 10 are missing
    assert squeeze(plan, of_size(95), 100, changes).advice.startswith(
        "enough a -> b frees 12 B at 1.10 times"
    )
    last = squeeze(plan, of_size(95), 100, changes[3:])
    assert last.advice.endswith("and changes the result")
    assert "no single change frees 10 B" in squeeze(plan, of_size(95), 100, changes[:1]).advice


def test_a_real_job_is_explained_by_the_command(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    write_tiny_model(model)
    words = [
        f"model.path={model}", f"data.path={model / 'train.jsonl'}", "data.format=text", "data.max_length=128",
        "data.packing=true", "training.global_batch_size=2", "hardware=cpu", "action=explain",
    ]  # fmt: skip
    child = subprocess.run(
        [sys.executable, "-m", "launcher.cli", *words, "output=json"],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=600,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    document = json.loads(child.stdout)
    assert document["data_lengths"]["num_examples"] == 60  # they lie here, so they were read
    found = document["explanation"]
    knobs = {item["knob"] for item in found["changes"] if not item["refusal"]}
    assert {"micro_batch_size", "activation_checkpointing", "loss", "max_length", "method", "rank"} <= knobs
    by_words = {(item["knob"], item["change"]): item["saved_bytes"] for item in found["changes"]}
    assert by_words["max_length", "128 -> 64"] > 0 > by_words["max_length", "128 -> 256"]
    assert by_words["method", "lora -> full"] < 0  # gradients and states of all weights
    assert [item["factor"] for item in found["capacities"]] == [0.5, 1.0, 2.0]
    assert found["verdict"].startswith("Memory is not this job's problem")
    assert found["squeeze"]["grade"] == "comfortable"
