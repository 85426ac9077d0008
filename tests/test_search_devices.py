"""Proves that on several devices, and with offload on one, the search finds the fastest plan that fits, or the smallest.

As in test_search.py a law written by hand plays the traces. What a stage shards is an n-th of it, later stages exchange
more, buckets hold a share of what they can at most, small ones nothing, whose exchange is waited for, and host memory is
slow. Brute force prices every arrangement, checkpointing and micro batch by the law itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import pytest

from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import (
    Checkpointing,
    DataSpec,
    Engine,
    JobSpec,
    Loss,
    Method,
    MethodSpec,
    ModelSpec,
    Objective,
    PinSpec,
    PlannerSpec,
    TrainingSpec,
)
from launcher.memory import Category, HostEstimate, MemoryEstimate, Phase, PhasePeak
from launcher.plan import Plan
from launcher.planner.arrangements import Arrangement, arrangement_of, with_ordinary_buckets
from launcher.planner.bounds import buckets_hold_bytes
from launcher.planner.objective import SAME
from launcher.planner.options import repeats
from launcher.planner.search import search
from launcher.planner.sharding import sharding_words
from launcher.planner.space import semantic_plans
from launcher.step_time import StepTime
from tests.imagined import MODES, FakeForecaster, Law

DEVICES = 4
TOGETHER = (
    Arrangement(Engine.DDP, 0),
    Arrangement(Engine.DEEPSPEED, 1),
    Arrangement(Engine.DEEPSPEED, 2),
    Arrangement(Engine.DEEPSPEED, 3),
    Arrangement(Engine.DEEPSPEED, 2, small_buckets=True),
    Arrangement(Engine.DEEPSPEED, 3, small_buckets=True),
    Arrangement(Engine.DEEPSPEED, 2, offload_optimizer=True),
    Arrangement(Engine.DEEPSPEED, 3, offload_optimizer=True),
    Arrangement(Engine.DEEPSPEED, 3, offload_optimizer=True, offload_parameters=True),
    Arrangement(Engine.DEEPSPEED, 2, offload_optimizer=True, small_buckets=True),
    Arrangement(Engine.DEEPSPEED, 3, offload_optimizer=True, small_buckets=True),
    Arrangement(Engine.DEEPSPEED, 3, offload_optimizer=True, offload_parameters=True, small_buckets=True),
)
ON_HOST = tuple(item for item in TOGETHER if item.offloads)
ALONE = (Arrangement(Engine.NONE, 0), *ON_HOST)
"""One device offloads where that is pinned, or where nothing fits."""
ARCHITECTURE = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 1}
LARGER_BATCH_SEEDS = (99, 336, 496)
"""Jobs in which a later arrangement is faster, with a micro batch that the first one without recomputation can't hold."""


@dataclass(frozen=True)
class ShardedLaw(Law):
    """A law that knows of ranks."""

    exchange_seconds: float = 1e-4
    """Time of one exchange of all gradients."""
    bucket_share: float = 1.0
    """What ordinary buckets hold, of what they can hold at most."""

    def price(self, plan: Plan, *, exact: bool = False) -> MemoryEstimate:
        """A rank's."""
        whole = super().price(plan, exact=exact)
        shares = {
            Category.PARAMETERS: 0.0
            if plan.offload_parameters
            else 1 / plan.world_size ** (plan.zero_stage == 3),
            Category.GRADIENTS: 1 / plan.world_size ** (plan.zero_stage >= 2),
            Category.OPTIMIZER_STATE: 0.0
            if plan.offload_optimizer
            else 1 / plan.world_size ** (plan.zero_stage >= 1),
        }
        held = (
            0 if plan.has_small_buckets else round(self.bucket_share * buckets_hold_bytes(plan, ARCHITECTURE))
        )
        phases = []
        for phase in whole.phases:
            sizes = {
                category: round(size * shares.get(category, 1.0))
                for category, size in phase.by_category_bytes.items()
            }
            sizes[Category.TEMPORARIES] += held
            phases.append(PhasePeak(phase.phase, sum(sizes.values()), sizes))
        gradients = round(whole.resident_bytes[Category.GRADIENTS] * shares[Category.GRADIENTS])
        resident = {Category.GRADIENTS: gradients}
        return replace(whole, phases=tuple(phases), resident_bytes=resident, host=self.host(plan))

    def host(self, plan: Plan) -> HostEstimate:
        """States and parameters that are offloaded, and the batches that wait."""
        sizes = dict.fromkeys(Category, 0) | {
            Category.OPTIMIZER_STATE: 6 * self.parameters // plan.world_size * plan.offload_optimizer,
            Category.PARAMETERS: self.parameters // plan.world_size * plan.offload_parameters,
            Category.INPUTS: 3 * plan.micro_batch_size * plan.max_length,
        }
        return HostEstimate(100, (PhasePeak(Phase.OPTIMIZER_STEP, sum(sizes.values()), sizes),), 0)

    def step(self, plan: Plan, *, without_loss: bool = False) -> StepTime | None:
        """Later arrangements exchange more: ZeRO 2 in every micro batch, ZeRO 3 weights as well; small buckets wait."""
        alone = super().step(plan, without_loss=without_loss)
        if alone is None:
            return None
        exchanges = (1, 1, plan.gradient_accumulation_steps, 2 * plan.gradient_accumulation_steps)
        offloaded = 5 * plan.offload_optimizer + 5 * plan.offload_parameters
        waited = (2 if plan.has_small_buckets else 1) * exchanges[plan.zero_stage]
        update = alone.update_seconds + self.exchange_seconds * (waited + offloaded)
        return replace(alone, update_seconds=update)


class RankForecaster(FakeForecaster):
    """Traces are an arrangement's own."""

    def _regime(self, plan: Plan) -> tuple[object, ...]:
        return (*super()._regime(plan), arrangement_of(plan))


def order_of(job: JobSpec) -> tuple[Arrangement, ...]:
    """What the devices of a job can be arranged to, what comes first first."""
    if job.hardware.world_size > 1:
        return TOGETHER
    return ON_HOST if job.planner.pin.offload_optimizer else ALONE


def job_on_devices(dice: random.Random, devices: int, *, offloads: bool = False) -> JobSpec:
    batch = devices * dice.choice([1, 2, 4, 8, 12])
    return JobSpec(
        model=ModelSpec(architecture=ARCHITECTURE),
        method=MethodSpec(name=Method.FULL),
        data=DataSpec(max_length=dice.choice([16, 64, 200])),
        training=TrainingSpec(global_batch_size=batch),
        hardware=HardwareSpec(
            name="imagined", kind=DeviceKind.CUDA, memory_bytes=1, host_memory_bytes=0, num_devices=devices
        ),
        planner=PlannerSpec(
            pin=PinSpec(offload_optimizer=True if offloads else None),
            headroom=0.0,
            objective=dice.choice([Objective.SPEED, Objective.SPEED, Objective.MEMORY]),
        ),
    )


def law_on_devices(dice: random.Random) -> ShardedLaw:
    return ShardedLaw(
        parameters=dice.choice([3_000, 30_000, 300_000]),
        per_token_kept=dice.choice([300, 900]),
        logits_per_token=dice.choice([10, 400]),
        tile=dice.choice([100, 400, 10**9]),
        context=2_000,
        batch_seconds=dice.choice([1e-6, 1e-4, 1e-3]),
        recompute=dice.choice([(0.0, 0.2, 0.3, 0.4), (0.0, 0.004, 0.008, 0.3), (0.0, 0.9, 0.3, 0.4)]),
        exchange_seconds=dice.choice([1e-7, 1e-4, 1e-2]),
        bucket_share=dice.choice([0.0, 0.4, 1.0]),
        chunked_loss=dice.choice([0.0, 0.05, 0.3]),
        plain_loss=dice.choice([0.0, 0.05, 0.3]),
    )


def all_plans(job: JobSpec, like: Plan) -> Iterator[Plan]:
    """Every loss, arrangement, checkpointing and split of the global batch."""
    per_rank = job.training.global_batch_size // job.hardware.world_size
    for loss, arrangement in product((Loss.CHUNKED, Loss.PLAIN), order_of(job)):
        arranged = arrangement.applied_to(replace(like, loss=loss), job)
        for mode in MODES:
            for micro in (size for size in range(1, per_rank + 1) if per_rank % size == 0):
                yield replace(
                    arranged,
                    activation_checkpointing=mode,
                    micro_batch_size=micro,
                    gradient_accumulation_steps=per_rank // micro,
                )


def sized(dice: random.Random, law: ShardedLaw, job: JobSpec) -> tuple[list[Plan], JobSpec]:
    """All plans of a job, and the job on devices that hold some of them, or none."""
    plans = list(all_plans(job, next(semantic_plans(job))))
    peaks = [law.peak(plan) for plan in plans]
    memory = round(dice.uniform(0.9 * min(peaks), dice.choice([0.1, 0.3, 1.1]) * max(peaks)))
    host_memory = dice.choice([0, 0, 2 * law.parameters, 12 * law.parameters])
    hardware = replace(job.hardware, memory_bytes=memory, host_memory_bytes=host_memory)
    return plans, replace(job, hardware=hardware)


def fits(plan: Plan, job: JobSpec, law: ShardedLaw) -> bool:
    """Whether device and host hold a plan; a host of no bytes is an unknown one."""
    hardware = job.hardware
    is_on_host = not 0 < hardware.host_memory_bytes < law.host(plan).peak_bytes
    return law.peak(plan) <= hardware.memory_bytes and is_on_host


@pytest.mark.parametrize("offloads", [True, False])
def test_the_jobs_of_one_device_reach_every_outcome(offloads: bool) -> None:
    ends = []
    for seed in range(60):
        dice = random.Random(seed)
        law, job = law_on_devices(dice), job_on_devices(dice, 1, offloads=offloads)
        plans, job = sized(dice, law, job)
        fitting = [plan for plan in plans if fits(plan, job, law)]
        on_device = [plan for plan in plans if law.peak(plan) <= job.hardware.memory_bytes]
        waits = bool(fitting) and all(plan.uses_offload for plan in fitting)
        ends.append((bool(fitting), waits, len(on_device) > len(fitting)))
    assert sum(found for found, *_ in ends) >= 20
    assert sum(waits for _, waits, _ in ends) >= 10, "nothing fits without host memory"
    assert sum(not found and is_short for found, _, is_short in ends) >= 3, "the host is too small"


@pytest.mark.parametrize(
    ("seed", "devices", "offloads"),
    [(seed, DEVICES, False) for seed in (*range(60), *LARGER_BATCH_SEEDS)]
    + [(seed, 1, offloads) for offloads in (True, False) for seed in range(60)],
)
def test_no_plan_that_fits_is_faster(seed: int, devices: int, offloads: bool) -> None:
    dice = random.Random(seed)
    law, job = law_on_devices(dice), job_on_devices(dice, devices, offloads=offloads)
    plans, job = sized(dice, law, job)
    fitting = [plan for plan in plans if fits(plan, job, law)]
    memory = job.hardware.memory_bytes
    forecaster = RankForecaster(law)
    choice = search(job, forecaster)
    for arrangement in traced_small(forecaster) if fitting else ():  # else the nearest plan has a trace
        mine = (plan for plan in plans if arrangement_of(plan) == arrangement)
        # of one that accumulates nothing less is known before its trace
        mine = (plan for plan in mine if plan.gradient_accumulation_steps > 1)
        assert any(least_bytes(plan, job, law) <= memory for plan in mine), "no trace of what can't help"
    if not fitting:
        assert choice.plan is None
        return
    taken = choice.plan
    assert taken is not None and law.peak(taken) <= memory
    held = [plan for plan in fitting if not plan.offload_optimizer]
    if job.planner.objective is Objective.MEMORY:
        # one device has no engine to weigh where it fits without
        assert law.peak(taken) == min(map(law.peak, held if held and devices == 1 else fitting))
        return
    assert taken.offload_optimizer is not bool(held)  # host memory is for what doesn't fit without
    if taken.activation_checkpointing is Checkpointing.NONE and not taken.has_small_buckets:
        assert taken.offload_optimizer or not traced_small(forecaster)
    if held:
        # one that recomputes is taken only where its micro batch doesn't fit without, or where recomputing more is faster
        rivals = [plan for plan in rivals_of(held, law) if not recomputes_for_nothing(plan, held)]
        assert law.seconds(taken) <= (1 + SAME) * min(map(law.seconds, rivals))
    like = [plan for plan in fitting if shape_of(plan) == shape_of(taken)]
    order = order_of(job)
    assert all(order.index(arrangement_of(plan)) >= order.index(arrangement_of(taken)) for plan in like)


def traced_small(forecaster: RankForecaster) -> list[Arrangement]:
    """Arrangements with small buckets of which there is a trace that accumulates."""
    found = [
        item for *_, accumulates, item in forecaster.traced if isinstance(item, Arrangement) and accumulates
    ]
    return [item for item in found if item.small_buckets]


def least_bytes(plan: Plan, job: JobSpec, law: ShardedLaw) -> int:
    """What a plan with small buckets needs at least, by what it needs with ordinary ones.

    With plain loss, whose ordinary buckets may have no trace, by a step with the other loss, had that no logits.
    """
    ordinary = with_ordinary_buckets(plan, job)
    assert ordinary is not None
    needed = law.peak(ordinary)
    if plan.loss is Loss.PLAIN:
        step = law.price(replace(ordinary, loss=Loss.CHUNKED)).phases[0]
        needed = step.allocated_bytes - step.by_category_bytes[Category.LOGITS_AND_LOSS] + law.context
    return needed - buckets_hold_bytes(ordinary, ARCHITECTURE)


def rivals_of(fitting: list[Plan], law: ShardedLaw) -> list[Plan]:
    """Plans that the one taken must be as fast as: small buckets are only for what doesn't fit with ordinary ones.

    And where the fastest of these recomputes nothing, they are not weighed at all.
    """
    ordinary = [plan for plan in fitting if not plan.has_small_buckets]
    if ordinary:
        limit = (1 + SAME) * min(map(law.seconds, ordinary))
        fast = [plan for plan in ordinary if law.seconds(plan) <= limit]
        if any(plan.activation_checkpointing is Checkpointing.NONE for plan in fast):
            return ordinary
    return [
        plan
        for plan in fitting
        if not plan.has_small_buckets or not any(repeats(plan, like) for like in ordinary)
    ]


def shape_of(plan: Plan) -> tuple[Loss, Checkpointing, int]:
    return plan.loss, plan.activation_checkpointing, plan.micro_batch_size


def recomputes_for_nothing(plan: Plan, fitting: list[Plan]) -> bool:
    """Whether the same micro batch fits, arranged alike, with nothing recomputed."""
    kept = replace(plan, activation_checkpointing=Checkpointing.NONE)
    return kept != plan and kept in fitting


def sharding_of(
    law: Law, method: Method, stage: int, micro: int = 1, mode: Checkpointing = Checkpointing.NONE
) -> str:
    """What is said of stages above one, on four devices."""
    job = job_on_devices(random.Random(1), DEVICES)
    job = replace(job, method=replace(job.method, name=method, rank=16))
    plan = next(semantic_plans(job))
    plan = replace(plan, micro_batch_size=micro, gradient_accumulation_steps=2, activation_checkpointing=mode)
    engine = Engine.DEEPSPEED if stage else Engine.DDP
    return sharding_words(job, Arrangement(engine, stage).applied_to(plan, job), RankForecaster(law))


def test_stages_that_would_not_help_are_named_with_the_reason() -> None:
    """Adapters have 192,000 bytes of gradients and states beside ten million of frozen weights, sharded last."""
    law = ShardedLaw(parameters=10_000_000, bucket_share=0.0)
    said = sharding_of(law, Method.LORA, 0)
    assert "Stages 1 and 2 would not help: adapters have few gradients and states" in said
    assert "9.54 MiB of parameters (sharded from stage 3 on)" in said
    assert sharding_of(law, Method.LORA, 2).count(" frees ") == 1
    assert "not help" not in sharding_of(law, Method.LORA, 2)
    assert "not help" not in sharding_of(law, Method.FULL, 0)
    bound_by_activations = replace(law, parameters=1_000)
    assert "Stages 1 and 2 and 3 would not help" in sharding_of(
        bound_by_activations, Method.FULL, 0, micro=64
    )
    selective = sharding_of(law, Method.LORA, 0, mode=Checkpointing.SELECTIVE)
    assert "stage 3 can't be with this plan: adapters under ZeRO stage 3 need reentrant" in selective
    assert "Stages 1 and 2 would not help" in selective
    assert sharding_of(law, Method.FULL, 3) == ""
