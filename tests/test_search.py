"""Proves that the search finds what trying every plan would find, and says something true of every other plan.

Traces are played by laws written by hand. Memory is affine in batch x length on either side of the loss tile, with
gradients that only accumulating plans hold beside activations. Time has a part per token and a part per micro batch,
may have a best batch in the middle, and grows with what is recomputed. Brute force prices every plan by the laws
themselves; the search may only use the interface of `Forecaster`, whose traces are counted.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import product

import pytest

from launcher.errors import ConfigError, UnsupportedByPlanner
from launcher.job import (
    Attention,
    Checkpointing,
    ChoicesSpec,
    Grade,
    JobSpec,
    Loss,
    Method,
    MethodSpec,
    Objective,
    Optimizer,
    PinSpec,
    PlannerSpec,
)
from launcher.memory import MemoryEstimate
from launcher.plan import Plan, PlanChoice, nearest
from launcher.planner.group import Group, shapeless
from launcher.planner.interval import CONVENTION
from launcher.planner.objective import SAME
from launcher.planner.reasons import NOT_PRICED
from launcher.planner.refusal import judge
from launcher.planner.rejections import WRITTEN_OUT, Rejections
from launcher.planner.search import search
from launcher.planner.space import headroom_bytes
from launcher.units import format_bytes
from tests.imagined import MODES, FakeForecaster, Law, job_with

KEPT, RECOMPUTED = Checkpointing.NONE, Checkpointing.FULL
SEEDS = range(30)


# brute force


def combinations(job: JobSpec) -> list[tuple[Method, int, int]]:
    """Acceptable (method, length, rank), best first."""
    pin, choices = job.planner.pin, job.planner.choices
    methods = [pin.method] if pin.method else list(choices.method) or [job.method.name]
    lengths = [pin.max_length] if pin.max_length else list(choices.max_length) or [job.data.length]
    ranks = [pin.rank] if pin.rank else list(choices.rank) or [job.method.rank]
    triples = [(m, n, r if m is Method.LORA else 0) for m, n, r in product(methods, lengths, ranks)]
    return list(dict.fromkeys(triples))


def all_plans(job: JobSpec, combination: tuple[Method, int, int]) -> list[Plan]:
    """Every legal plan of a combination: nothing recomputed first, and the largest micro batch first."""
    pin, total = job.planner.pin, job.training.global_batch_size
    method, length, rank = combination
    return [
        Plan(
            method=method,
            rank=rank,
            max_length=length,
            micro_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            activation_checkpointing=mode,
            attention=pin.attention or Attention.SDPA,
            loss=pin.loss or Loss.CHUNKED,
            optimizer=optimizers_of(job)[0],
            precision=job.training.precision,
        )
        for mode in MODES
        for micro in range(total, 0, -1)
        for accumulation in range(1, total + 1)
        if micro * accumulation == total
        and pin.activation_checkpointing in (None, mode)
        and (
            pin.activation_checkpointing
            or pin.attention is not Attention.EAGER
            or mode is not Checkpointing.SELECTIVE
        )
        and pin.micro_batch_size in (None, micro)
        and pin.gradient_accumulation_steps in (None, accumulation)
    ]


def optimizers_of(job: JobSpec) -> tuple[Optimizer, ...]:
    """What makes the update of a job's optimizer, states on the device first; of torch's AdamW the fused one alone."""
    pin, own = job.planner.pin.optimizer, job.training.optimizer
    if pin:
        return (pin,)
    if own is Optimizer.ADAMW_TORCH:
        return (Optimizer.ADAMW_TORCH_FUSED,)
    name = own.value.removeprefix("paged_")
    return tuple(item for item in Optimizer if item.value in (name, f"paged_{name}"))


def with_each_loss(job: JobSpec, combination: tuple[Method, int, int]) -> list[Plan]:
    """Those with both losses and every optimizer, of equals the one that works on tiles first, and has no pages."""
    losses = (job.planner.pin.loss,) if job.planner.pin.loss else (Loss.CHUNKED, Loss.PLAIN)
    return [
        replace(plan, loss=loss, optimizer=optimizer)
        for optimizer in optimizers_of(job)
        for plan in all_plans(job, combination)
        for loss in losses
    ]


def budget_of(job: JobSpec) -> int:
    return job.hardware.memory_bytes - headroom_bytes(job)


@dataclass(frozen=True)
class Truth:
    """What trying every plan finds."""

    best: list[Plan]
    """The plans that fit, of the first combination that has any, best first."""
    visited: list[Plan]
    """All plans of the combinations up to that one."""


def brute_force(job: JobSpec, law: Law) -> Truth:
    visited: list[Plan] = []
    for combination in combinations(job):
        plans = with_each_loss(job, combination)
        visited += plans
        fitting = [plan for plan in plans if law.peak(plan) <= budget_of(job)]
        fitting = [plan for plan in fitting if not is_refused(job, plan, law)]
        if job.planner.objective is Objective.MEMORY:
            fitting.sort(key=lambda plan: (law.peak(plan), plans.index(plan)))
        else:
            resident = [plan for plan in fitting if plan.optimizer is optimizers_of(job)[0]]
            if resident:
                fitting = resident
                visited = [
                    plan for plan in visited if plan.optimizer is optimizers_of(job)[0] or plan not in plans
                ]
            fitting = [plan for plan in fitting if not recomputes_for_nothing(plan, fitting)]
            if law.knows_speed:
                fitting = in_order_of_speed(fitting, law)
                faster = [plan for plan in fitting if is_worth_its_loss(plan, fitting, law)]
                fitting = [*faster, *(plan for plan in fitting if plan not in faster)]
        if fitting:
            if not any(plan.optimizer is not fitting[0].optimizer for plan in visited if plan in plans):
                # one plan stands for those with pages, which nobody has to look at
                visited += [replace(fitting[0], optimizer=item) for item in optimizers_of(job)[1:]]
            return Truth(fitting, visited)
    return Truth([], visited)


def is_worth_its_loss(plan: Plan, fitting: list[Plan], law: Law) -> bool:
    """Whether a plan's loss is the first choice and no other is faster beyond doubt, or is that itself."""
    first = [other for other in fitting if other.loss is Loss.CHUNKED]
    if not first:
        return True
    best = in_order_of_speed(first, law)[0]
    is_faster = any(
        (1 + SAME) * law.seconds(other) < law.seconds(best) for other in fitting if other not in first
    )
    if plan.loss is Loss.CHUNKED:
        return not is_faster
    return (1 + SAME) * law.seconds(plan) < law.seconds(best)


def is_refused(job: JobSpec, plan: Plan, law: Law) -> bool:
    """Whether a plan that fits has a grade that the job refuses, by the shares that docs/design.md names."""
    free = 1 - law.peak(plan) / job.hardware.memory_bytes
    savers = (
        (plan.activation_checkpointing is not KEPT)
        + (plan.micro_batch_size == 1 and plan.gradient_accumulation_steps > 1)
        + ("8bit" in plan.optimizer.value or "paged" in plan.optimizer.value)
    )
    if Grade.TIGHT in job.planner.refused_grades:
        return free < 0.15
    return Grade.SQUEEZED in job.planner.refused_grades and free < 0.06 and savers >= 2


def recomputes_for_nothing(plan: Plan, fitting: list[Plan]) -> bool:
    """Whether the same micro batch fits with less recomputation that is never slower: with none, or not offloaded."""
    less = [
        mode for mode in (KEPT, RECOMPUTED) if MODES.index(mode) < MODES.index(plan.activation_checkpointing)
    ]
    if plan.activation_checkpointing is not Checkpointing.OFFLOAD:
        less = [mode for mode in less if mode is KEPT]
    return any(replace(plan, activation_checkpointing=mode) in fitting for mode in less)


def in_order_of_speed(plans: list[Plan], law: Law) -> list[Plan]:
    """Always the next: of those as fast as the fastest left, the one with the lowest peak."""
    left, ordered = list(plans), []
    while left:
        limit = (1 + SAME) * min(law.seconds(plan) for plan in left)
        same = [plan for plan in left if law.seconds(plan) <= limit]
        ordered.append(min(same, key=law.peak))
        left.remove(ordered[-1])
    return ordered


# the jobs


def random_job(seed: int, law: Law) -> JobSpec:
    """A job whose memory lies somewhere between too small for all plans and roomy for all."""
    dice = random.Random(seed)
    batch = dice.choice([1, 2, 4, 6, 12, 16, 32])
    divisors = [n for n in range(1, batch + 1) if batch % n == 0]

    def maybe(chance: float, value: int) -> int | None:
        return value if dice.random() < chance else None

    pin = PinSpec(
        micro_batch_size=maybe(0.15, dice.choice(divisors)),
        activation_checkpointing=dice.choice([None, None, None, KEPT, RECOMPUTED]),
        max_length=maybe(0.15, dice.choice([16, 48])),
        attention=dice.choice([None, Attention.EAGER]),
        loss=dice.choice([None, None, None, Loss.CHUNKED, Loss.PLAIN]),
    )
    if pin.micro_batch_size is None:
        pin = replace(pin, gradient_accumulation_steps=maybe(0.15, dice.choice(divisors)))
    choices = ChoicesSpec(
        method=dice.choice([(), (Method.FULL,), (Method.FULL, Method.LORA), (Method.LORA, Method.FULL)]),
        max_length=dice.choice([(), (128, 64, 32), (96, 24, 96)]),
        rank=dice.choice([(), (64, 16, 8)]),
    )
    headroom: float = dice.choice([0.0, 0.1, 0.3])
    planner = PlannerSpec(
        pin=pin,
        choices=choices,
        headroom=dice.choice(["auto", headroom]),
        objective=dice.choice([Objective.SPEED, Objective.COST, Objective.MEMORY]),
    )
    job = job_with(1, planner, batch)
    optimizer = dice.choice([*Optimizer][:2] * 3 + [*Optimizer][2:9])
    job = replace(job, training=replace(job.training, optimizer=optimizer))
    peaks = [law.peak(plan) for combination in combinations(job) for plan in with_each_loss(job, combination)]
    memory = round(dice.uniform(0.75 * min(peaks), 1.1 * max(peaks)))
    return replace(job, hardware=replace(job.hardware, memory_bytes=memory))


def random_law(seed: int) -> Law:
    dice = random.Random(f"law {seed}")
    return Law(
        parameters=dice.choice([30_000, 300_000, 3_000_000]),
        per_rank=dice.choice([100, 2_000]),
        per_token_kept=dice.choice([300, 900]),
        logits_per_token=dice.choice([10, 400]),
        tile=dice.choice([100, 400, 10**9]),
        batch_seconds=dice.choice([1e-6, 1e-5, 1e-3]),
        cache_tokens=dice.choice([150, 10**9, 10**9]),
        recompute=dice.choice([(0.0, 0.2, 0.3, 0.4), (0.0, 0.004, 0.008, 0.3), (0.0, 0.9, 0.3, 0.4)]),
        knows_speed=dice.random() > 0.2,
        chunked_loss=dice.choice([0.0, 0.05, 0.3]),
        plain_loss=dice.choice([0.0, 0.05, 0.3]),
    )


def check_everything_said(job: JobSpec, law: Law, choice: PlanChoice, truth: Truth) -> None:
    """Every visited plan is the choice or rejected once; every figure is true."""
    said = [item.plan for item in choice.rejected] + ([choice.plan] if choice.plan else [])
    assert len(said) == len(set(said))
    assert set(said) == set(truth.visited)
    assert choice.num_considered == len(truth.visited)
    for item in choice.rejected:
        short = law.peak(item.plan) - budget_of(job)
        assert item.reason
        if item.short_by_bytes > 0:
            assert short > 0
            assert item.peak_bytes == item.short_by_bytes + budget_of(job)
            is_bound = "needs at least" in item.reason or "needs more than" in item.reason
            assert item.short_by_bytes <= short if is_bound else item.short_by_bytes == short
        elif NOT_PRICED in item.reason:
            assert item.peak_bytes == 0
        else:
            assert short <= 0
            assert item.peak_bytes in (0, law.peak(item.plan))
    shorts = [item.short_by_bytes for item in choice.rejected if not item.is_unexplored]
    assert shorts == sorted(shorts)


@pytest.mark.parametrize("seed", SEEDS)
def test_finds_what_trying_every_plan_finds(seed: int) -> None:
    law = random_law(seed)
    job = random_job(seed, law)
    forecaster = FakeForecaster(law)
    choice, truth = search(job, forecaster), brute_force(job, law)
    assert choice.plan == (truth.best[0] if truth.best else None)
    assert choice.runner_up in (None, *truth.best[1:])
    check_everything_said(job, law, choice, truth)
    assert choice.capacity_bytes == job.hardware.memory_bytes
    assert choice.headroom_bytes == headroom_bytes(job)
    if choice.plan:
        assert choice.estimate == law.price(choice.plan, exact=True)
        assert choice.plan in forecaster.traced_exactly
    else:
        nearest = min(truth.visited, key=law.peak)
        assert choice.estimate is choice.runner_up_estimate is None
        assert choice.rejected[0].short_by_bytes == law.peak(nearest) - budget_of(job)
        assert law.peak(choice.rejected[0].plan) == law.peak(nearest)
        assert f"micro batch {choice.rejected[0].plan.micro_batch_size}" in choice.reason
    if choice.runner_up:  # read off the skyline of its regime
        assert choice.runner_up_estimate == law.price(choice.runner_up)
        assert choice.runner_up not in forecaster.traced_exactly
    for found, step in ((choice.plan, choice.step), (choice.runner_up, choice.runner_up_step)):
        assert step == (law.step(found) if found else None)


def test_the_random_jobs_reach_every_outcome() -> None:
    truths = []
    for seed in SEEDS:
        law = random_law(seed)
        truths.append((job := random_job(seed, law), law, brute_force(job, law)))
    assert sum(not truth.best for _, _, truth in truths) >= 3
    assert sum(len(truth.best) == 1 for _, _, truth in truths) >= 2
    assert sum(len(truth.best) >= 2 for _, _, truth in truths) >= 8
    assert (
        sum(bool(truth.best) and truth.best[0].activation_checkpointing is not KEPT for _, _, truth in truths)
        >= 3
    )
    assert sum(job.planner.objective is Objective.MEMORY for job, _, _ in truths) >= 5
    assert (
        sum(len(truth.visited) > len(with_each_loss(job, combinations(job)[0])) for job, _, truth in truths)
        >= 5
    )


def test_many_more_jobs_agree_too() -> None:
    for seed in range(1000, 1300):
        law = random_law(seed)
        job = random_job(seed, law)
        choice, truth = search(job, FakeForecaster(law)), brute_force(job, law)
        assert choice.plan == (truth.best[0] if truth.best else None), seed
        assert choice.runner_up in (None, *truth.best[1:]), seed
        check_everything_said(job, law, choice, truth)


def pinnable_plans(job: JobSpec, combination: tuple[Method, int, int]) -> list[Plan]:
    """Every plan of a combination that a job may pin: all splits, checkpointing and losses of torch, each optimizer."""
    pin, own = job.planner.pin, job.training.optimizer
    name = own.value.removeprefix("paged_")
    same = [item for item in Optimizer if item.value in (name, f"paged_{name}")]
    if own in (Optimizer.ADAMW_TORCH, Optimizer.ADAMW_TORCH_FUSED):
        same = [Optimizer.ADAMW_TORCH, Optimizer.ADAMW_TORCH_FUSED]
    kernels = [pin.attention] if pin.attention else [Attention.SDPA, Attention.EAGER]
    return [
        replace(plan, loss=loss, optimizer=optimizer, attention=attention)
        for plan in all_plans(job, combination)
        for loss in ([pin.loss] if pin.loss else [Loss.CHUNKED, Loss.PLAIN])
        for optimizer in ([pin.optimizer] if pin.optimizer else same)
        for attention in kernels
        if attention is not Attention.EAGER or plan.activation_checkpointing is not Checkpointing.SELECTIVE
    ]


@pytest.mark.parametrize("seed", range(30))
def test_nothing_that_fits_is_better_by_the_objective_alone(seed: int) -> None:
    """A brute force that knows no rule of the search: what fits, and what counts.

    The tolerance: 1 % for another loss, and 1 % within which the smaller plan is taken.
    """
    law = random_law(seed)
    job = random_job(seed, law)
    for combination in combinations(job):
        fitting = [plan for plan in pinnable_plans(job, combination) if law.peak(plan) <= budget_of(job)]
        if fitting:
            break
    choice = search(job, FakeForecaster(law))
    if not fitting:
        assert choice.plan is None
        return
    assert choice.plan is not None
    assert choice.plan in fitting
    if job.planner.objective is Objective.MEMORY:
        assert law.peak(choice.plan) == min(law.peak(plan) for plan in fitting)
    elif law.knows_speed:
        assert law.seconds(choice.plan) <= (1 + SAME) ** 2 * min(law.seconds(plan) for plan in fitting)


@pytest.mark.parametrize("refused", [(Grade.SQUEEZED,), (Grade.TIGHT,), (Grade.TIGHT, Grade.SQUEEZED)])
def test_refused_grades_leave_what_trying_every_plan_leaves(refused: tuple[Grade, ...]) -> None:
    differing = 0
    for seed in range(2000, 2200):
        law = random_law(seed)
        job = random_job(seed, law)
        job = replace(job, planner=replace(job.planner, headroom=0.0, refused_grades=refused))
        choice, truth = search(job, FakeForecaster(law), judge(job, ())), brute_force(job, law)
        assert choice.plan == (truth.best[0] if truth.best else None), seed
        differing += choice.plan != search(job, FakeForecaster(law)).plan
        for item in choice.rejected:
            if item.is_refused:
                assert is_refused(job, item.plan, law) and law.peak(item.plan) <= budget_of(job)
                enough = law.peak(item.plan) - item.short_by_bytes
                share = 0.15 if Grade.TIGHT in refused else 0.06
                assert 1 - enough / job.hardware.memory_bytes == pytest.approx(share, abs=1e-5)
        if not truth.best and any(item.is_refused for item in choice.rejected):
            assert "which planner.refused_grades refuses" in choice.reason
    assert differing >= 3


# what the rules are for


def test_not_accumulating_can_fit_where_the_smallest_micro_batch_does_not() -> None:
    """Full fine-tuning: gradients of a first micro batch weigh more than the activations of the whole batch."""
    law = Law(parameters=3_000_000, per_token_kept=112_500, per_token_recomputed=112_500, logits_per_token=0)
    job = replace(job_with(1, batch=2, length=16), method=MethodSpec(name=Method.FULL))
    whole, halves = all_plans(job, (Method.FULL, 16, 0))[:2]
    tight = replace(job, hardware=replace(job.hardware, memory_bytes=law.peak(whole)))
    assert (whole.gradient_accumulation_steps, halves.gradient_accumulation_steps) == (1, 2)
    assert law.peak(halves) > law.peak(whole)
    choice = search(tight, FakeForecaster(law))
    assert choice.plan == whole
    check_everything_said(tight, law, choice, brute_force(tight, law))


def test_of_many_rejections_each_is_written_out_when_it_is_looked_at() -> None:
    """Which changes nothing of them: the same job, of fewer than are kept as numbers."""
    law = Law()
    lengths = tuple(4096 - 16 * place for place in range(11))
    planner = PlannerSpec(headroom=0.0, choices=ChoicesSpec(max_length=lengths))
    job = job_with(500_000, planner, batch=840)
    choice = search(job, FakeForecaster(law))
    assert isinstance(choice.rejected, Rejections)
    assert len(choice.rejected) == choice.num_considered == len(lengths) * 2 * 4 * 32 > WRITTEN_OUT
    items = list(choice.rejected)
    assert len({item.plan for item in items}) == len(items)
    assert choice.nearest == nearest(items) == items[0]
    assert choice.rejected[5:9] == tuple(items[5:9]) and choice.rejected[-1] == items[-1]
    keys = [(item.is_unexplored, item.short_by_bytes) for item in items]
    assert keys == sorted(keys)
    for item in items[::29]:
        is_bound = "needs at least" in item.reason or "needs more than" in item.reason
        short = law.peak(item.plan) - budget_of(job)
        assert 0 < item.short_by_bytes <= short if is_bound else item.short_by_bytes == short
        assert format_bytes(item.short_by_bytes) in item.reason


def test_many_figures_at_once_are_those_of_each_plan() -> None:
    """The imagined forecaster answers for a group as for each of its plans."""
    for seed in range(20):
        law = random_law(seed)
        job = random_job(seed, law)
        forecaster = FakeForecaster(law)
        search(job, forecaster)
        plans = with_each_loss(job, combinations(job)[0])
        for like in {shapeless(plan) for plan in plans}:
            splits = dict.fromkeys(
                (plan.micro_batch_size, plan.gradient_accumulation_steps) for plan in plans
            )
            group = Group(like, tuple(sorted(splits)))
            assert forecaster.lower_bounds_bytes(group) == [
                forecaster.lower_bound_bytes(plan) for plan in group.plans()
            ]
            assert forecaster.known_peaks_bytes(group) == [
                law.price(plan).peak_device_bytes if forecaster.is_prepared(plan) else None
                for plan in group.plans()
            ]


def test_a_hopeless_job_takes_few_traces() -> None:
    law = Law(parameters=10**8)
    forecaster = FakeForecaster(law)
    choice = search(job_with(1_000_000, batch=64), forecaster)
    assert not choice.feasible
    assert choice.num_considered == 2 * 28
    assert forecaster.traced_exactly == []
    assert len(forecaster.traced) <= 12


def test_a_roomy_job_takes_few_traces() -> None:
    forecaster = FakeForecaster(Law(tile=10**9))
    choice = search(job_with(10**10, batch=64), forecaster)
    assert choice.plan is not None and choice.plan.micro_batch_size == 64
    assert choice.plan.activation_checkpointing is KEPT
    assert {mode for _, _, mode, *_ in forecaster.traced} == {KEPT}
    assert len(forecaster.traced) == 3
    assert forecaster.traced_exactly == [choice.plan]


def test_a_plan_that_fits_only_on_the_skyline_is_rejected() -> None:
    """The true shape decides, and what was slower than the plans that then fail is looked at after all."""
    job = job_with(1, PlannerSpec(headroom=0.0, pin=PinSpec(attention=Attention.EAGER)), batch=4)
    kept = [plan for plan in all_plans(job, (Method.LORA, 64, 16)) if plan.activation_checkpointing is KEPT]
    recomputed = [plan for plan in all_plans(job, (Method.LORA, 64, 16)) if plan not in kept]
    law = Law(surplus=20_000, per_token_recomputed=1, knows_speed=False)
    skyline = replace(law, surplus=0)
    memory = skyline.peak(kept[1])
    job = replace(job, hardware=replace(job.hardware, memory_bytes=memory))
    assert law.peak(kept[1]) > memory >= law.peak(kept[2])
    assert law.peak(recomputed[0]) <= memory
    choice = search(job, FakeForecaster(law))
    assert choice.plan == kept[2] == brute_force(job, law).best[0]
    only_second_mode = replace(
        job, planner=replace(job.planner, headroom=1 - law.peak(recomputed[0]) / memory)
    )
    late = search(only_second_mode, FakeForecaster(law))
    assert late.plan == brute_force(only_second_mode, law).best[0]


class Unfollowed(FakeForecaster):
    """Can't follow one checkpointing at the true shape, as where engines gather in what is recomputed."""

    def __init__(self, law: Law, mode: Checkpointing) -> None:
        super().__init__(law)
        self.mode = mode

    def estimate(self, plan: Plan, *, exact: bool = False) -> MemoryEstimate:
        if exact and plan.activation_checkpointing is self.mode:
            raise UnsupportedByPlanner("the tracer can't follow it", "another one")
        return super().estimate(plan, exact=exact)


def test_a_mode_that_can_not_be_traced_at_its_true_shape_makes_room_for_the_next() -> None:
    job = job_with(1, batch=4)
    kept, selective, full, _ = (
        [plan for plan in all_plans(job, (Method.LORA, 64, 16)) if plan.activation_checkpointing is mode]
        for mode in MODES
    )
    law = Law()
    memory = max(law.peak(plan) for plan in (*selective, *full))
    memory = min(memory, min(law.peak(plan) for plan in kept) - 1)
    job = replace(job, hardware=replace(job.hardware, memory_bytes=memory))
    assert search(job, FakeForecaster(law)).plan in selective
    choice = search(job, Unfollowed(law, Checkpointing.SELECTIVE))
    fitting = [plan for plan in full if law.peak(plan) <= memory]
    assert fitting and choice.plan == min(fitting, key=law.seconds)
    reasons = {item.plan: item.reason for item in choice.rejected}
    assert any("can't follow" in reasons[plan] for plan in selective if plan in reasons)
    with pytest.raises(UnsupportedByPlanner):
        search(job_with(10**12), Unfollowed(law, Checkpointing.NONE))


def test_every_reason_names_figures_or_the_plan_taken() -> None:
    law = Law()
    job = job_with(law.peak(all_plans(job_with(1), (Method.LORA, 64, 16))[1]))
    choice = search(job, FakeForecaster(law))
    reasons = {item.plan.micro_batch_size: item.reason for item in choice.rejected if item.short_by_bytes}
    assert "over the budget" in reasons[8]
    slower = [item.reason for item in choice.rejected if not item.short_by_bytes]
    assert any("recomputes" in reason for reason in slower)
    assert any("per step, not" in reason for reason in slower)
    assert any(reason.startswith("the runner-up") for reason in slower)
    assert "no plan that fits is more than 1% faster" in choice.reason
    assert "nothing is recomputed" in choice.reason
    rules = search(job, FakeForecaster(replace(law, knows_speed=False)))
    assert "micro batch 4 is the largest that fits" in rules.reason


def test_least_memory_is_never_called_slower() -> None:
    job = job_with(10**10, PlannerSpec(objective=Objective.MEMORY))
    choice = search(job, FakeForecaster(Law()))
    assert "it needs the least memory" in choice.reason
    assert choice.rejected and not any("slower" in item.reason for item in choice.rejected)


def test_the_jobs_order_decides_and_the_choice_says_which_was_taken() -> None:
    law = Law()
    planner = PlannerSpec(
        choices=ChoicesSpec(method=(Method.FULL, Method.LORA), max_length=(64, 32), rank=(64, 16)),
        headroom=0.0,
    )
    job = job_with(1, planner)
    small = min(law.peak(plan) for plan in all_plans(job, (Method.LORA, 64, 16)))
    choice = search(replace(job, hardware=replace(job.hardware, memory_bytes=small)), FakeForecaster(law))
    assert choice.plan is not None
    assert (choice.plan.method, choice.plan.max_length, choice.plan.rank) == (Method.LORA, 64, 16)
    assert choice.reason.startswith("choice 4 of the job's ordered lists")
    assert "2 less wanted combinations were not priced" in choice.reason


def test_headroom() -> None:
    assert headroom_bytes(job_with(1000, PlannerSpec(headroom="auto"))) == round(1000 * CONVENTION)
    assert headroom_bytes(job_with(1000, PlannerSpec(headroom=0.25))) == 250
    assert headroom_bytes(job_with(1000, PlannerSpec(headroom=0.0))) == 0


@pytest.mark.parametrize(
    "pin",
    [
        PinSpec(micro_batch_size=3),
        PinSpec(gradient_accumulation_steps=5),
        PinSpec(micro_batch_size=4, gradient_accumulation_steps=4),
        PinSpec(micro_batch_size=16),
    ],
)
def test_pins_that_do_not_make_the_global_batch_contradict(pin: PinSpec) -> None:
    with pytest.raises(ConfigError, match=r"can't make training\.global_batch_size=8") as caught:
        search(job_with(10**9, PlannerSpec(pin=pin)), FakeForecaster(Law()))
    assert "the product must be 8" in caught.value.hint


@pytest.mark.parametrize("pin", [PinSpec(rank=8, method=Method.FULL), PinSpec(rank=8)])
def test_a_pinned_rank_contradicts_full_fine_tuning(pin: PinSpec) -> None:
    job = replace(job_with(10**9, PlannerSpec(pin=pin)), method=MethodSpec(name=Method.FULL))
    with pytest.raises(ConfigError, match=r"planner\.pin\.rank=8 is a LoRA rank"):
        search(job, FakeForecaster(Law()))


def test_a_pin_beats_the_choices() -> None:
    planner = PlannerSpec(
        pin=PinSpec(max_length=24, rank=2), choices=ChoicesSpec(max_length=(64,), rank=(16,))
    )
    choice = search(job_with(10**9, planner), FakeForecaster(Law()))
    assert choice.plan is not None
    assert (choice.plan.max_length, choice.plan.rank) == (24, 2)
