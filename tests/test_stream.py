"""Streams: what is read off them by hand, who made their blocks, and two shallow ones against the full depth."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from launcher.domain import Domain
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import (
    Attention,
    Checkpointing,
    DataSpec,
    JobSpec,
    Loss,
    Method,
    ModelSpec,
    Optimizer,
    Precision,
    TrainingSpec,
)
from launcher.memory import Category, Phase
from launcher.plan import Plan
from launcher.planner import depth, forecast, rehearsal, trace
from launcher.planner.attribution import Attribution
from launcher.planner.depth import DepthMismatch, assemble, plan_depths
from launcher.planner.fast_fake import FastFakeTensorMode
from launcher.planner.forecast import Forecaster
from launcher.planner.polynomial import TracedShape
from launcher.planner.skyline import Profile
from launcher.planner.stream import (
    CATEGORIES,
    PHASES,
    Stream,
    blocks_alive,
    bytes_by_category,
    highest_event,
    in_order_of_births,
    live_bytes,
    live_bytes_by_category,
    next_highest_event,
    phase_peaks,
    top_modules,
    with_waiting_inputs,
)
from launcher.planner.stream_depth import extend_stream
from launcher.planner.tape import Tape
from launcher.planner.trace_cache import TraceCache
from launcher.planner.tracer import Subject, SubjectFacts, Tracer, facts_of, record
from scripts.skyline_check import Setting, build_subject


def same(left: Stream, right: Stream) -> bool:
    """Whether two streams are equal, event for event and name for name."""
    return all(np.array_equal(getattr(left, item.name), getattr(right, item.name)) for item in fields(Stream))


def made_stream(
    events: Sequence[int],
    sizes_bytes: Sequence[int],
    *,
    modules: Sequence[str] = (),
    operations: Sequence[str] = (),
    categories: Sequence[Category] = (),
    phases: Sequence[Phase] = (),
) -> Stream:
    """A stream made by hand; what is left out is the same everywhere."""
    count = len(sizes_bytes)
    paths, names = list(modules) or [""] * count, list(operations) or ["make"] * count
    module_names, operation_names = tuple(sorted(set(paths))), tuple(sorted(set(names)))
    chosen = list(categories) or [Category.TEMPORARIES] * count
    moments = list(phases) or [Phase.TRAIN_STEP] * len(events)
    return Stream(
        sizes_bytes=np.array(sizes_bytes, dtype=np.int64),
        categories=np.array([CATEGORIES.index(category) for category in chosen], dtype=np.int8),
        modules=np.array([module_names.index(path) for path in paths], dtype=np.int32),
        module_names=module_names,
        operations=np.array([operation_names.index(name) for name in names], dtype=np.int32),
        operation_names=operation_names,
        events=np.array(events, dtype=np.int64),
        phases=np.array([PHASES.index(phase) for phase in moments], dtype=np.int8),
        cuda_streams=np.zeros(count, dtype=np.int8),
    )


# what is read off a stream

WORKED = made_stream(
    [1, 2, 3, -2, 4, -3, -4],
    [100, 50, 30, 60],
    modules=["embed", "layers.0", "layers.0", ""],
    categories=[Category.PARAMETERS, Category.ACTIVATIONS, Category.TEMPORARIES, Category.TEMPORARIES],
    phases=[Phase.LOAD, *[Phase.TRAIN_STEP] * 3, *[Phase.OPTIMIZER_STEP] * 3],
)


def test_live_bytes_are_births_less_releases() -> None:
    assert live_bytes(WORKED).tolist() == [100, 150, 180, 130, 190, 160, 100]
    by_category = live_bytes_by_category(WORKED)
    assert by_category.sum(axis=1).tolist() == live_bytes(WORKED).tolist()
    assert by_category[2, CATEGORIES.index(Category.ACTIVATIONS)] == 50


def test_each_phase_has_its_highest_birth() -> None:
    peaks = {peak.phase: peak for peak in phase_peaks(WORKED)}
    assert {phase: peak.allocated_bytes for phase, peak in peaks.items()} == {
        Phase.LOAD: 100,
        Phase.TRAIN_STEP: 180,
        Phase.OPTIMIZER_STEP: 190,
    }
    assert peaks[Phase.TRAIN_STEP].by_category_bytes[Category.TEMPORARIES] == 30


def test_what_is_alive_at_the_highest_moment_and_whose_it_is() -> None:
    peak = highest_event(WORKED)
    assert (peak, blocks_alive(WORKED, peak).tolist()) == (4, [0, 2, 3])
    assert bytes_by_category(WORKED, peak)[Category.TEMPORARIES] == 90
    shares = [(share.module, share.num_bytes, share.num_blocks) for share in top_modules(WORKED, peak, 2)]
    assert shares == [("embed", 100, 1), ("", 60, 1)]


def hills(heights: Sequence[int], makers: Sequence[str]) -> Stream:
    """Memory that goes up to each height, and down to nothing after it."""
    events = [sign * number for number in range(1, len(heights) + 1) for sign in (1, -1)]
    return made_stream(events, heights, modules=makers)


def test_the_next_highest_moment_is_another_hill() -> None:
    stream = hills([50, 90, 100, 70], ["layers.0.mlp", "layers.0.mlp", "layers.1.mlp", "layers.1.attention"])
    assert next_highest_event(stream, 20) == 6, "the mlp of another layer is the peak again"
    assert next_highest_event(stream, 71) is None
    beside = made_stream([1, 2, -2, 3, -3, -1], [60, 40, 38], modules=["a", "b", "c"])
    assert next_highest_event(beside, 39) is None, "no valley is so deep"
    assert next_highest_event(beside, 30) == 3


def test_releases_between_two_births_have_one_order() -> None:
    phases = np.zeros(7, dtype=np.int8)
    phases[5:] = 1
    ordered, _ = in_order_of_births(np.array([1, 2, 3, -3, -1, -2, 4]), phases)
    assert ordered.tolist() == [1, 2, 3, -1, -3, -2, 4], "but they stay in their phase"


def test_a_stream_that_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError, match="births"):
        made_stream([2, 1], [8, 8])
    with pytest.raises(ValueError, match="phases"):
        replace(WORKED, phases=WORKED.phases[1:])


def test_inputs_that_wait_live_as_long_as_those_of_the_last_micro_batch() -> None:
    kinds = [Category.INPUTS, Category.TEMPORARIES, Category.INPUTS, *[Category.TEMPORARIES] * 2]
    stream = made_stream([1, 2, 3, 4, -2, -4, 5, -1, -3, -5], [8, 1, 8, 5, 6], categories=kinds)
    longer = with_waiting_inputs(stream, 3)
    assert longer.sizes_bytes.tolist() == [8, 1, 8, 8, 8, 8, 5, 6]
    assert longer.events.tolist() == [1, 2, 3, 4, 5, 6, 7, -2, -7, 8, -1, -3, -4, -5, -6, -8]
    assert same(with_waiting_inputs(stream, 0), stream)


# who makes what


def makers(model: nn.Module, work: Callable[[], object]) -> list[tuple[str, str]]:
    """Operation and module of every block that some work on fake tensors makes."""
    fake = FastFakeTensorMode()
    attribution = Attribution(model)
    tape = Tape(TracedShape(1, 1, False, False), fake=fake, locate=attribution.path)
    with fake, tape:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(parameter.shape))
        born = len(tape.events)
        work()
    return [(e.block.operation.split(".")[1], e.block.module) for e in tape.events[born:] if e.birth]


def perceptron() -> nn.Module:
    with torch.device("meta"):
        inner = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid())
        return nn.Sequential(inner, nn.Linear(16, 4, bias=False))


def test_forward_and_backward_are_assigned_to_the_same_modules() -> None:
    model = perceptron()
    found = makers(model, lambda: model(torch.empty(3, 8)).square().sum().backward())
    outside = [pair for pair in found if pair[1] == ""]
    inside = [pair for pair in found if pair[1]]
    assert {name for name, _ in outside} >= {"empty", "pow", "sum", "ones_like"}
    assert inside[:3] == [("addmm", "0.0"), ("sigmoid", "0.1"), ("mm", "1")]
    backward = [("mm", "1"), ("mm", "1"), ("sigmoid_backward", "0.1"), ("mm", "0.0"), ("sum", "0.0")]
    assert inside[3:] == backward


def test_recomputation_is_assigned_as_forward_is() -> None:
    model = perceptron()

    def work() -> None:
        entry = torch.empty(3, 8, requires_grad=True)
        checkpoint(model, entry, use_reentrant=False).sum().backward()

    found = [pair for pair in makers(model, work) if pair[0] in ("addmm", "sigmoid", "sigmoid_backward")]
    forward = [("addmm", "0.0"), ("sigmoid", "0.1")]
    assert found == [*forward, *forward, ("sigmoid_backward", "0.1")]


def test_a_model_itself_has_the_name_of_its_class() -> None:
    class Doubled(nn.Module):
        def forward(self, entry: torch.Tensor) -> torch.Tensor:
            return entry * 2

    model = Doubled()
    assert makers(model, lambda: model(torch.empty(3))) == [("empty", ""), ("mul", "Doubled")]


# two shallow traces against the full depth

FULL_DEPTH = [
    ("llama", Setting("cuda", "lora", "full", "chunked", packing=True), 2, 300, 1),
    ("llama", Setting("cuda", "full", "none", "plain", packing=False), 2, 150, 2),
    ("qwen2", Setting("cuda", "full", "none", "chunked", packing=True), 1, 100, 1),
    ("gpt2", Setting("cuda", "full", "none", "chunked", packing=True, precision="bf16_mixed"), 3, 90, 2),
    ("gpt_oss", Setting("cpu", "lora", "none", "chunked", packing=False, precision="fp32"), 1, 200, 1),
    ("gemma3_text", Setting("cpu", "full", "full", "plain", packing=True, evaluation=True), 2, 600, 1),
    ("qwen3_moe", Setting("cuda", "lora", "full", "chunked", packing=True), 1, 200, 2),
]


def traced(subject: trace.TraceSubject, depth: int, batch: int, length: int, accumulation: int) -> Profile:
    shape = TracedShape(batch, length, batch_is_symbol=False, length_is_symbol=False)
    return trace.record(subject, shape, depth, accumulation)


def stream_of(profile: Profile) -> Stream:
    assert profile.stream is not None
    return profile.stream


@pytest.mark.parametrize(("name", "setting", "batch", "length", "accumulation"), FULL_DEPTH)
def test_an_extended_stream_is_that_of_the_full_depth(
    name: str, setting: Setting, batch: int, length: int, accumulation: int
) -> None:
    subject = build_subject(name, setting)
    plan = plan_depths(subject.config)
    shallow, deep = (traced(subject, depth, batch, length, accumulation) for depth in plan.depths)
    whole = traced(subject, subject.config.num_hidden_layers, batch, length, accumulation)
    period = plan.depths[1] - plan.depths[0]
    extended = extend_stream(stream_of(shallow), stream_of(deep), round(plan.steps), period)
    assert same(extended, stream_of(whole))
    domain = Domain(batch, batch, length, length, 1, None)
    skyline = assemble(domain, [shallow, deep], plan.steps, accumulation)
    assert phase_peaks(extended) == skyline.peaks(batch, length, accumulation)


def test_residents_belong_to_the_modules_that_have_the_parameters() -> None:
    stream = stream_of(traced(build_subject("llama", FULL_DEPTH[0][1]), 2, 1, 40, 1))

    def bytes_of(category: Category) -> dict[str, int]:
        sums: Counter[str] = Counter()
        for block in np.flatnonzero(stream.categories == CATEGORIES.index(category)):
            sums[stream.module_names[stream.modules[block]]] += int(stream.sizes_bytes[block])
        return dict(sums)

    parameters, gradients = bytes_of(Category.PARAMETERS), bytes_of(Category.GRADIENTS)
    assert "model.layers.1.mlp.down_proj.base_layer" in parameters
    assert gradients == {name: rehearsal.STEPS * size for name, size in parameters.items() if "lora" in name}
    assert set(bytes_of(Category.OPTIMIZER_STATE)) == set(gradients)
    assert "" not in {**parameters, **bytes_of(Category.BUFFERS), **bytes_of(Category.ACTIVATIONS)}


def test_a_trace_with_symbols_has_no_stream() -> None:
    shape = TracedShape(13, 227, batch_is_symbol=True, length_is_symbol=True)
    assert trace.record(build_subject("llama", FULL_DEPTH[0][1]), shape, 2, 1).stream is None


def test_what_a_trace_says_is_read_without_torch() -> None:
    profile = traced(build_subject("llama", FULL_DEPTH[0][1]), 2, 1, 40, 1)
    program = "import pickle, sys; pickle.load(sys.stdin.buffer); sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(profile), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def repeated(layers: Iterable[int]) -> Stream:
    """Ten blocks a layer, released in reverse; each layer has its own sizes."""
    births = [(f"layers.{i}", f"operation {n}") for i, _ in enumerate(layers) for n in range(10)]
    count = len(births)
    events = [*range(1, count + 1), *range(-count, 0)]
    sizes = [size for size in layers for _ in range(10)]
    return made_stream(events, sizes, modules=[m for m, _ in births], operations=[o for _, o in births])


def test_made_up_layers_are_repeated_and_numbered() -> None:
    assert same(extend_stream(repeated([5] * 2), repeated([5] * 3), 7, 1), repeated([5] * 9))


def test_layers_that_do_not_repeat_are_refused() -> None:
    large = 1 << 20
    with pytest.raises(DepthMismatch):
        extend_stream(repeated([large, large]), repeated([large, 2 * large, 3 * large]), 7, 1)


# to the planner and to the disk

JOB = JobSpec(
    model=ModelSpec(
        architecture={
            "model_type": "llama",
            "num_hidden_layers": 6,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 600,
        }
    ),
    data=DataSpec(packing=True),
    training=TrainingSpec(report_to=()),
    hardware=HardwareSpec(kind=DeviceKind.CUDA, supports_flash_attention=True),
)
PLAN = Plan(
    method=Method.LORA,
    rank=6,
    max_length=100,
    micro_batch_size=3,
    gradient_accumulation_steps=4,
    activation_checkpointing=Checkpointing.FULL,
    attention=Attention.SDPA,
    loss=Loss.CHUNKED,
    optimizer=Optimizer.ADAMW_TORCH_FUSED,
    precision=Precision.BF16,
)


class TracerHere(Tracer):
    """Traces in this process, and writes down what was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.depths: list[int] = []

    def facts(self, subject: Subject) -> Future[SubjectFacts]:
        return done(facts_of(subject))

    def records(
        self, subject: Subject, shape: TracedShape, depths: Sequence[int], accumulation: int
    ) -> tuple[Future[Profile], ...]:
        self.depths += depths
        return tuple(done(record(subject, shape, depth, accumulation)) for depth in depths)


def done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


def test_one_trace_serves_the_estimate_and_the_stream_and_later_runs(tmp_path: Path) -> None:
    tracer = TracerHere()
    forecaster = Forecaster(JOB, tracer, TraceCache(tmp_path))
    estimate = forecaster.estimate(PLAN, exact=True)
    stream = forecaster.stream(PLAN)
    assert tracer.depths == [2, 3]
    # in these phases inputs wait; the estimate counts them in all
    phases = (Phase.TRAIN_STEP, Phase.OPTIMIZER_STEP)
    own = {peak.phase: peak for peak in phase_peaks(stream)}
    for phase in phases:
        known = estimate.phase(phase)
        assert known is not None and known.reserved_bytes is not None
        assert own[phase] == replace(known, reserved_bytes=None)
        assert known.reserved_bytes >= known.allocated_bytes

    later = TracerHere()
    assert same(Forecaster(JOB, later, TraceCache(tmp_path)).stream(PLAN), stream)
    assert later.depths == []


def test_a_corrupt_entry_is_made_again(tmp_path: Path) -> None:
    stream = Forecaster(JOB, TracerHere(), TraceCache(tmp_path)).stream(PLAN)
    (entry,) = tmp_path.glob("*-streams.json")
    entry.write_text(entry.read_text().replace("A", "B", 1))
    tracer = TracerHere()
    assert same(Forecaster(JOB, tracer, TraceCache(tmp_path)).stream(PLAN), stream)
    assert tracer.depths == [2, 3]
    entry.unlink()
    assert same(Forecaster(JOB, tracer, TraceCache(tmp_path)).stream(PLAN), stream)
    assert entry.exists()


def test_depths_that_do_not_match_trace_every_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Forecaster(JOB, TracerHere(), TraceCache(None)).stream(PLAN)

    def refuse(*whatever: object) -> Stream:
        raise DepthMismatch("made up")

    monkeypatch.setattr(forecast, "extend_stream", refuse)
    tracer = TracerHere()
    assert same(Forecaster(JOB, tracer, TraceCache(tmp_path)).stream(PLAN), stream)
    assert same(Forecaster(JOB, tracer, TraceCache(tmp_path)).stream(PLAN), stream)
    assert tracer.depths == [2, 3, 3, 4, 6], "one period deeper, then every layer, each only once"


def test_a_stream_that_contradicts_its_skyline_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_low(shallow: Stream, *rest: object) -> Stream:
        return shallow

    monkeypatch.setattr(forecast, "extend_stream", too_low)
    tracer = TracerHere()
    Forecaster(JOB, tracer, TraceCache(None)).stream(PLAN)
    assert tracer.depths == [2, 3, 3, 4, 6]


@pytest.mark.thorough
def test_a_skyline_that_contradicts_its_stream_is_not_believed_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the two differ every layer is traced, and what that says stands for both, in later runs too."""
    right = Forecaster(JOB, TracerHere(), TraceCache(None)).estimate(PLAN, exact=True)
    extend = depth.extend

    def too_high(shallow: Profile, deep: Profile, steps: float) -> Profile:
        return extend(shallow, deep, 2 * steps)

    monkeypatch.setattr(depth, "extend", too_high)
    tracer = TracerHere()
    for _ in range(2):
        found = Forecaster(JOB, tracer, TraceCache(tmp_path)).estimate(PLAN, exact=True)
        assert found.phases == right.phases and found.resident_bytes == right.resident_bytes
    assert tracer.depths == [2, 3, 3, 4, 6]
