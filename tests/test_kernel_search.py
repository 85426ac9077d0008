"""Kernels of packages that the machines have: weighed beside torch's, by laws against brute force, and on real traces."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest

from launcher.config import load_job
from launcher.errors import ConfigError
from launcher.job import Attention, JobSpec, Loss, Objective, OptionalKernel, PinSpec, PlannerSpec
from launcher.plan import Plan
from launcher.planner.forecast import Forecaster
from launcher.planner.group import Group, shapeless
from launcher.planner.objective import SAME
from launcher.planner.search import search
from launcher.planner.space import attentions, batch_splits, losses, semantic_plans
from launcher.planner.trace_cache import TraceCache
from launcher.planner.tracer import Tracer
from launcher.planning import plan_job, resolve
from tests.imagined import MODES, FakeForecaster, Law, job_with
from tests.test_search import all_plans, combinations, in_order_of_speed, recomputes_for_nothing

BOTH = tuple(OptionalKernel)
KINDS = tuple(product((Attention.SDPA, Attention.FLASH_ATTENTION_2), (Loss.CHUNKED, Loss.PLAIN, Loss.LIGER)))
SMALL = (
    "recipe=smollm_lora",
    "hardware=h100_80g",
    "data.max_length=256",
    "training.global_batch_size=2",
    "model.architecture.vocab_size=2000",
    "planner.pin.activation_checkpointing=none",
    "planner.pin.micro_batch_size=2",
)
KERNELS = "planner.kernels=[liger,flash_attention_2]"


def random_law(dice: random.Random) -> Law:
    return Law(
        per_token_kept=dice.choice([300, 900]),
        logits_per_token=dice.choice([10, 400]),
        tile=dice.choice([100, 400, 10**9]),
        batch_seconds=dice.choice([1e-6, 1e-4]),
        recompute=dice.choice([(0.0, 0.2, 0.3, 0.4), (0.0, 0.004, 0.008, 0.3)]),
        chunked_loss=dice.choice([0.0, 0.05, 0.3]),
        plain_loss=dice.choice([0.0, 0.05, 0.3]),
        liger_loss=dice.choice([0.0, 0.05, 0.3]),
        flash_time=dice.choice([0.8, 0.995, 1.0, 1.2]),
        flash_bytes=dice.choice([0.7, 1.0, 1.3]),
    )


def random_job(dice: random.Random, law: Law) -> JobSpec:
    kernels = dice.choice([BOTH, BOTH, (OptionalKernel.LIGER,), (OptionalKernel.FLASH_ATTENTION_2,)])
    planner = PlannerSpec(
        headroom=0.0,
        kernels=kernels,
        objective=dice.choice([Objective.SPEED, Objective.SPEED, Objective.MEMORY]),
    )
    job = job_with(1, planner, dice.choice([1, 2, 4, 6, 12, 16]), dice.choice([16, 64, 200]))
    peaks = [law.peak(plan) for _, plans in kinds_of(job) for plan in plans]
    memory = round(dice.uniform(0.98 * min(peaks), dice.choice([0.2, 0.5, 1.05]) * max(peaks)))
    return replace(job, hardware=replace(job.hardware, memory_bytes=memory))


def kinds_of(job: JobSpec) -> list[tuple[tuple[Attention, Loss], list[Plan]]]:
    """All plans with each pair of kernels that the job's machines have, torch's first."""
    has_flash = OptionalKernel.FLASH_ATTENTION_2 in job.planner.kernels
    has_liger = OptionalKernel.LIGER in job.planner.kernels
    (combination,) = combinations(job)
    return [
        (
            (attention, loss),
            [replace(plan, attention=attention, loss=loss) for plan in all_plans(job, combination)],
        )
        for attention, loss in KINDS
        if (has_flash or attention is Attention.SDPA) and (has_liger or loss is not Loss.LIGER)
    ]


def best_by_hand(job: JobSpec, law: Law) -> Plan | None:
    """The best plan with torch's kernels, unless one with others is better beyond doubt."""
    everything = [plan for _, plans in kinds_of(job) for plan in plans]
    fitting = [plan for plan in everything if law.peak(plan) <= job.hardware.memory_bytes]
    if job.planner.objective is Objective.MEMORY:
        return min(fitting, key=law.peak, default=None)
    taken: Plan | None = None
    for _, plans in kinds_of(job):
        of_kind = [plan for plan in plans if plan in fitting]
        of_kind = [plan for plan in of_kind if not recomputes_for_nothing(plan, of_kind)]
        if taken is not None:
            of_kind = [plan for plan in of_kind if (1 + SAME) * law.seconds(plan) < law.seconds(taken)]
        taken = in_order_of_speed(of_kind, law)[0] if of_kind else taken
    return taken


@pytest.mark.parametrize("seed", range(60))
def test_finds_what_trying_every_kernel_finds(seed: int) -> None:
    dice = random.Random(seed)
    law = random_law(dice)
    job = random_job(dice, law)
    forecaster = FakeForecaster(law)
    choice, expected = search(job, forecaster), best_by_hand(job, law)
    assert (choice.plan is None) is (expected is None)
    if expected is None:
        assert choice.nearest is not None
        return
    assert choice.plan is not None
    if job.planner.objective is Objective.MEMORY:
        assert law.peak(choice.plan) == law.peak(expected)
    else:
        assert choice.plan == expected
    assert len(forecaster.traced) < 2 * len(MODES) * 3 * len(kinds_of(job))


def test_the_jobs_reach_every_kernel() -> None:
    taken = set()
    for seed in range(200):
        dice = random.Random(seed)
        law = random_law(dice)
        expected = best_by_hand(random_job(dice, law), law)
        taken.add(None if expected is None else (expected.attention, expected.loss))
    assert taken >= {*KINDS, None}


def test_attention_that_the_model_has_not_is_left_out() -> None:
    forecaster = FakeForecaster(Law(flash_time=0.5))
    forecaster.missing = (Attention.FLASH_ATTENTION_2,)
    choice = search(job_with(10**9, PlannerSpec(headroom=0.0, kernels=BOTH)), forecaster)
    assert choice.plan is not None and choice.plan.attention is Attention.SDPA
    (missing,) = (item for item in choice.rejected if item.plan.attention is Attention.FLASH_ATTENTION_2)
    assert missing.reason.startswith("the model has no flash_attention_2")


def test_a_pin_leaves_one_kernel() -> None:
    job = JobSpec(planner=PlannerSpec(kernels=BOTH))
    assert attentions(job) == (Attention.SDPA, Attention.FLASH_ATTENTION_2)
    assert losses(job) == (Loss.CHUNKED, Loss.PLAIN, Loss.LIGER)
    pinned = replace(
        job, planner=replace(job.planner, pin=PinSpec(attention=Attention.EAGER, loss=Loss.PLAIN))
    )
    assert (attentions(pinned), losses(pinned)) == ((Attention.EAGER,), (Loss.PLAIN,))


# on real traces


@pytest.fixture(scope="module")
def tracer() -> Iterator[Tracer]:
    with Tracer() as one:
        yield one


@pytest.mark.thorough
def test_real_plans_are_weighed_with_each_kernel(tracer: Tracer) -> None:
    seconds = {}
    for attention, loss in KINDS:
        pins = f"planner.pin.attention={attention.value}", f"planner.pin.loss={loss.value}"
        choice = plan_job(resolve(load_job([*SMALL, *pins]), ()), tracer)
        assert choice.step is not None
        seconds[attention, loss] = choice.step.seconds
    expected = KINDS[0]
    for kind in KINDS:
        if (1 + SAME) * seconds[kind] < seconds[expected]:
            expected = kind
    assert len({round(value, 9) for value in seconds.values()}) >= 4, "kernels differ"
    choice = plan_job(resolve(load_job([*SMALL, KERNELS]), ()), tracer)
    assert choice.plan is not None and choice.step is not None
    assert (choice.plan.attention, choice.plan.loss) == expected
    assert choice.step.seconds == pytest.approx(seconds[expected])
    weighed = {(item.plan.attention, item.plan.loss) for item in choice.rejected} | {expected}
    assert weighed == set(KINDS)


def test_figures_of_many_plans_at_once_are_those_of_each(tracer: Tracer) -> None:
    """What the search reads off a skyline for a group of plans, beside what each plan is told for itself."""
    words = [*SMALL[:-2], "training.global_batch_size=48", "planner.pin.engine=none", "planner.headroom=0.0"]
    job = resolve(load_job(words), ())
    forecaster = Forecaster(job, tracer, TraceCache(None))
    first = next(semantic_plans(job))
    groups = [
        Group(shapeless(replace(first, activation_checkpointing=mode, loss=loss)), batch_splits(job))
        for mode in MODES
        for loss in losses(job)
    ]
    for micro, accumulation in ((1, 48), (2, 24), (48, 1)):
        forecaster.estimate(groups[0].plan((micro, accumulation)))
    known = 0
    for group in groups:
        plans = group.plans()
        peaks = [
            forecaster.estimate(plan).peak_device_bytes if forecaster.is_prepared(plan) else None
            for plan in plans
        ]
        known += sum(peak is not None for peak in peaks)
        assert forecaster.known_peaks_bytes(group) == peaks
        bounds = forecaster.lower_bounds_bytes(group)
        assert bounds == [forecaster.lower_bound_bytes(plan) for plan in plans]
        assert all(bound > 0 for bound in bounds)
    assert len(groups[0].splits) // 2 < known < len(groups) * len(groups[0].splits) / 2


def test_a_model_without_ligers_loss_is_planned_with_torchs(tracer: Tracer) -> None:
    gpt2 = (
        "model.architecture={model_type: gpt2, n_embd: 64, n_layer: 2, n_head: 4, vocab_size: 50000, n_positions: 512}",
        "method.name=full",
    )
    words = [word for word in SMALL if "architecture" not in word and "recipe" not in word]
    choice = plan_job(
        resolve(load_job([*words, *gpt2, "planner.kernels=[liger]", "planner.objective=memory"]), ()), tracer
    )
    assert choice.plan is not None and choice.plan.loss is not Loss.LIGER
    (refused,) = (item for item in choice.rejected if item.plan.loss is Loss.LIGER)
    assert "liger-kernel has no fused loss for gpt2" in refused.reason


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("hardware=cpu", "planner.kernels=[liger]"),
            "planner.kernels=\\[liger\\]: Liger's loss is a Triton kernel",
        ),
        (("hardware=t4_16g", "planner.kernels=[flash_attention_2]"), "t4_16g has no FlashAttention-2"),
        (("planner.kernels=[xformers]",), "planner.kernels"),
    ],
)
def test_kernels_that_the_machines_cannot_have_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        resolve(load_job(["recipe=smollm_lora", "training.precision=fp32", *words]), ())
    assert "planner.pin." not in refused.value.hint
