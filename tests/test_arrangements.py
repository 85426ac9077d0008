"""How several devices are arranged: engines, stages, buckets, offload, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from launcher.errors import ConfigError
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import (
    Checkpointing,
    Engine,
    JobSpec,
    Loss,
    Method,
    ModelSpec,
    Objective,
    Optimizer,
    PinSpec,
    PlannerSpec,
    Precision,
    TrainingSpec,
)
from launcher.memory import Category, MemoryEstimate, Phase, PhasePeak
from launcher.plan import Plan, Rejection
from launcher.planner.arrangements import (
    TOGETHER,
    Arrangement,
    arrangement_of,
    arrangements,
    short_words,
    with_ordinary_buckets,
)
from launcher.planner.bounds import buckets_hold_bytes
from launcher.planner.forecast import Forecaster
from launcher.planner.objective import Price, Ranking
from launcher.planner.reasons import taken
from launcher.planner.search import search
from launcher.planner.trace_cache import TraceCache
from launcher.planner.tracer import Tracer
from launcher.report.tables import engine_words
from scripts.accuracy_ranks import (
    ARCHITECTURE,
)
from tests.rank_plans import full, open_forecaster, small


@pytest.fixture(scope="module")
def tracer() -> Iterator[Tracer]:
    with Tracer(("deepspeed",)) as opened:
        yield opened


@pytest.fixture(scope="module")
def forecaster(tracer: Tracer) -> Forecaster:
    return open_forecaster(tracer)


def job(num_devices: int, pin: PinSpec | None = None) -> JobSpec:
    return JobSpec(
        model=ModelSpec(architecture=ARCHITECTURE),
        planner=PlannerSpec(pin=pin or PinSpec()),
        hardware=HardwareSpec(name="a", kind=DeviceKind.CUDA, num_devices=num_devices, memory_bytes=1 << 35),
    )


def alone() -> Plan:
    plan = full(Engine.DDP, 0)
    return replace(plan, engine=Engine.NONE, num_devices=1, buckets=None)


def test_several_devices_are_arranged_from_nothing_sharded_to_everything() -> None:
    possible, refused = arrangements(job(8), alone())
    stages = [item.zero_stage for item in possible]
    assert stages == [0, 1, 2, 3, 2, 3, 2, 3, 3, 2, 3, 3]
    assert all((item.engine is Engine.DEEPSPEED) == (item.zero_stage > 0) for item in possible)
    assert [item.offloads for item in possible] == [False] * 6 + [True] * 6
    assert [item.small_buckets for item in possible] == [False] * 4 + [True] * 2 + [False] * 3 + [True] * 3
    assert refused == {}
    (only,), _ = arrangements(job(8, PinSpec(engine=Engine.FSDP2)), alone())
    assert only.applied_to(alone(), job(8)).buckets is not None
    (one,), _ = arrangements(job(1), alone())
    assert one.engine is Engine.NONE


def test_pinned_buckets_are_taken_and_impossible_pins_refused() -> None:
    pins = PinSpec(zero_stage=2, reduce_bucket_elements=1234, offload_optimizer=False)
    (only,), _ = arrangements(job(8, pins), alone())
    buckets = only.applied_to(alone(), job(8, pins)).buckets
    assert buckets is not None and buckets.reduce_bucket_elements == 1234
    assert (
        buckets.allgather_bucket_elements == ARCHITECTURE["hidden_size"] * ARCHITECTURE["intermediate_size"]
    )
    assert buckets.overlap_exchange
    within = PinSpec(shard_within_node=True)
    (only,), _ = arrangements(job(8, within), alone())
    assert only.applied_to(alone(), job(8, within)).shard_within_node
    with pytest.raises(ConfigError, match="shard_within_node=true is nothing"):
        arrangements(job(8, PinSpec(shard_within_node=True, zero_stage=2)), alone())


def test_pinned_sizes_are_not_weighed_small() -> None:
    """But the groups of ZeRO 3's update are no buckets, and a run that goes on has them pinned."""
    pins = PinSpec(zero_stage=3, max_live_elements=5_000, offload_optimizer=False)
    assert arrangements(job(8, pins), alone())[0] == (Arrangement(Engine.DEEPSPEED, 3),)
    pins = PinSpec(zero_stage=3, sub_group_elements=5_000, offload_optimizer=False)
    ordinary, fewer = arrangements(job(8, pins), alone())[0]
    assert not ordinary.small_buckets and fewer.small_buckets
    plan = fewer.applied_to(alone(), job(8, pins))
    assert plan.buckets is not None and plan.buckets.sub_group_elements == 5_000
    assert with_ordinary_buckets(plan, job(8, pins)) == ordinary.applied_to(alone(), job(8, pins))
    pins = replace(pins, overlap_exchange=False, reduce_bucket_elements=1234)
    (only,), _ = arrangements(job(8, pins), alone())
    buckets = only.applied_to(alone(), job(8, pins)).buckets
    assert buckets is not None and not buckets.overlap_exchange and only.small_buckets
    assert (buckets.reduce_bucket_elements, buckets.prefetch_bucket_elements) == (1234, 0)
    with pytest.raises(ConfigError, match="overlap_exchange=false is nothing that 8 devices can do"):
        arrangements(job(8, PinSpec(engine=Engine.DDP, overlap_exchange=False)), alone())


@pytest.mark.parametrize(
    ("stage", "method", "kind"),
    [
        pytest.param(2, Method.LORA, DeviceKind.CUDA, marks=pytest.mark.thorough),
        pytest.param(3, Method.FULL, DeviceKind.CPU, marks=pytest.mark.thorough),
    ],
    ids=["adapters", "full"],
)
def test_small_buckets_are_for_what_ordinary_ones_leave_no_room(
    stage: int, method: Method, kind: DeviceKind, tracer: Tracer
) -> None:
    """A device that is a little too small for a plan, which recomputes nothing with small buckets.

    With all weights trained they save less than the 2 MiB that a GPU's allocator takes at a time.
    """
    pins = PinSpec(
        method=method,
        zero_stage=stage,
        offload_optimizer=False,
        micro_batch_size=1,
        max_length=2048,
        loss=Loss.CHUNKED,
    )
    spec = job(2, pins)
    hardware = replace(spec.hardware, kind=kind)
    spec = replace(spec, hardware=hardware, planner=replace(spec.planner, headroom=0.0))
    forecaster = Forecaster(spec, tracer, TraceCache(None))
    roomy = search(spec, forecaster)
    assert roomy.plan is not None and roomy.estimate is not None
    assert arrangement_of(roomy.plan) == Arrangement(Engine.DEEPSPEED, stage)
    assert not any(item.peak_bytes and item.plan.has_small_buckets for item in roomy.rejected)
    tight = replace(hardware, memory_bytes=roomy.estimate.peak_device_bytes - 1)
    choice = search(replace(spec, hardware=tight), forecaster)
    assert choice.plan is not None and choice.estimate is not None
    assert choice.plan == small(roomy.plan)
    assert "buckets are small, and nothing is exchanged while the device computes" in choice.reason
    assert "with ordinary ones the same plan is short by" in choice.reason
    assert engine_words(choice.plan) == f"ZeRO stage {stage} on 2 devices, small buckets"
    saved = roomy.estimate.peak_allocated_bytes - choice.estimate.peak_allocated_bytes
    assert 0 < saved <= buckets_hold_bytes(roomy.plan, ARCHITECTURE)


@pytest.mark.parametrize(
    ("stage", "buffers"), [pytest.param(2, 2, marks=pytest.mark.thorough), (3, 1)], ids=["two", "one"]
)
def test_small_buckets_save_what_ordinary_ones_held(stage: int, buffers: int, tracer: Tracer) -> None:
    """On a GPU: stage 2 overlaps with a second one."""
    pins = PinSpec(method=Method.FULL, zero_stage=stage, offload_optimizer=False)
    spec, like = job(2, pins), replace(alone(), max_length=2048)
    plans = [item.applied_to(like, spec) for item in arrangements(spec, like)[0]]
    forecaster = Forecaster(spec, tracer, TraceCache(None))
    with_ordinary, with_small = (forecaster.estimate(plan).peak_allocated_bytes for plan in plans)
    ordinary, fewer = plans[0].buckets, plans[1].buckets
    assert ordinary is not None and fewer is not None
    width = 4 if like.precision is Precision.FP32 else 2
    held = width * buffers * (ordinary.reduce_bucket_elements - fewer.reduce_bucket_elements)
    sent = (
        width * ARCHITECTURE["hidden_size"] ** 2
    )  # a gradient that lay in a bucket, and has memory of its own now
    assert held - (with_ordinary - with_small) == pytest.approx(sent, rel=0.05)


def test_what_no_engine_can_carry_out_says_why(forecaster: Forecaster) -> None:
    pins = PinSpec(
        engine=Engine.DEEPSPEED,
        zero_stage=3,
        activation_checkpointing=Checkpointing.SELECTIVE,
        method=Method.LORA,
    )
    with pytest.raises(ConfigError, match="adapters under ZeRO stage 3 need reentrant"):
        search(job(8, pins), forecaster)


@pytest.mark.thorough
def test_what_an_engine_can_not_carry_out_is_no_option_of_a_search(forecaster: Forecaster) -> None:
    """The 16 MB that the plan without recomputation lacks are no reason to take what TRL refuses."""
    pins = PinSpec(
        engine=Engine.DEEPSPEED,
        zero_stage=3,
        micro_batch_size=1,
        overlap_exchange=True,
        loss=Loss.CHUNKED,
    )
    spec = job(2, pins)
    spec = replace(spec, method=replace(spec.method, name=Method.LORA))
    free = search(spec, forecaster)
    assert free.estimate is not None
    tight = free.estimate.peak_device_bytes - (16 << 20)
    spec = replace(
        spec,
        hardware=replace(spec.hardware, memory_bytes=tight),
        planner=replace(spec.planner, headroom=0.0),
    )
    choice = search(spec, forecaster)
    assert choice.plan is not None and choice.plan.activation_checkpointing is Checkpointing.FULL
    (refused,) = (
        item for item in choice.rejected if item.plan.activation_checkpointing is Checkpointing.SELECTIVE
    )
    assert "need reentrant" in refused.reason
    assert choice.num_considered == len(choice.rejected) + 1


def test_the_reason_says_what_those_that_shard_less_lack() -> None:
    def rejected(stage: int, short_by_bytes: int, **changes: Any) -> Rejection:
        engine = Engine.DEEPSPEED if stage else Engine.DDP
        return Rejection(replace(full(engine, stage), **changes), "too large", short_by_bytes, 1)

    peak = PhasePeak(Phase.TRAIN_STEP, 1 << 30, {Category.PARAMETERS: 1 << 30})
    best = Price(full(Engine.DEEPSPEED, 2), MemoryEstimate((peak,), {}, 0), None)
    others = [
        rejected(0, 3 << 30),
        rejected(0, 2 << 30, micro_batch_size=2),
        rejected(1, 1 << 30),
        rejected(0, 1 << 20, activation_checkpointing=Checkpointing.FULL),
        rejected(3, 1 << 20),
    ]
    ranking = Ranking(Objective.SPEED, knows_speed=False)
    words = taken(job(8), best, ranking, 2 << 30, 0, 0, others)
    assert (
        "DDP is short by 2.00 GiB or more; ZeRO stage 1 is short by 1.00 GiB or more; 1.00 GiB remain"
        in words
    )


def test_offload_is_for_gpus_unless_it_is_pinned() -> None:
    on_cpu = job(8)
    on_cpu = replace(on_cpu, hardware=replace(on_cpu.hardware, kind=DeviceKind.CPU))
    assert not any(item.offloads for item in arrangements(on_cpu, alone())[0])
    pinned = replace(on_cpu, planner=PlannerSpec(pin=PinSpec(offload_parameters=True)))
    ordinary, fewer = arrangements(pinned, alone())[0]
    assert ordinary.words() == "ZeRO stage 3, optimizer states and parameters offloaded"
    assert [short_words(item) for item in TOGETHER[:5]] == ["DDP", "ZeRO 1", "ZeRO 2", "ZeRO 3", "FSDP2"]
    assert short_words(ordinary) == "ZeRO 3 + offload of all"
    assert fewer.words() == "ZeRO stage 3, optimizer states and parameters offloaded, small buckets"
    with pytest.raises(ConfigError, match=r"offload_optimizer=true is nothing that 8 devices can do"):
        arrangements(job(8, PinSpec(zero_stage=1, offload_optimizer=True)), alone())
    adagrad = replace(alone(), optimizer=Optimizer("paged_adamw_8bit"))
    _, refused = arrangements(job(8, PinSpec(offload_optimizer=True)), adagrad)
    assert len(refused) == 3 and all("CPU Adam in the place" in reason for reason in refused.values())


@pytest.mark.parametrize("stage", [3, pytest.param(2, marks=pytest.mark.thorough)], ids=["all", "optimizer"])
def test_what_is_offloaded_is_on_the_host(stage: int, tracer: Tracer) -> None:
    """DeepSpeed's own code, for a GPU: of every parameter 4 bytes of master weight, 8 of states, 4 of gradient."""
    elements = 6_450_432  # of the architecture, counted by transformers
    pin = PinSpec(zero_stage=stage, offload_optimizer=True, offload_parameters=stage == 3)
    spec = replace(job(8, pin), training=TrainingSpec(global_batch_size=16, precision=Precision.BF16))
    item, _ = arrangements(spec, replace(alone(), precision=Precision.BF16))[0]
    plan = item.applied_to(replace(alone(), precision=Precision.BF16), spec)
    estimate = Forecaster(spec, tracer, TraceCache(None)).estimate(plan)
    assert estimate.resident_bytes[Category.OPTIMIZER_STATE] == 0
    assert estimate.host is not None
    updating = next(peak for peak in estimate.host.phases if peak.phase is Phase.OPTIMIZER_STEP)
    part = elements / 8
    assert updating.by_category_bytes[Category.OPTIMIZER_STATE] == pytest.approx(12 * part, rel=0.01)
    assert updating.by_category_bytes[Category.GRADIENTS] >= 4 * part
    kept = updating.by_category_bytes[Category.PARAMETERS]
    assert kept == pytest.approx(2 * part, rel=0.05) if stage == 3 else kept == 0
    saving = next(peak for peak in estimate.host.phases if peak.phase is Phase.SAVE)
    assert saving.allocated_bytes >= updating.allocated_bytes + 1.99 * elements, (
        "the whole model is saved from there"
    )
    # what is pinned has powers of two: of stage 3 the gradients of all micro batches
    assert estimate.host.pinned_bytes >= 2 * part


def test_a_pinned_stage_that_no_engine_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing that 1 device can do"):
        arrangements(job(1, PinSpec(zero_stage=2)), alone())
