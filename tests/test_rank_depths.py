"""Few layers, and few ranks, tell of all, with every engine."""

from __future__ import annotations

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

from launcher.config import load_job
from launcher.domain import Domain
from launcher.hardware import HardwareSpec
from launcher.job import (
    Checkpointing,
    Engine,
    Loss,
    Method,
)
from launcher.memory import Category, MemoryEstimate
from launcher.plan import Plan
from launcher.planner.allocator import AllocatorMode, replay
from launcher.planner.arrangements import Arrangement
from launcher.planner.buckets import default_buckets
from launcher.planner.depth import assemble, plan_depths
from launcher.planner.forecast import Forecaster
from launcher.planner.polynomial import TracedShape
from launcher.planner.replica import Layers, at_full_depth, in_buckets
from launcher.planner.space import semantic_plans
from launcher.planner.stream import Stream, flushes, phase_peaks
from launcher.planner.stream_depth import extend_stream
from launcher.planner.subject import subject_of
from launcher.planner.trace_cache import TraceCache
from launcher.planner.tracer import Tracer
from launcher.planner.worlds import TRACED_RANKS, part_share, traced_world
from launcher.planning import resolve
from launcher.rates import published_rates
from scripts.accuracy_ranks import (
    ARCHITECTURE,
    GROUP_ELEMENTS,
    job_of,
    plan_of,
)
from tests.rank_plans import LAYERWISE, full, open_forecaster, small


@pytest.fixture(scope="module")
def tracer() -> Iterator[Tracer]:
    with Tracer(("deepspeed",)) as opened:
        yield opened


@pytest.fixture(scope="module")
def forecaster(tracer: Tracer) -> Forecaster:
    return open_forecaster(tracer)


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
        pytest.param(3, Method.FULL, Checkpointing.FULL, marks=pytest.mark.thorough),
        pytest.param(3, Method.LORA, Checkpointing.NONE, marks=pytest.mark.thorough),
    ],
)
def test_few_layers_tell_of_all_with_small_buckets(stage: int, method: Method, mode: Checkpointing) -> None:
    check_depths(small(plan_of(Engine.DEEPSPEED, stage, method, mode, 1, 384, 2)))


@pytest.mark.parametrize(
    ("engine", "stage", "num_streams", "flushes_cache"),
    [
        pytest.param(Engine.DDP, 0, 1, False, marks=pytest.mark.thorough),
        pytest.param(Engine.DEEPSPEED, 2, 2, True, marks=pytest.mark.thorough),
        (Engine.DEEPSPEED, 3, 3, True),
        (Engine.FSDP2, 3, 3, False),
    ],
)
def test_engines_on_cards_ask_for_memory_on_streams_of_their_own(
    engine: Engine, stage: int, num_streams: int, flushes_cache: bool
) -> None:
    """DDP's buckets are there before; ZeRO 1 and 2 reduce, ZeRO 3 and FSDP2 gather and reduce (docs/gpu.md)."""
    woven, whole = check_depths(full(engine, stage), load_job(["hardware=h100_80g"]).hardware)
    assert len(set(whole.cuda_streams.tolist())) == num_streams
    assert flushes(whole).any() == flushes_cache
    assert not any("wait_tensor" in name for name in whole.operation_names)  # it gives back its tensor
    assert reserved_bytes(woven) == reserved_bytes(whole)


def reserved_bytes(stream: Stream) -> list[int]:
    """What the allocator holds in each phase at most."""
    peaks = replay(
        stream.sizes_bytes,
        stream.events,
        stream.phases,
        AllocatorMode.EXPANDABLE,
        None,
        stream.cuda_streams,
        flushes(stream),
    )
    return [peak.reserved_bytes for peak in peaks]


def test_a_shell_that_wants_the_cpu_makes_no_ddp_of_deepspeed(tmp_path: Path) -> None:
    """accelerate takes the variable for that; the launcher's own process may have inherited it."""
    from launcher.planner.fake_world import _environment

    plan = full(Engine.DEEPSPEED, 2)
    environment = _environment(job_of(plan, Path("nowhere")), plan, tmp_path)
    assert environment["ACCELERATE_USE_CPU"] == "false"
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"


def check_depths(plan: Plan, hardware: HardwareSpec | None = None) -> tuple[Stream, Stream]:
    """Compares what few layers tell of all with a trace of all; returns the streams of both."""
    from launcher.planner import trace

    job = job_of(plan, Path("nowhere"))
    if hardware is not None:
        job = replace(job, hardware=replace(hardware, num_devices=plan.num_devices))
    subject = trace.open_subject(subject_of(job, plan))
    shape = TracedShape(1, 64, batch_is_symbol=False, length_is_symbol=False)
    depths = plan_depths(subject.config)
    low, high, whole = (trace.record(subject, shape, depth, 2) for depth in (*depths.depths, 6))
    assert low.stream is not None and high.stream is not None and whole.stream is not None
    woven = extend_stream(low.stream, high.stream, round(depths.steps), 1)
    expected = {peak.phase: peak.allocated_bytes for peak in phase_peaks(whole.stream)}
    assert {peak.phase: peak.allocated_bytes for peak in phase_peaks(woven)} == expected
    skyline = assemble(Domain(1, 1, 64, 64, 1, None), [low, high], depths.steps, 2)
    assert {peak.phase: peak.allocated_bytes for peak in skyline.peaks(1, 64, 2)} == expected
    return woven, whole.stream


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


@pytest.mark.parametrize("method", [pytest.param(Method.LORA, marks=pytest.mark.thorough), Method.QLORA])
def test_every_rank_computes_all_of_its_batch_whatever_is_sharded(method: Method) -> None:
    """Products by DeepSpeed's own linear layer count like torch's, those with 4-bit weights too."""
    words = ["recipe=llama_qlora", "hardware=a100_80g", "hardware.num_devices=2", "data.path=rows.jsonl"]
    job = resolve(load_job([*words, f"method.name={method.value}", "data.max_length=256"]), ())
    flops = []
    with Tracer(("deepspeed", "bitsandbytes")) as tracer:
        prices = Forecaster(job, tracer, TraceCache(None))
        for arrangement in (Arrangement(Engine.DDP, 0), Arrangement(Engine.DEEPSPEED, 3)):
            plan = replace(
                arrangement.applied_to(next(semantic_plans(job)), job),
                micro_batch_size=2,
                gradient_accumulation_steps=1,
            )
            quantities, counts = prices.skyline(plan).work.at(2, 256)
            flops.append(float(quantities[:, 0] @ counts))
    assert flops[0] > 0
    assert flops[1] == pytest.approx(flops[0], rel=1e-3)


def test_what_a_trace_under_ddp_says_of_the_time_of_other_engines_holds(tracer: Tracer) -> None:
    """All weights are trained, so what is sharded is updated in parts: the time of that is not in the floor."""
    words = ["recipe=smollm_lora", "method.name=full", "hardware=h100_80g", "hardware.num_devices=2"]
    job = resolve(load_job([*words, "data.max_length=128", "training.global_batch_size=8"]), ())
    rates = published_rates(job.hardware)
    known, truth = (Forecaster(job, tracer, TraceCache(None), rates=rates) for _ in range(2))

    def arranged(engine: Engine, stage: int, loss: Loss) -> Plan:
        plan = Arrangement(engine, stage).applied_to(next(semantic_plans(job)), job)
        return replace(plan, loss=loss, micro_batch_size=2, gradient_accumulation_steps=2)

    known.estimate(arranged(Engine.DDP, 0, Loss.CHUNKED))
    for stage, loss in ((1, Loss.PLAIN), (3, Loss.CHUNKED)):
        plan = arranged(Engine.DEEPSPEED, stage, loss)
        floor, step = known.step_floor_seconds(plan), truth.step_time(plan)
        assert step is not None and 0.4 * step.seconds < floor <= step.seconds, (plan, floor, step)
