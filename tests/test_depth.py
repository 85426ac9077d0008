"""Depth: what two shallow traces say of a deep one, on sequences made by hand and on real models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from launcher.errors import UnsupportedByPlanner
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
from launcher.planner import trace
from launcher.planner.depth import (
    DepthMismatch,
    DepthPlan,
    align,
    extend,
    extended_blocks,
    layer_period,
    match,
    meet_in_the_middle,
    plan_depths,
)
from launcher.planner.skyline import Instant, Profile
from launcher.planner.stream import CATEGORIES
from launcher.workload import model_config

LAYER = list(range(100, 140))
HEAD, TAIL = list(range(30)), list(range(500, 530))


def step(depth: int) -> list[int]:
    """A made-up step: something before, a stretch per layer, something after."""
    return HEAD + LAYER * depth + TAIL


@pytest.mark.parametrize(
    ("low", "high", "full"),
    [
        ((5, 100), (5, 150), (5, 300)),  # one buffer for all layers
        ((7, 9, 9, 7), (7, 9, 9, 9, 7), (7, 7, *(9,) * 6)),  # one for each layer
        ((7, 9, 9, 20), (7, 9, 9, 9, 30), (7, *(9,) * 6, 60)),  # both
    ],
)
def test_pinned_blocks_grow_or_come_with_each_layer(
    low: tuple[int, ...], high: tuple[int, ...], full: tuple[int, ...]
) -> None:
    """Two and three layers tell of six."""
    assert sorted(extended_blocks(low, high, 4.0)) == sorted(full)


def test_a_pinned_block_of_a_new_size_is_no_repeated_layer() -> None:
    with pytest.raises(DepthMismatch, match="2 and 3 pinned blocks"):
        extended_blocks((7, 9), (7, 9, 11), 4.0)


def test_a_gap_leaves_room_for_what_is_left() -> None:
    """Two steps are alike: from a place where the second layer's list is short, the second step agrees for longer."""
    one, two = [1, 2, 3, *LAYER, 4, 5], [1, 2, 3, *LAYER, *LAYER, 4, 4, 5]
    short, long = [*one, *TAIL, *one, *TAIL], [*two, *TAIL, *two, *TAIL]
    matches = align(short, long)
    assert [long[place] for place in matches] == short
    assert matches[len(one) + len(TAIL)] == len(two) + len(TAIL), "each step matches its own"


def test_equal_sequences_match_one_to_one() -> None:
    assert align(step(2), step(2)) == list(range(len(step(2))))


@pytest.mark.parametrize("extra", [1, 2, 5])
def test_the_extra_layers_are_left_out_as_late_as_possible(extra: int) -> None:
    short, long = step(2), step(2 + extra)
    matches = align(short, long)
    assert [long[j] for j in matches] == short
    last_layer_ends = len(HEAD) + 2 * len(LAYER)
    assert matches[:last_layer_ends] == list(range(last_layer_ends))
    assert matches[last_layer_ends:] == list(range(last_layer_ends + extra * len(LAYER), len(long)))


def test_several_stretches_are_left_out_each_in_its_place() -> None:
    backward = list(range(900, 960))
    short, long = step(2) + backward * 2 + TAIL, step(3) + backward * 3 + TAIL
    matches = align(short, long)
    assert [long[j] for j in matches] == short
    assert sorted(matches) == matches
    assert len(set(matches)) == len(short)


def test_a_list_that_grows_soon_after_a_gap_does_not_hide_it() -> None:
    short, long = step(2)[:-20] + [7] * 10 + TAIL, step(3)[:-20] + [7] * 15 + TAIL
    assert [long[j] for j in align(short, long)] == short


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            ["k", "k", "v", "v"],
            ["norm", "norm"],
        ),  # the gap of both lists together is followed by more that agrees
        (list("abcdefghijklmnopqrstu"), list("aBCDEFGHIJKLMNO")),  # and the lists begin alike
        (list("abcdefghijklmnopqrstuvwx"), list("ABCDEFGH")),  # a long list and a short one
    ],
)
def test_lists_that_follow_each_other_grow_each_for_itself(first: list[str], second: list[str]) -> None:
    def names(depth: int) -> list[int]:
        return [hash(name) for name in ["head", *first * depth, *second * depth, "tail"]]

    short, long = names(2), names(3)
    matches = match(short, long)
    assert [long[j] for j in matches] == short
    left_out = sorted(set(range(len(long))) - set(matches))
    parts = left_out[: len(first)], left_out[len(first) :]
    assert [len(part) for part in parts] == [len(first), len(second)]
    for part, inside in zip(parts, (first, second), strict=True):
        assert part == list(range(part[0], part[0] + len(part)))
        assert sorted(long[j] for j in part) == sorted(hash(name) for name in inside)


def test_an_edge_that_leaves_out_a_stretch_in_pieces_is_seen_through() -> None:
    late = [*range(60), *range(90, 100)]
    early = [*range(10), *range(39, 49), *range(50, 100)]
    joined = meet_in_the_middle(late, early)
    assert joined == [*range(40), *range(70, 100)]


def test_sequences_that_do_not_repeat_are_refused() -> None:
    with pytest.raises(DepthMismatch):
        align([*HEAD, 77, *TAIL], [*HEAD, *LAYER, *LAYER, 88, *TAIL])


def test_two_matchings_meet_in_the_middle_of_where_they_differ() -> None:
    late, early = [0, 1, 2, 3, 4, 9, 10], [0, 5, 6, 7, 8, 9, 10]
    assert meet_in_the_middle(late, early) == [0, 1, 2, 7, 8, 9, 10]
    assert meet_in_the_middle([0, 1], [0, 1]) == [0, 1]


def made_profile(depth: int) -> Profile:
    """Forward keeps 10 bytes a layer, backward frees them; that of the first layer frees a mask of 1000."""
    names, live = [], []
    for layer in range(depth):
        for moment in range(30):
            names.append(f"forward {moment}")
            live.append(1000 + 10 * layer + (5 if moment == 15 else 0))
    for layer in reversed(range(depth)):
        for moment in range(30):
            mask = 0 if layer == 0 and moment > 10 else 1000
            names.append(f"backward {moment}")
            live.append(mask + 10 * layer + (70 if moment == 20 else 0))
    instants = tuple(Instant((name,), Phase.TRAIN_STEP) for name in names)
    values = np.zeros((len(live), len(CATEGORIES), 1))
    values[:, 0, 0] = live
    return Profile(instants, ((0, 0, 0),), values, {Category.PARAMETERS: {(0, 0, 0): 7 * depth}}, {})


@pytest.mark.parametrize("depth", [4, 9, 40])
def test_what_the_edge_layer_frees_is_not_multiplied_by_the_depth(depth: int) -> None:
    profile = extend(made_profile(2), made_profile(3), depth - 2)
    assert profile.live.sum((1, 2)).max() == made_profile(depth).live.sum((1, 2)).max()
    assert profile.resident[Category.PARAMETERS] == {(0, 0, 0): 7 * depth}


def test_first_layers_of_another_kind_are_left_out_of_the_pattern() -> None:
    """DeepSeek's first layers are dense; Qwen's every second one can be."""
    config: Any = SimpleNamespace(num_hidden_layers=27, first_k_dense_replace=1, moe_layer_freq=1)
    config.to_dict = dict
    assert layer_period(config) == (1, 1)
    assert plan_depths(config) == DepthPlan((3, 4), 24.0)
    config = SimpleNamespace(num_hidden_layers=24, decoder_sparse_step=2)
    config.to_dict = dict
    assert layer_period(config) == (0, 2)
    config = SimpleNamespace(num_hidden_layers=13)
    config.to_dict = lambda: {"mlp": ["dense", *["sparse"] * 12]}
    assert layer_period(config) == (1, 1)


def test_the_period_is_that_of_all_patterns_together() -> None:
    config: Any = SimpleNamespace(num_hidden_layers=12)
    config.to_dict = lambda: {"layer_types": ["a", "b"] * 6, "sparse": [0, 0, 1] * 4, "other": [1, 2]}
    assert layer_period(config) == (0, 6)
    assert plan_depths(config).depths == (12,)
    config.to_dict = lambda: {"layer_types": ["a", "b"] * 6}
    assert layer_period(config) == (0, 2)
    assert plan_depths(config).depths == (4, 6)


WIDTHS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 600,
}
ALTERNATING = ["sliding_attention", "full_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_hidden_layers": 7, **WIDTHS},
    "gpt2": {
        "model_type": "gpt2",
        "n_layer": 7,
        "n_embd": 64,
        "n_head": 4,
        "vocab_size": 600,
        "n_positions": 2048,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 9,
        "layer_types": ALTERNATING * 4 + ALTERNATING[:1],
        "sliding_window": 100,
        **WIDTHS,
    },
    "qwen2": {"model_type": "qwen2", "num_hidden_layers": 6, "tie_word_embeddings": True, **WIDTHS},
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_hidden_layers": 8,
        "layer_types": ALTERNATING * 4,
        "sliding_window": 100,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        **WIDTHS,
    },
}


def subject_of(name: str, attention: Attention, method: Method = Method.LORA) -> trace.TraceSubject:
    job = JobSpec(
        model=ModelSpec(architecture=MODELS[name]),
        data=DataSpec(packing=True),
        training=TrainingSpec(report_to=()),
    )
    plan = Plan(
        method=method,
        rank=6 if method is Method.LORA else 0,
        max_length=8,
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        activation_checkpointing=Checkpointing.FULL,
        attention=attention,
        loss=Loss.CHUNKED,
        optimizer=Optimizer.ADAMW_TORCH_FUSED,
        precision=Precision.BF16,
    )
    hardware = HardwareSpec(kind=DeviceKind.CUDA, supports_flash_attention=True)
    return trace.TraceSubject(job, plan, hardware, model_config("", job.model))


@pytest.mark.parametrize(
    ("name", "attention", "batch", "length", "accumulation"),
    [
        ("llama", Attention.SDPA, 2, 150, 1),
        ("gpt2", Attention.SDPA, 3, 90, 2),
        ("qwen2", Attention.SDPA, 1, 130, 2),  # head and embedding are one weight; projections have biases
        ("gemma3_text", Attention.SDPA, 2, 200, 1),
        ("gpt_oss", Attention.EAGER, 1, 700, 1),
    ],
)
def test_extended_depth_is_full_depth(
    name: str,
    attention: Attention,
    batch: int,
    length: int,
    accumulation: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    subject = subject_of(name, attention)
    assert len(plan_depths(subject.config).depths) == 2
    with caplog.at_level("INFO", "launcher.planner.trace"):
        extended = trace.trace_shape(subject, batch, length, accumulation).peaks(batch, length, accumulation)
    own = [record for record in caplog.records if record.name.startswith("launcher")]
    assert not own, "the full depth was traced instead"
    full = trace.trace_full_depth(subject, batch, length, accumulation).peaks(batch, length, accumulation)
    assert [peak.phase for peak in extended] == [peak.phase for peak in full]
    for got, want in zip(extended, full, strict=True):
        assert got.allocated_bytes == pytest.approx(want.allocated_bytes, rel=1e-4), got.phase


def test_an_attention_that_the_architecture_lacks_is_an_error() -> None:
    with pytest.raises(UnsupportedByPlanner, match="attention=sdpa"):
        trace.trace_shape(subject_of("gpt_oss", Attention.SDPA), 1, 64, 1)
