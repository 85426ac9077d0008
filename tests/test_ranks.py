"""Plans for several devices: what is predicted for a rank is what a rank takes, and what ranks share gets smaller."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from launcher.domain import Domain
from launcher.errors import ConfigError
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import (
    Checkpointing,
    Engine,
    JobSpec,
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
    Arrangement,
    arrangement_of,
    arrangements,
    default_buckets,
    small_buckets,
    with_ordinary_buckets,
)
from launcher.planner.bounds import buckets_hold_bytes
from launcher.planner.depth import assemble, plan_depths
from launcher.planner.forecast import Forecaster
from launcher.planner.objective import Price, Ranking
from launcher.planner.polynomial import TracedShape
from launcher.planner.reasons import taken
from launcher.planner.replica import Layers, at_full_depth, in_buckets
from launcher.planner.search import search
from launcher.planner.stream import phase_peaks
from launcher.planner.stream_depth import extend_stream
from launcher.planner.subject import subject_of
from launcher.planner.trace_cache import TraceCache
from launcher.planner.tracer import Tracer
from launcher.planner.worlds import TRACED_RANKS, part_share, traced_world
from launcher.report.tables import engine_words
from scripts.accuracy_ranks import (
    ARCHITECTURE,
    GROUP_ELEMENTS,
    ROOT,
    WITHIN,
    RankJob,
    compare,
    job_of,
    jobs,
    page,
    plan_of,
    write_model,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


LAYERWISE: dict[str, Any] = {"reduce_bucket_elements": 73_984, "sub_group_elements": 73_984 // 2}
"""A layer's adapters: 16 x (2 x (256 + 256) + 2 x (256 + 128) + 3 x (256 + 688)), and a rank's half of them."""


def full(engine: Engine, stage: int, num_devices: int = 2) -> Plan:
    return plan_of(engine, stage, Method.FULL, Checkpointing.NONE, 1, 384, 2, num_devices=num_devices)


@pytest.mark.parametrize(
    ("engine", "stage", "method"),
    [
        pytest.param(Engine.DDP, 0, Method.FULL, marks=pytest.mark.thorough),
        pytest.param(Engine.DEEPSPEED, 1, Method.FULL, marks=pytest.mark.thorough),
        pytest.param(Engine.DEEPSPEED, 2, Method.LORA, marks=pytest.mark.thorough),
        (Engine.DEEPSPEED, 3, Method.FULL),
        pytest.param(Engine.DEEPSPEED, 3, Method.LORA, marks=pytest.mark.thorough),
        pytest.param(Engine.FSDP2, 3, Method.FULL, marks=pytest.mark.thorough),
    ],
)
def test_each_rank_takes_what_was_predicted(engine: Engine, stage: int, method: Method, model: Path) -> None:
    """Real processes over gloo, the allocator's peak of each; nothing in common with the tracer."""
    check_ranks(plan_of(engine, stage, method, Checkpointing.NONE, 1, 384, 2), model)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("stage", "method"),
    [(2, Method.FULL), (2, Method.LORA), (3, Method.FULL), (3, Method.LORA)],
)
def test_each_rank_takes_what_was_predicted_with_small_buckets(
    stage: int, method: Method, model: Path
) -> None:
    """Of a CPU's jobs neither overlaps, so that the sizes alone differ; and buckets come after loading."""
    check_ranks(
        small(plan_of(Engine.DEEPSPEED, stage, method, Checkpointing.NONE, 1, 384, 2)), model, loads=False
    )


def small(plan: Plan) -> Plan:
    """The plan with small buckets."""
    return replace(plan, buckets=small_buckets(ARCHITECTURE, plan))


def check_ranks(plan: Plan, model: Path, *, loads: bool = True) -> None:
    """Compares what each rank takes with what was predicted; while loading too, unless that is of no interest."""
    result = compare(RankJob("job", plan), model)
    assert len(result["errors"]) == 2
    for phase in ("train_step", "optimizer_step"):
        assert all(abs(error) <= WITHIN for error in result["phases"][phase]["errors"]), result
    assert all(abs(error) <= WITHIN for error in result["errors"]), result
    saving = result["phases"]["save"]  # rank 0 gathers, and the plan is for the rank that takes most
    assert saving["predicted_bytes"] == pytest.approx(max(saving["measured_bytes"]), rel=WITHIN)
    loading = result["phases"]["load"]
    # what DDP broadcasts first is a copy of all weights, which gloo's threads may release last: unseen by the profiler
    copy_bytes = 4 * num_parameters() if plan.engine is Engine.DDP else 0
    for measured_bytes in loading["measured_bytes"] if loads else ():
        wanted = [loading["predicted_bytes"], loading["predicted_bytes"] + copy_bytes]
        assert any(measured_bytes == pytest.approx(size, rel=WITHIN) for size in wanted), result


def test_a_gpu_that_fsdp2_shares_holds_no_whole_model_while_it_loads_and_saves() -> None:
    """Weights wait in host memory, come and go one at a time: a rank's parts, and twice the largest weight at most."""
    plan = plan_of(Engine.FSDP2, 3, Method.FULL, Checkpointing.NONE, 1, 384, 2)
    job = job_of(plan, Path("nowhere"))
    gpu = HardwareSpec(name="a100_40g", kind=DeviceKind.CUDA, num_devices=2, memory_bytes=40 << 30)
    with Tracer() as tracer:
        estimate = Forecaster(replace(job, hardware=gpu), tracer, TraceCache(None)).estimate(plan, exact=True)
    whole = 4 * num_parameters()
    largest = 4 * ARCHITECTURE["vocab_size"] * ARCHITECTURE["hidden_size"]
    loading, saving = estimate.phase(Phase.LOAD), estimate.phase(Phase.SAVE)
    assert loading is not None and saving is not None and estimate.host is not None
    assert whole / 2 + largest <= loading.allocated_bytes <= whole / 2 + 1.1 * largest
    assert 3 * whole / 2 + largest <= saving.allocated_bytes <= 3 * whole / 2 + 2.1 * largest
    assert estimate.host.by_category_bytes[Category.PARAMETERS] >= whole


def test_the_page_is_that_of_the_newest_data() -> None:
    newest = max((ROOT / "docs" / "accuracy").glob("*-ranks.json"))
    document = json.loads(newest.read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "ranks.md").read_text(encoding="utf-8") == page(document)
    errors = [error for result in document["jobs"] for error in result["errors"]]
    assert len(document["jobs"]) == sum(1 for _ in jobs()) and max(map(abs, errors)) <= WITHIN


def num_parameters() -> int:
    """Parameters of this benchmark's model."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def forecaster() -> Iterator[Forecaster]:
    with Tracer(("deepspeed",)) as tracer:
        plan = full(Engine.DEEPSPEED, 1)
        yield Forecaster(job_of(plan, Path("nowhere")), tracer, TraceCache(None))


@pytest.mark.thorough
def test_more_ranks_share_the_same_states(forecaster: Forecaster) -> None:
    """Stage 1 on twice as many ranks: half the states each, beyond the number of ranks that is traced as well."""
    states = {}
    for ranks in (4, 8, 16, 1024):
        plan = full(Engine.DEEPSPEED, 1, ranks)
        estimate: MemoryEstimate = forecaster.estimate(plan, exact=True)
        states[ranks] = estimate.resident_bytes[Category.OPTIMIZER_STATE]
    assert states[8] == pytest.approx(states[4] / 2, rel=0.01)
    assert states[16] == pytest.approx(states[8] / 2, rel=0.01)
    assert states[1024] == pytest.approx(states[8] / 128, rel=0.05)


@pytest.mark.parametrize(
    ("engine", "stage", "changes"),
    [
        (Engine.DEEPSPEED, 1, {}),
        pytest.param(Engine.DDP, 0, {}, marks=pytest.mark.thorough),
        pytest.param(Engine.DEEPSPEED, 3, {}, marks=pytest.mark.thorough),
        (Engine.DEEPSPEED, 3, {"sub_group_elements": GROUP_ELEMENTS}),
        (Engine.DDP, 0, LAYERWISE),
        pytest.param(Engine.DEEPSPEED, 1, LAYERWISE, marks=pytest.mark.thorough),
        pytest.param(Engine.DEEPSPEED, 2, LAYERWISE, marks=pytest.mark.thorough),
    ],
)
def test_few_layers_tell_of_all_block_by_block(engine: Engine, stage: int, changes: dict[str, Any]) -> None:
    """The woven stream and the skyline have the peaks of a trace of every layer, to the byte."""
    method = Method.LORA if changes is LAYERWISE else Method.FULL
    plan = plan_of(engine, stage, method, Checkpointing.NONE, 1, 384, 2)
    assert plan.buckets is not None
    check_depths(replace(plan, buckets=replace(plan.buckets, **changes)))


@pytest.mark.parametrize(
    ("stage", "method", "mode"),
    [
        (2, Method.FULL, Checkpointing.NONE),
        (3, Method.FULL, Checkpointing.FULL),
        pytest.param(3, Method.LORA, Checkpointing.NONE, marks=pytest.mark.thorough),
    ],
)
def test_few_layers_tell_of_all_with_small_buckets(stage: int, method: Method, mode: Checkpointing) -> None:
    check_depths(small(plan_of(Engine.DEEPSPEED, stage, method, mode, 1, 384, 2)))


def check_depths(plan: Plan) -> None:
    """Compares what few layers tell of all with a trace of all."""
    from launcher.planner import trace

    subject = trace.open_subject(subject_of(job_of(plan, Path("nowhere")), plan))
    shape = TracedShape(1, 64, batch_is_symbol=False, length_is_symbol=False)
    depths = plan_depths(subject.config)
    low, high, whole = (trace.record(subject, shape, depth, 2) for depth in (*depths.depths, 6))
    assert low.stream is not None and high.stream is not None and whole.stream is not None
    woven = extend_stream(low.stream, high.stream, round(depths.steps), 1)
    expected = {peak.phase: peak.allocated_bytes for peak in phase_peaks(whole.stream)}
    assert {peak.phase: peak.allocated_bytes for peak in phase_peaks(woven)} == expected
    skyline = assemble(Domain(1, 1, 64, 64, 1, None), [low, high], depths.steps, 2)
    assert {peak.phase: peak.allocated_bytes for peak in skyline.peaks(1, 64, 2)} == expected


@pytest.mark.thorough
@pytest.mark.parametrize("micro", [1, 4])
def test_few_layers_of_adapters_under_zero_3_have_the_peaks_of_all(micro: int) -> None:
    """Parameters are fetched and released in the order of sets, which must not be another one in each layer."""
    from launcher.planner import trace

    plan = plan_of(Engine.DEEPSPEED, 3, Method.LORA, Checkpointing.FULL, micro, 384, 2)
    assert plan.buckets is not None
    plan = replace(plan, buckets=replace(plan.buckets, **LAYERWISE))
    subject = trace.open_subject(subject_of(job_of(plan, Path("nowhere")), plan))
    shape = TracedShape(micro, 64, batch_is_symbol=False, length_is_symbol=False)
    two, three, four, all_six = (trace.record(subject, shape, depth, 2) for depth in (2, 3, 4, 6))
    domain = Domain(micro, micro, 64, 64, 1, None)
    expected = assemble(domain, [all_six], 0.0, 2).peaks(micro, 64, 2)
    for pair, steps in (((two, three), 4.0), ((three, four), 3.0)):
        assert assemble(domain, list(pair), steps, 2).peaks(micro, 64, 2) == expected


def test_zero_3_updates_a_layer_at_a_time_unless_little_is_trained() -> None:
    """Llama-3.1-8B: 218.1 million elements a layer (2 x 4096 x 128 x (32 + 8) and 3 x 4096 x 14336)."""
    architecture = {
        **ARCHITECTURE,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    layer = 41_943_040 + 176_160_768
    for ranks in (2, 8, 32):
        buckets = default_buckets(architecture, full(Engine.DEEPSPEED, 3, ranks))
        # a group closes with the layer's last parameter, a third of its feed-forward part
        assert layer - 4096 * 14336 < ranks * buckets.sub_group_elements <= layer
    few = plan_of(Engine.DEEPSPEED, 3, Method.LORA, Checkpointing.NONE, 1, 384, 2)
    assert default_buckets(architecture, few).sub_group_elements == 1_000_000_000
    plan = full(Engine.DEEPSPEED, 3, 32)
    plan = replace(plan, buckets=default_buckets(architecture, plan))
    assert plan.buckets is not None
    traced = traced_world(plan)
    assert traced.buckets is not None and traced.world_size == TRACED_RANKS
    assert traced.buckets.sub_group_elements == plan.buckets.sub_group_elements * 32 // TRACED_RANKS


@pytest.mark.parametrize(
    ("targets", "experts"),
    [("all-linear", 0), (["q_proj", "v_proj"], 0), (["down_proj"], 0), (["q_proj", "o_proj"], 4)],
)
def test_a_bucket_holds_a_layers_adapters_to_the_element(targets: str | list[str], experts: int) -> None:
    """As many as PEFT puts into a layer of transformers' model."""
    wide = {**ARCHITECTURE, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 2}
    if experts:
        wide |= {"model_type": "mixtral", "num_local_experts": experts, "num_experts_per_tok": 2}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**wide))
        adapted = get_peft_model(model, LoraConfig(r=64, target_modules=targets, task_type="CAUSAL_LM"))
    trained = [weight.numel() for weight in adapted.parameters() if weight.requires_grad]
    plan = replace(plan_of(Engine.DEEPSPEED, 3, Method.LORA, Checkpointing.NONE, 1, 384, 2), rank=64)
    buckets = default_buckets({**wide, "num_hidden_layers": 2000}, plan, targets)
    assert buckets.reduce_bucket_elements == sum(trained) / 2
    assert buckets.sub_group_elements == sum(trained) / 2 // plan.world_size


def test_zero_3_does_not_hold_the_attention_of_many_layers_of_experts() -> None:
    """DeepSpeed counts none of a leaf's parameters on the way to the next use of others."""
    moe = {**ARCHITECTURE, "model_type": "mixtral", "num_local_experts": 8}
    attention = 2 * 256 * 256 + 2 * 256 * 128
    assert default_buckets(moe, full(Engine.DEEPSPEED, 3)).max_reuse_distance_elements == attention


@pytest.mark.parametrize("cap_bytes", [1, 4_096, 100_000, 1_000_000, 1 << 30])
def test_buckets_of_ddp_are_those_of_torch(cap_bytes: int) -> None:
    """Which tensors share a bucket, by torch's own function."""
    sizes = random.Random(cap_bytes)
    tensors = [
        torch.empty(sizes.randrange(1, 30_000), dtype=sizes.choice((torch.float32, torch.bfloat16)))
        for _ in range(200)
    ]
    by_torch = vars(dist)["_compute_bucket_assignment_by_size"]  # its stubs don't have it
    indices, _ = by_torch(tensors, [cap_bytes])
    numbers = {id(tensor): number for number, tensor in enumerate(tensors)}
    found = [[numbers[id(tensor)] for tensor in bucket] for bucket in in_buckets(tensors, cap_bytes)]
    assert sorted(found) == sorted(indices)


def test_a_model_cut_to_few_layers_still_has_the_names_of_all() -> None:
    """What DDP sends to all ranks, against the model as transformers builds it."""

    def tensors(depth: int) -> list[tuple[str, torch.Tensor]]:
        with torch.device("meta"):
            config = LlamaConfig(**{**ARCHITECTURE, "num_hidden_layers": depth})
            return list(LlamaForCausalLM(config).named_parameters())

    repeated = list(at_full_depth(tensors(3), Layers(3, 6, 0, 1)))
    assert [tensor.shape for _, tensor in repeated] == [tensor.shape for _, tensor in tensors(6)]
    assert [tensor.shape for _, tensor in at_full_depth(tensors(3), Layers(2, 6, 0, 1))] == [
        tensor.shape for _, tensor in tensors(3)
    ], "another list than that of the layers stays as it is"


def test_what_is_certain_before_a_trace_is_never_too_much(forecaster: Forecaster) -> None:
    """Weights and gradients alone, against the traced peak; and the bound that another checkpointing gives."""
    plan = full(Engine.DEEPSPEED, 1)
    bound = forecaster.lower_bound_bytes(plan)
    estimate = forecaster.estimate(plan)
    weights = estimate.resident_bytes[Category.PARAMETERS]
    assert 2 * weights <= bound < estimate.peak_device_bytes, "all weights and all gradients, in fp32"
    assert 2 * weights < forecaster.lower_bound_bytes(plan) <= estimate.peak_device_bytes
    recomputing = replace(plan, activation_checkpointing=Checkpointing.FULL)
    bound = forecaster.lower_bound_bytes(recomputing)
    assert 4 * weights < bound <= forecaster.estimate(recomputing).peak_device_bytes


def test_a_large_world_is_traced_as_a_small_one() -> None:
    plan = replace(full(Engine.DEEPSPEED, 3), num_devices=8, num_nodes=128)
    assert traced_world(plan).world_size == TRACED_RANKS
    assert part_share(plan) == TRACED_RANKS / 1024
    within = replace(full(Engine.FSDP2, 3), num_devices=8, num_nodes=4, shard_within_node=True)
    assert (traced_world(within).num_devices, traced_world(within).num_nodes) == (8, 2)
    assert part_share(within) == 1.0  # nodes repeat what one node holds


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
        (3, Method.FULL, DeviceKind.CPU),
    ],
    ids=["adapters", "full"],
)
def test_small_buckets_are_for_what_ordinary_ones_leave_no_room(
    stage: int, method: Method, kind: DeviceKind
) -> None:
    """A device that is a little too small for a plan, which recomputes nothing with small buckets.

    With all weights trained they save less than the 2 MiB that a GPU's allocator takes at a time.
    """
    pins = PinSpec(
        method=method, zero_stage=stage, offload_optimizer=False, micro_batch_size=1, max_length=2048
    )
    spec = job(2, pins)
    hardware = replace(spec.hardware, kind=kind)
    spec = replace(spec, hardware=hardware, planner=replace(spec.planner, headroom=0.0))
    with Tracer(("deepspeed",)) as tracer:
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
def test_small_buckets_save_what_ordinary_ones_held(stage: int, buffers: int) -> None:
    """On a GPU: stage 2 overlaps with a second one."""
    pins = PinSpec(method=Method.FULL, zero_stage=stage, offload_optimizer=False)
    spec, like = job(2, pins), replace(alone(), max_length=2048)
    plans = [item.applied_to(like, spec) for item in arrangements(spec, like)[0]]
    with Tracer(("deepspeed",)) as tracer:
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


def test_what_an_engine_can_not_carry_out_is_no_option_of_a_search(forecaster: Forecaster) -> None:
    """The 16 MB that the plan without recomputation lacks are no reason to take what TRL refuses."""
    pins = PinSpec(engine=Engine.DEEPSPEED, zero_stage=3, micro_batch_size=1, overlap_exchange=True)
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
    assert fewer.words() == "ZeRO stage 3, optimizer states and parameters offloaded, small buckets"
    with pytest.raises(ConfigError, match=r"offload_optimizer=true is nothing that 8 devices can do"):
        arrangements(job(8, PinSpec(zero_stage=1, offload_optimizer=True)), alone())
    adagrad = replace(alone(), optimizer=Optimizer("paged_adamw_8bit"))
    _, refused = arrangements(job(8, PinSpec(offload_optimizer=True)), adagrad)
    assert len(refused) == 3 and all("CPU Adam in the place" in reason for reason in refused.values())


@pytest.mark.parametrize("stage", [3, pytest.param(2, marks=pytest.mark.thorough)], ids=["all", "optimizer"])
def test_what_is_offloaded_is_on_the_host(stage: int) -> None:
    """DeepSpeed's own code, for a GPU: of every parameter 4 bytes of master weight, 8 of states, 4 of gradient."""
    elements = 6_450_432  # of the architecture, counted by transformers
    pin = PinSpec(zero_stage=stage, offload_optimizer=True, offload_parameters=stage == 3)
    spec = replace(job(8, pin), training=TrainingSpec(global_batch_size=16, precision=Precision.BF16))
    item, _ = arrangements(spec, replace(alone(), precision=Precision.BF16))[0]
    plan = item.applied_to(replace(alone(), precision=Precision.BF16), spec)
    with Tracer(("deepspeed",)) as tracer:
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
    with pytest.raises(ConfigError, match="nothing that 1 devices can do"):
        arrangements(job(1, PinSpec(zero_stage=2)), alone())
