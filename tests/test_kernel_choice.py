"""Which implementation of optimizer and attention is taken: by laws, and on real traces of every pair."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from launcher.config import load_job
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import (
    Attention,
    Checkpointing,
    JobSpec,
    Method,
    MethodSpec,
    Objective,
    Optimizer,
    PinSpec,
    PlannerSpec,
)
from launcher.knob_limits import knob_limits
from launcher.memory import Category, HostEstimate, MemoryEstimate, Phase, PhasePeak
from launcher.optimisation import IMPLEMENTATIONS, implementations
from launcher.plan import Plan
from launcher.planner.communication import with_paging
from launcher.planner.forecast import Forecaster
from launcher.planner.relief import smallest_change
from launcher.planner.search import search
from launcher.planner.space import optimizers
from launcher.planner.trace_cache import TraceCache
from launcher.planner.tracer import Tracer
from launcher.planning import plan_job, resolve
from launcher.run.cache import cache_folder
from launcher.run.calibrate import device_rates
from launcher.step_time import StepTime
from tests.imagined import FakeForecaster, Law, job_with
from tests.test_search import with_each_loss

GB = 10**9


def paging_job(memory_bytes: int) -> JobSpec:
    job = replace(job_with(memory_bytes, batch=2, length=16), method=MethodSpec(name=Method.FULL))
    return replace(job, training=replace(job.training, optimizer=Optimizer.ADAMW_8BIT))


def test_states_are_paged_only_where_nothing_fits_without() -> None:
    law = Law(parameters=3_000_000)
    plans = with_each_loss(paging_job(1), (Method.FULL, 16, 0))
    resident = min(law.peak(plan) for plan in plans if not plan.uses_pages)
    choice = search(paging_job(resident), FakeForecaster(law))
    assert choice.plan is not None and choice.plan.optimizer is Optimizer.ADAMW_8BIT
    (paged,) = [item for item in choice.rejected if item.plan.uses_pages]
    assert (
        paged.reason
        == "paged_adamw_8bit is for states that don't fit on the device, and these do; not priced"
    )
    choice = search(paging_job(resident - 1), FakeForecaster(law))
    assert choice.plan is not None and choice.plan.optimizer is Optimizer.PAGED_ADAMW_8BIT
    assert "with adamw_8bit the job is short by 1 B or more" in choice.reason
    job = paging_job(10**10)
    choice = search(
        replace(job, planner=replace(job.planner, objective=Objective.MEMORY)), FakeForecaster(law)
    )
    assert choice.plan is not None and choice.plan.uses_pages
    assert "least memory" in choice.reason and "short" not in choice.reason and "because" not in choice.reason


@dataclass
class ResumedForecaster(FakeForecaster):
    """Beside what the law says a resumed run has paged states on the device."""

    law: Law
    more_bytes: int

    def __post_init__(self) -> None:
        super().__init__(self.law)

    def estimate(self, plan: Plan, *, exact: bool = False) -> MemoryEstimate:
        price = self.law.price(plan)
        more = price.peak.allocated_bytes + self.more_bytes
        return replace(
            price, phases=(*price.phases, PhasePeak(Phase.RESUME, more, {Category.PARAMETERS: more}))
        )


def test_a_job_that_fits_but_for_its_resume_is_told_so() -> None:
    law = Law(parameters=3_000_000)
    choice = search(paging_job(1), FakeForecaster(law))
    assert choice.nearest is not None and choice.nearest.plan.uses_pages
    needed = law.price(choice.nearest.plan).peak_device_bytes
    key, plain = "training.save_steps=null", paging_job(1)
    saving = replace(plain, training=replace(plain.training, save_steps=500))
    for job, capacity, more, is_told in (
        (saving, needed, 1, True),
        (saving, needed - 1, 1, False),
        (saving, needed, 0, False),
        (plain, needed, 1, False),
    ):
        found = replace(choice, capacity_bytes=capacity, headroom_bytes=0)
        assert (key in smallest_change(job, found, ResumedForecaster(law, more))) is is_told, (capacity, more)


def test_foreach_and_pages_can_be_pinned() -> None:
    for name in (Optimizer.ADAMW_TORCH, Optimizer.PAGED_LION_8BIT):
        job = job_with(10**10, PlannerSpec(pin=PinSpec(optimizer=name)))
        job = replace(job, training=replace(job.training, optimizer=implementations(name)[0]))
        choice = search(job, FakeForecaster(Law()))
        assert choice.plan is not None and choice.plan.optimizer is name
        assert {item.plan.optimizer for item in choice.rejected} == {name}


def test_a_cpu_has_no_pages() -> None:
    for name, taken in (
        (Optimizer.ADAMW_8BIT, Optimizer.ADAMW_8BIT),
        (
            Optimizer.PAGED_ADAMW_8BIT,
            Optimizer.PAGED_ADAMW_8BIT,
        ),  # what bitsandbytes does there is its own matter
        (Optimizer.ADAMW_TORCH, Optimizer.ADAMW_TORCH_FUSED),
    ):
        job = job_with(1)
        job = replace(
            job,
            hardware=replace(job.hardware, kind=DeviceKind.CPU),
            training=replace(job.training, optimizer=name),
        )
        assert optimizers(job) == (taken,)


# what pages cost


def memory_of(states: int, device: int) -> MemoryEstimate:
    def peak(phase: Phase, **amounts: int) -> PhasePeak:
        parts = {Category(name): amount for name, amount in amounts.items()}
        return PhasePeak(phase, sum(parts.values()), {**dict.fromkeys(Category, 0), **parts})

    host = HostEstimate(0, (peak(Phase.OPTIMIZER_STEP, optimizer_state=states),), 0)
    phases = (peak(Phase.TRAIN_STEP, parameters=device), peak(Phase.SAVE, parameters=9 * device))
    return MemoryEstimate(phases, {}, 1 * GB, host=host)


@pytest.mark.parametrize(("memory", "seconds"), [(31 * GB, 0.0), (31 * GB - 1, 1.0)])
def test_pages_cross_the_link_where_the_states_do_not_fit(memory: int, seconds: float) -> None:
    """By hand: 1 + 20 + 10 GB; or 10 GB in and 10 GB out, at 80 % of 25 GB/s. Saving takes no time of a step."""
    step = StepTime(1.0, 1.0, 0.5, 1, 100, "", False)
    hardware = HardwareSpec(memory_bytes=memory, host_link_bytes_per_second=25.0 * GB)
    found = with_paging(step, hardware, memory_of(10 * GB, 20 * GB))
    assert found.seconds - step.seconds == pytest.approx(seconds)
    assert (
        with_paging(step, replace(hardware, host_link_bytes_per_second=0.0), memory_of(10 * GB, 20 * GB))
        == step
    )


# real traces

MODEL = (
    "recipe=smollm_lora",
    "method=full",
    "training.global_batch_size=4",
    "data.max_length=512",
    "model.architecture.num_hidden_layers=3",
)


@pytest.fixture(scope="module")
def tracer() -> Iterator[Tracer]:
    with Tracer(("bitsandbytes",)) as one:
        yield one


def prices_of(tracer: Tracer, *changes: str) -> tuple[JobSpec, Forecaster, Plan]:
    job = resolve(load_job([*MODEL, *changes]), ())
    rates = device_rates(job.hardware, cache_folder("rates"))
    plan = Plan(
        method=job.method.name,
        rank=0,
        max_length=job.data.length,
        micro_batch_size=2,
        gradient_accumulation_steps=2,
        activation_checkpointing=Checkpointing.NONE,
        attention=Attention.SDPA,
        loss=with_each_loss(job, (Method.FULL, 512, 0))[0].loss,
        optimizer=optimizers(job)[0],
        precision=job.training.precision,
    )
    return job, Forecaster(job, tracer, TraceCache(None), rates=rates), plan


def shapes(plan: Plan) -> list[Plan]:
    return [
        replace(plan, micro_batch_size=micro, gradient_accumulation_steps=4 // micro, max_length=length)
        for micro in (1, 2, 4)
        for length in (128, 512, 2048)
    ]


@pytest.mark.parametrize(
    ("hardware", "packing"),
    [
        ("a100_40g", True),
        pytest.param("t4_16g", False, marks=pytest.mark.thorough),
        pytest.param("a100_40g", False, marks=pytest.mark.thorough),
        pytest.param("t4_16g", True, marks=pytest.mark.thorough),
    ],
)
def test_eager_attention_and_foreach_are_never_better(tracer: Tracer, hardware: str, packing: bool) -> None:
    """So no search has to price them: neither faster nor smaller, at any shape."""
    precision = "bf16" if hardware == "a100_40g" else "fp16_mixed"
    changes = (
        f"hardware={hardware}",
        f"data.packing={str(packing).lower()}",
        f"training.precision={precision}",
    )
    _, prices, plan = prices_of(tracer, *changes)
    for known in shapes(plan):
        for other in (
            replace(known, attention=Attention.EAGER),
            replace(known, optimizer=Optimizer.ADAMW_TORCH),
        ):
            assert prices.estimate(known).peak_device_bytes <= prices.estimate(other).peak_device_bytes, other
            steps = prices.step_time(known), prices.step_time(other)
            assert steps[0] is not None and steps[1] is not None
            assert steps[0].seconds <= steps[1].seconds, other


def test_what_states_on_the_device_say_of_paged_ones_holds(tracer: Tracer) -> None:
    """And the other way round; the difference is the states of the large matrices, on the host to the byte."""
    changes = "hardware=a100_40g", "training.optimizer=adamw_8bit"
    _, truth, plan = prices_of(tracer, *changes)
    resident, paged = (replace(plan, optimizer=name) for name in implementations(plan.optimizer))
    for known, other in ((resident, paged), (paged, resident)):
        _, prices, _ = prices_of(tracer, *changes)
        prices.estimate(known)
        bound, peak = prices.lower_bound_bytes(other), truth.estimate(other).peak_device_bytes
        assert 0.5 * peak < bound <= peak
    held, freed = truth.estimate(paged).host, 0
    for estimate, sign in ((truth.estimate(resident), 1), (truth.estimate(paged), -1)):
        freed += sign * estimate.resident_bytes[Category.OPTIMIZER_STATE]
    assert held is not None and held.state_bytes == freed > 0


def test_a_job_too_large_for_its_states_gets_pages(tracer: Tracer) -> None:
    changes = [*MODEL, "hardware=a100_40g", "training.optimizer=adamw_8bit", "planner.headroom=0.0"]
    _, prices, plan = prices_of(tracer, *changes)
    smallest = replace(plan, micro_batch_size=1, gradient_accumulation_steps=4)
    modes = (Checkpointing.NONE, Checkpointing.SELECTIVE, Checkpointing.FULL)
    peaks = [
        prices.estimate(replace(item, activation_checkpointing=mode)).peak_device_bytes
        for mode in modes
        for item in shapes(smallest)
        if item.max_length == 512
    ]
    job = resolve(load_job([*changes, f"hardware.memory_bytes={min(peaks) - 10**6}"]), ())
    choice = plan_job(job, tracer)
    assert choice.plan is not None and choice.plan.optimizer is Optimizer.PAGED_ADAMW_8BIT
    assert "with adamw_8bit the job is short by" in choice.reason
    assert choice.step is not None and choice.step.communication_seconds > 0


def test_an_optimizer_that_makes_another_update_is_no_implementation() -> None:
    job = load_job(["training.optimizer=lion_8bit", "planner.pin.optimizer=sgd"])
    (found,) = knob_limits(job, HardwareSpec(kind=DeviceKind.CUDA), lambda _: True)
    assert found == (
        "planner.pin.optimizer=sgd makes another update than the job's lion_8bit",
        "planner.pin.optimizer=lion_8bit or paged_lion_8bit, or training.optimizer",
    )


def test_every_paged_optimizer_is_told_from_its_like() -> None:
    paged = [name for name in Optimizer if name.value.startswith("paged_")]
    alone = [name for name in paged if len(implementations(name)) == 1]
    assert alone == [Optimizer.PAGED_ADAMW_32BIT]
    assert all(pair[1] in paged for pair in IMPLEMENTATIONS if "torch" not in pair[0].value)
