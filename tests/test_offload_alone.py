"""Offload on a single device, on real traces: bounds from the trace without an engine, and the search's answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.config import load_job
from launcher.errors import LaunchError
from launcher.hardware import DeviceKind
from launcher.job import Checkpointing, Engine, JobSpec, Loss
from launcher.plan import Plan
from launcher.planner.arrangements import Arrangement, arrangement_of, arrangements, rounds
from launcher.planner.forecast import Forecaster
from launcher.planner.relief import smallest_change
from launcher.planner.space import semantic_plans
from launcher.planner.trace_cache import TraceCache
from launcher.planner.tracer import Tracer
from launcher.planning import needed_libraries, plan_job, resolve
from launcher.rates import published_rates
from launcher.run.launch import require_compiler

WORDS = (
    "recipe=smollm_lora",
    "method.name=full",
    "hardware=a100_40g",
    "data.max_length=256",
    "training.global_batch_size=4",
    "model.architecture.vocab_size=2000",
)
ALONE = Arrangement(Engine.NONE, 0)


OFFLOADED = "planner.pin.offload_optimizer=true"


def job_of(*changes: str) -> JobSpec:
    return resolve(load_job([*WORDS, *changes]), ())


@pytest.fixture(scope="module")
def tracer() -> Iterator[Tracer]:
    with Tracer(("deepspeed",)) as one:
        yield one


def plan_of(arrangement: Arrangement, **changes: Any) -> Plan:
    job = job_of()
    plan = arrangement.applied_to(next(semantic_plans(job)), job)
    return replace(plan, micro_batch_size=2, gradient_accumulation_steps=2, **changes)


def forecaster(tracer: Tracer) -> Forecaster:
    job = job_of()
    return Forecaster(job, tracer, TraceCache(None), rates=published_rates(job.hardware))


@pytest.mark.parametrize(
    "place", [0, *(pytest.param(place, marks=pytest.mark.thorough) for place in range(1, 6))]
)
def test_what_the_trace_without_an_engine_says_holds(tracer: Tracer, place: int) -> None:
    """Peak, time, and host memory of an arrangement that offloads."""
    known, truth = forecaster(tracer), forecaster(tracer)
    known.estimate(plan_of(ALONE))
    assert arrangements(job_of(), plan_of(ALONE)) == ((ALONE,), {})
    possible, refused = arrangements(job_of(OFFLOADED), plan_of(ALONE))
    assert not refused and len(possible) == 6 and rounds(job_of()) == ((ALONE,), possible)
    arrangement = possible[place]
    plan = plan_of(arrangement)
    bound, floor = known.lower_bound_bytes(plan), known.step_floor_seconds(plan)
    on_host = known.host_floor_bytes(plan)
    estimate, step = truth.estimate(plan), truth.step_time(plan)
    assert estimate.host is not None and step is not None
    assert 0.3 * estimate.peak_device_bytes < bound <= estimate.peak_device_bytes, arrangement
    assert 0.1 * step.seconds < floor <= step.seconds, arrangement
    assert 0 < on_host <= estimate.host.peak_bytes - estimate.host.process_bytes, arrangement
    assert step.communication_seconds > 0


def test_offload_needs_a_compiler_before_anything_is_loaded(tmp_path: Path) -> None:
    plan, gpu = plan_of(Arrangement(Engine.DEEPSPEED, 2, offload_optimizer=True)), DeviceKind.CUDA
    compiler = tmp_path / "my c++"
    compiler.touch(0o755)
    with pytest.raises(LaunchError, match="no C\\+\\+ compiler `c\\+\\+`"):
        require_compiler(plan, gpu, {"PATH": str(tmp_path)})
    with pytest.raises(LaunchError, match="clang"):
        require_compiler(plan, gpu, {"PATH": str(tmp_path), "CXX": "clang++"})
    require_compiler(plan, gpu, {"PATH": str(tmp_path), "CXX": "my c++"})
    require_compiler(plan, DeviceKind.CPU, {"PATH": str(tmp_path)})
    require_compiler(plan_of(ALONE), gpu, {"PATH": str(tmp_path)})


@pytest.mark.thorough
def test_what_lies_on_the_host_is_the_same_whatever_is_recomputed(tracer: Tracer) -> None:
    truth, lasting = forecaster(tracer), set()
    for mode in (Checkpointing.NONE, Checkpointing.FULL, Checkpointing.OFFLOAD):
        for loss in (Loss.CHUNKED, Loss.PLAIN):
            arrangement = Arrangement(Engine.DEEPSPEED, 3, offload_optimizer=True)
            host = truth.estimate(plan_of(arrangement, activation_checkpointing=mode, loss=loss)).host
            assert host is not None
            lasting.add(host.lasting_bytes())
    assert max(lasting) - min(lasting) <= 1e-4 * max(lasting)


def test_states_are_offloaded_where_nothing_fits_else(tracer: Tracer) -> None:
    pins = (
        "planner.pin.micro_batch_size=2",
        "planner.pin.activation_checkpointing=full",
        "planner.pin.loss=chunked",
    )
    offloading = Arrangement(Engine.DEEPSPEED, 2, offload_optimizer=True)
    peaks = [
        forecaster(tracer)
        .estimate(plan_of(item, activation_checkpointing=Checkpointing.FULL))
        .peak_device_bytes
        for item in (ALONE, offloading)
    ]
    assert peaks[1] < peaks[0]
    ample = job_of(f"hardware.memory_bytes={peaks[0] * 102 // 100}", "planner.headroom=0.0", *pins)
    choice = plan_job(ample, tracer)
    assert choice.plan is not None and arrangement_of(choice.plan) == ALONE
    words = f"hardware.memory_bytes={sum(peaks) // 2}", "planner.headroom=0.0", *pins
    assert "deepspeed" not in needed_libraries(job_of(*words))
    with Tracer() as bare:  # it has no DeepSpeed at first
        choice = plan_job(job_of(*words), bare)
    assert choice.plan is not None and arrangement_of(choice.plan) == offloading
    assert "one device is short by" in choice.reason
    assert any("C++ compiler" in note for note in choice.notes)
    pinned = plan_job(job_of(*words, OFFLOADED), tracer)
    assert pinned.plan == choice.plan and pinned.estimate == choice.estimate
    without = job_of(*words, "planner.pin.offload_optimizer=false")
    choice = plan_job(without, tracer)
    assert choice.plan is None and choice.nearest is not None
    assert choice.nearest.short_by_bytes == peaks[0] - sum(peaks) // 2
    too_small = job_of(*words, OFFLOADED, "hardware.host_memory_bytes=1300000000")
    choice = plan_job(too_small, tracer)
    assert choice.plan is None and choice.nearest is not None and choice.nearest.is_host_short
    assert "of host memory" in choice.reason and "more host memory" in smallest_change(
        too_small, choice, forecaster(tracer)
    )
    free = job_of(*words, "hardware.host_memory_bytes=1300000000")
    choice = plan_job(free, tracer)
    assert choice.plan is None and choice.nearest is not None
    assert arrangement_of(choice.nearest.plan) == ALONE
    assert "or more of host memory beyond what there is" in smallest_change(free, choice, forecaster(tracer))
