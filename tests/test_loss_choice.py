"""The choice of the loss, on real traces: bounds from the other loss hold, and the search finds what all prices say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.config import load_job
from launcher.job import Checkpointing, JobSpec, Loss, Method, Objective
from launcher.planner.forecast import Forecaster
from launcher.planner.objective import NEVER_SLOWER, SAME, Price
from launcher.planner.search import search
from launcher.planner.space import headroom_bytes, losses
from launcher.planner.trace_cache import TraceCache
from launcher.planner.tracer import Tracer
from launcher.planning import resolve
from launcher.run.cache import cache_folder
from launcher.run.calibrate import device_rates
from scripts.speed_check import plans_of

JOBS = {
    "cpu": (
        "recipe=smollm_lora",
        "hardware=cpu",
        "hardware.memory_bytes=8000000000",
        "training.global_batch_size=2",
        "data.max_length=256",
    ),
    "gpu": (
        "recipe=smollm_lora",
        "hardware=l4_24g",
        "training.global_batch_size=4",
        "data.max_length=2048",
        "evaluation.enabled=true",
    ),
}
MODES_TRIED = (Checkpointing.NONE, Checkpointing.FULL)


def job_of(name: str) -> JobSpec:
    return resolve(load_job(JOBS[name]), ())


@pytest.fixture
def tracer() -> Iterator[Tracer]:
    with Tracer() as one:
        yield one


def forecaster(job: JobSpec, tracer: Tracer, kept: Path | None = None) -> Forecaster:
    return Forecaster(job, tracer, TraceCache(kept), rates=device_rates(job.hardware, cache_folder("rates")))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("gpu", Method.LORA),
        *(
            pytest.param(name, method, marks=pytest.mark.thorough)
            for name, method in (("gpu", Method.FULL), ("cpu", Method.LORA), ("cpu", Method.FULL))
        ),
    ],
)
def test_what_one_loss_says_of_the_other_holds(tracer: Tracer, name: str, method: Method) -> None:
    """Of a traced plan with chunked loss follow bounds of peak and time for plain logits, and the other way round."""
    job = job_of(name)
    plans = [
        replace(plan, method=method, rank=0 if method is Method.FULL else plan.rank)
        for plan in plans_of(job)
        if (plan.activation_checkpointing in MODES_TRIED and plan.micro_batch_size == 2) or name == "cpu"
    ]
    truth = forecaster(job, tracer)
    for known in plans:
        if known.micro_batch_size != 2 or known.activation_checkpointing is not Checkpointing.NONE:
            continue
        prices = forecaster(job, tracer)
        prices.estimate(known)
        others = [plan for plan in plans if plan.loss is not known.loss]
        bounds = {plan: prices.lower_bound_bytes(plan) for plan in others}
        floors = {plan: prices.step_floor_seconds(plan) for plan in others}
        alike = replace(known, loss=Loss.PLAIN if known.loss is Loss.CHUNKED else Loss.CHUNKED)
        step = truth.step_time(alike)
        assert step is not None
        assert bounds[alike] > 0.5 * truth.estimate(alike).peak_device_bytes
        assert floors[alike] > 0.5 * step.seconds
        for plan in others:
            step = truth.step_time(plan)
            assert step is not None
            assert bounds[plan] <= truth.estimate(plan).peak_device_bytes, plan
            assert floors[plan] <= step.seconds * (1 + 1e-9), plan


@pytest.mark.parametrize(
    ("objective", "mode"),
    [
        (Objective.SPEED, Checkpointing.NONE),
        pytest.param(Objective.SPEED, None, marks=pytest.mark.thorough),
        pytest.param(Objective.MEMORY, None, marks=pytest.mark.thorough),
    ],
)
def test_the_search_takes_what_all_prices_say(
    tracer: Tracer, objective: Objective, mode: Checkpointing | None, tmp_path: Path
) -> None:
    job = job_of("cpu")
    pin = replace(job.planner.pin, activation_checkpointing=mode)
    job = replace(job, planner=replace(job.planner, objective=objective, headroom=0.05, pin=pin))
    choice = search(job, forecaster(job, tracer, tmp_path))
    prices = forecaster(job, tracer, tmp_path)
    budget = job.hardware.memory_bytes - headroom_bytes(job)
    fitting = [
        price
        for plan in plans_of(job)
        if (price := Price(plan, prices.estimate(plan), prices.step_time(plan))).estimate.peak_device_bytes
        <= budget
    ]
    assert choice.plan == best_of(fitting, objective).plan
    considered = {item.plan for item in choice.rejected} | {choice.plan}
    assert considered == set(plans_of(job))


def best_of(fitting: list[Price], objective: Objective) -> Price:
    """By the rules of docs/design.md."""
    if objective is Objective.MEMORY:
        return min(
            fitting, key=lambda price: (price.estimate.peak_device_bytes, price.plan.loss is Loss.PLAIN)
        )
    shapes = {(p.plan.loss, p.plan.micro_batch_size, p.plan.activation_checkpointing) for p in fitting}
    allowed = [
        price
        for price in fitting
        if not any(
            (price.plan.loss, price.plan.micro_batch_size, mode) in shapes
            for mode in NEVER_SLOWER[price.plan.activation_checkpointing]
        )
    ]
    chunked, plain = ([p for p in allowed if p.plan.loss is loss] for loss in (Loss.CHUNKED, Loss.PLAIN))
    first = fastest(chunked)
    better = [price for price in plain if seconds(price) * (1 + SAME) < seconds(first)]
    return fastest(better) if better else first


def fastest(prices: list[Price]) -> Price:
    limit = (1 + SAME) * min(map(seconds, prices))
    same = [price for price in prices if seconds(price) <= limit]
    return min(same, key=lambda price: price.estimate.peak_device_bytes)


def seconds(price: Price) -> float:
    assert price.step is not None
    return price.step.seconds


def test_a_loss_that_is_pinned_is_the_only_one() -> None:
    pinned = resolve(load_job([*JOBS["cpu"], "planner.pin.loss=chunked"]), ())
    assert losses(pinned) == (Loss.CHUNKED,)
    assert {plan.loss for plan in plans_of(job_of("cpu"))} == {Loss.CHUNKED, Loss.PLAIN}
