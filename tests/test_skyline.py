"""Skylines: the arithmetic by hand, and answers against fresh traces in every kind of regime.

The full comparison, over more architectures and shapes, is scripts/skyline_check.py; this is what CI can
afford of it, and what its published table promises.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.domain import Domain
from launcher.errors import UnsupportedByPlanner
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import (
    Attention,
    Checkpointing,
    DataSpec,
    EvaluationSpec,
    JobSpec,
    Loss,
    Method,
    ModelSpec,
    Optimizer,
    Precision,
    TrainingSpec,
)
from launcher.memory import Category, Phase, PhasePeak
from launcher.plan import Plan
from launcher.planner import trace
from launcher.planner.regimes import Lines, domain_of, symbolic_shape
from launcher.planner.skyline import PhaseSkyline, Skyline, undominated
from launcher.planner.stream import CATEGORIES
from launcher.workload import model_config
from scripts import skyline_check

ANYWHERE = Domain(1, None, 1, None, 0, None)
LINES = Lines(token_tile=4096, lengths=(1000,), dimensions=(64, 160, 600))


def made_skyline(domain: Domain = ANYWHERE, accumulation: int = 1) -> Skyline:
    """Two moments: 1000 bytes of parameters and 2 per token, or 100 of parameters and 3 per token."""
    rows = np.zeros((2, len(CATEGORIES), 2))
    parameters, activations = (CATEGORIES.index(c) for c in (Category.PARAMETERS, Category.ACTIVATIONS))
    rows[0, parameters, 0], rows[0, activations, 1] = 1000, 2
    rows[1, parameters, 0], rows[1, activations, 1] = 100, 3
    phases = (PhaseSkyline(Phase.TRAIN_STEP, rows),)
    return Skyline(domain, ((0, 0, 0), (1, 1, 0)), phases, {}, {(1, 1, 0): 8}, accumulation)


@pytest.mark.parametrize(
    ("batch", "length", "peak"), [(1, 100, 1200), (2, 450, 2800), (2, 451, 2806), (9, 900, 24400)]
)
def test_the_peak_is_the_highest_moment_of_the_shape(batch: int, length: int, peak: int) -> None:
    (answer,) = made_skyline().peaks(batch, length, 1)
    assert answer.allocated_bytes == peak
    assert sum(answer.by_category_bytes.values()) == peak


def test_many_shapes_at_once_have_the_answers_of_each() -> None:
    skyline = made_skyline(accumulation=2)
    batches, lengths = np.array([1, 2, 9, 3]), np.array([100, 451, 900, 7])
    for accumulation in (2, 5):
        each = [
            skyline.peaks(batch, length, accumulation)[0].allocated_bytes
            for batch, length in zip(batches.tolist(), lengths.tolist(), strict=True)
        ]
        assert skyline.highest_bytes(batches, lengths, accumulation).tolist() == each
    with pytest.raises(UnsupportedByPlanner):
        made_skyline(Domain(2, 8, 100, 999, 1, 4096)).highest_bytes(np.array([4, 1]), np.array([500, 500]), 1)


def test_inputs_of_further_micro_batches_wait_in_memory() -> None:
    skyline = made_skyline(accumulation=2)
    two, five = (skyline.peaks(2, 100, accumulation)[0] for accumulation in (2, 5))
    assert five.allocated_bytes - two.allocated_bytes == 3 * 2 * 100 * 8
    assert five.by_category_bytes[Category.INPUTS] == 3 * 2 * 100 * 8


@pytest.mark.parametrize(
    ("batch", "length", "accumulation"),
    [(1, 500, 1), (9, 500, 1), (4, 99, 1), (4, 1000, 1), (8, 514, 1), (4, 500, 2)],
)
def test_a_shape_outside_the_domain_is_an_error(batch: int, length: int, accumulation: int) -> None:
    skyline = made_skyline(Domain(2, 8, 100, 999, 1, 4096))
    assert skyline.peaks(4, 500, 1)
    assert skyline.peaks(8, 513, 1)
    with pytest.raises(UnsupportedByPlanner, match=f"batch {batch} x length {length}"):
        skyline.peaks(batch, length, accumulation)


def test_a_skyline_of_several_micro_batches_does_not_answer_for_one() -> None:
    with pytest.raises(UnsupportedByPlanner):
        made_skyline(accumulation=2).peaks(2, 100, 1)


def test_only_rows_that_can_be_highest_are_kept() -> None:
    rows = np.zeros((4, len(CATEGORIES), 2))
    rows[:, 0] = [[10, 5], [10, 4], [11, 1], [9, 5]]
    assert undominated(rows)[:, 0].tolist() == [[10, 5], [11, 1]]


@pytest.mark.parametrize(
    ("batch", "length", "domain"),
    [
        (1, 500, Domain(1, 1, 2, 999, 1, 4096)),
        (1, 4097, Domain(1, 1, 1000, None, 1, 4096)),
        (1, 4098, Domain(1, 1, 1000, None, 4097, None)),
        (2, 999, Domain(2, None, 2, 999, 1, 4096)),
        (8, 513, Domain(2, None, 2, 999, 1, 4096)),
        (8, 514, Domain(2, None, 2, 999, 4097, None)),
        (64, 1000, Domain(2, None, 1000, None, 4097, None)),
        (3, 1000, Domain(3, 3, 1000, None, 1, 4096)),
    ],
)
def test_lines_split_the_shapes_as_by_hand(batch: int, length: int, domain: Domain) -> None:
    assert domain_of(batch, length, LINES) == domain


def test_every_shape_lies_in_its_regime_and_so_does_the_shape_that_is_traced() -> None:
    for batch in (1, 2, 3, 5, 8, 32):
        for length in (128, 500, 999, 1000, 1001, 2049, 4097, 4098, 16384):
            domain = domain_of(batch, length, LINES)
            assert domain.contains(batch, length)
            shape = symbolic_shape(domain, LINES)
            assert shape is not None
            assert domain.contains(shape.batch, shape.length)
            assert not any(size % shape.length == 0 for size in LINES.dimensions)


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
    "llama": {"model_type": "llama", "num_hidden_layers": 5, "tie_word_embeddings": False, **WIDTHS},
    "qwen2": {"model_type": "qwen2", "num_hidden_layers": 5, "tie_word_embeddings": True, **WIDTHS},
    "mistral": {"model_type": "mistral", "num_hidden_layers": 5, "sliding_window": 300, **WIDTHS},
    "gemma3_text": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 8,
        "layer_types": ALTERNATING * 4,
        "sliding_window": 300,
        **WIDTHS,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 5,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        **WIDTHS,
    },
}


def subject_of(
    name: str, kind: DeviceKind, method: Method, loss: Loss, *, packing: bool, evaluation: bool = False
) -> trace.TraceSubject:
    job = JobSpec(
        model=ModelSpec(architecture=MODELS[name]),
        data=DataSpec(packing=packing),
        training=TrainingSpec(report_to=()),
        evaluation=EvaluationSpec(enabled=evaluation),
    )
    plan = Plan(
        method=method,
        rank=6 if method is Method.LORA else 0,
        max_length=8,
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        activation_checkpointing=Checkpointing.FULL if method is Method.LORA else Checkpointing.NONE,
        attention=Attention.SDPA,
        loss=loss,
        optimizer=Optimizer.ADAMW_TORCH_FUSED,
        precision=Precision.BF16 if kind is DeviceKind.CUDA else Precision.FP32,
    )
    hardware = HardwareSpec(kind=kind, supports_flash_attention=kind is DeviceKind.CUDA)
    return trace.TraceSubject(job, plan, hardware, model_config("", job.model))


def assert_close(got: tuple[PhasePeak, ...], want: tuple[PhasePeak, ...], tolerance: float) -> None:
    assert [peak.phase for peak in got] == [peak.phase for peak in want]
    for answer, truth in zip(got, want, strict=True):
        assert answer.allocated_bytes == pytest.approx(truth.allocated_bytes, rel=tolerance), truth.phase


CUDA, CPU = DeviceKind.CUDA, DeviceKind.CPU
CASES = {
    "batch 1, below the loss tile": ("llama", CUDA, Method.LORA, Loss.CHUNKED, True, (1, 700, 1)),
    "batch 1, above the loss tile": ("qwen2", CUDA, Method.FULL, Loss.CHUNKED, False, (1, 9001, 2)),
    "below the tile": ("qwen2", CUDA, Method.FULL, Loss.CHUNKED, False, (6, 500, 1)),
    "above the tile, just": ("llama", CPU, Method.LORA, Loss.CHUNKED, True, (8, 514, 3)),
    "above the tile, far": ("llama", CUDA, Method.LORA, Loss.CHUNKED, False, (8, 16384, 2)),
    "below the window": ("mistral", CUDA, Method.LORA, Loss.CHUNKED, True, (2, 299, 1)),
    "at the window": ("mistral", CUDA, Method.LORA, Loss.CHUNKED, True, (16, 300, 1)),
    "above a window of some layers": ("gemma3_text", CPU, Method.FULL, Loss.CHUNKED, True, (3, 3000, 5)),
    "a regime too narrow for a batch": ("gemma3_text", CUDA, Method.LORA, Loss.CHUNKED, True, (3, 1200, 1)),
    "mixture of experts": ("qwen3_moe", CUDA, Method.LORA, Loss.CHUNKED, True, (4, 2000, 2)),
    "mixture of experts, fp32": ("qwen3_moe", CPU, Method.FULL, Loss.PLAIN, False, (2, 333, 1)),
    "padded, rounded by kernels": ("llama", CUDA, Method.FULL, Loss.PLAIN, False, (6, 297, 1)),
    "padded, aligned": ("llama", CUDA, Method.FULL, Loss.PLAIN, False, (6, 1024, 1)),
    "padded, one column short": ("llama", CUDA, Method.LORA, Loss.PLAIN, False, (3, 1279, 2)),
    "packed, rounded by kernels": ("llama", CUDA, Method.FULL, Loss.CHUNKED, True, (5, 1415, 1)),
    "plain loss": ("qwen2", CUDA, Method.LORA, Loss.PLAIN, True, (5, 4444, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_skyline_agrees_with_a_fresh_trace(case: str, caplog: pytest.LogCaptureFixture) -> None:
    name, kind, method, loss, packing, shape = CASES[case]
    subject = subject_of(name, kind, method, loss, packing=packing)
    with caplog.at_level("INFO", "launcher.planner.trace"):
        skyline = trace.trace_regime(subject, *shape)
        exact = trace.trace_shape(subject, *shape)
    own = [record for record in caplog.records if record.name.startswith("launcher")]
    assert not own, "the full depth was traced"
    assert skyline.domain == domain_of(*shape[:2], trace.regime_lines(subject)), "not traced by symbols"
    assert_close(skyline.peaks(*shape), exact.peaks(*shape), 1e-5 if loss is Loss.PLAIN else 2e-3)


def test_across_the_loss_tile_a_skyline_is_wrong_which_is_why_it_has_a_domain() -> None:
    subject = subject_of("llama", CUDA, Method.LORA, Loss.CHUNKED, packing=True)
    below = replace(trace.trace_regime(subject, 4, 500, 1), domain=ANYWHERE)
    exact = trace.trace_shape(subject, 8, 2000, 1)
    with pytest.raises(AssertionError):
        assert_close(below.peaks(8, 2000, 1), exact.peaks(8, 2000, 1), 2e-3)


def test_evaluation_has_a_peak_of_its_own() -> None:
    subject = subject_of("llama", CUDA, Method.LORA, Loss.CHUNKED, packing=True, evaluation=True)
    skyline, exact = (ask(subject, 4, 900, 1) for ask in (trace.trace_regime, trace.trace_shape))
    assert Phase.EVALUATION in [peak.phase for peak in skyline.peaks(4, 900, 1)]
    assert_close(skyline.peaks(4, 900, 1), exact.peaks(4, 900, 1), 2e-3)


def test_padding_masks_cost_memory_and_a_single_sequence_has_none() -> None:
    packed, padded = (
        subject_of("llama", CUDA, Method.LORA, Loss.CHUNKED, packing=packing) for packing in (True, False)
    )

    def peak(subject: trace.TraceSubject, batch: int) -> int:
        return max(
            p.allocated_bytes for p in trace.trace_shape(subject, batch, 2000, 1).peaks(batch, 2000, 1)
        )

    assert peak(padded, 2) >= peak(packed, 2) + 2 * 2000 * 2000
    assert peak(padded, 1) < peak(packed, 1) + 2000 * 2000


def test_a_mixture_runs_no_expert_on_tokens_that_are_not_its_own() -> None:
    def activations(top_k: int, experts: int) -> int:
        subject = subject_of("qwen3_moe", CUDA, Method.FULL, Loss.PLAIN, packing=True)
        config = model_config(
            "",
            replace(
                subject.job.model,
                architecture={**MODELS["qwen3_moe"], "num_experts": experts, "num_experts_per_tok": top_k},
            ),
        )
        answers = trace.trace_shape(replace(subject, config=config), 2, 2000, 1).peaks(2, 2000, 1)
        return next(p.by_category_bytes[Category.ACTIVATIONS] for p in answers if p.phase is Phase.TRAIN_STEP)

    few, many = activations(2, 4), activations(2, 32)
    assert many < 1.3 * few
    assert activations(4, 32) > 1.3 * many


DOCS = Path(__file__).resolve().parent.parent / "docs"
PEAK_PERCENT, PLAIN_SHARE, DEPTH_SHARE = 0.2, 1e-5, 1e-4
"""What the published table promises: skylines, those of plain losses, and extension over depth."""


def published() -> tuple[Path, dict[str, Any]]:
    """The newest data file of scripts/skyline_check.py, and what it holds."""
    newest = max((DOCS / "accuracy").glob("*-skyline.json"))
    return newest, json.loads(newest.read_text(encoding="utf-8"))


def test_published_shapes_span_every_kind_of_architecture_and_the_whole_range() -> None:
    _, data = published()
    kinds = data["architectures"]
    assert any("sliding_window" in facts for facts in kinds.values())
    assert any("num_experts" in facts or "num_local_experts" in facts for facts in kinds.values())
    assert any(facts.get("tie_word_embeddings") for facts in kinds.values())
    cases = skyline_check.cases_of(data)
    compared = {case.architecture for case in cases}
    assert compared == set(kinds) and len(compared) >= 5
    for name in compared:
        shapes = {(case.batch, case.length) for case in cases if case.architecture == name}
        assert len([case for case in cases if case.architecture == name]) >= 20
        assert {(2, 128), (8, 16384)} <= shapes
        assert any(batch == 1 for batch, _ in shapes)
        assert any(case.full_depth_bytes for case in cases if case.architecture == name)
        assert any(case.setting.loss == "plain" for case in cases if case.architecture == name)


def test_published_skylines_keep_their_promise() -> None:
    """Errors are taken from the bytes in the data, not from the table."""
    _, data = published()
    for case in skyline_check.cases_of(data):
        answer, truth = max(case.skyline_bytes.values()), max(case.traced_bytes.values())
        error = abs(answer - truth) / truth
        assert 100 * error <= PEAK_PERCENT, case
        assert case.setting.loss != "plain" or error <= PLAIN_SHARE, case
        if case.full_depth_bytes:
            full = max(case.full_depth_bytes.values())
            assert abs(truth - full) <= DEPTH_SHARE * full, case


def test_published_page_is_what_its_data_generate() -> None:
    newest, data = published()
    assert skyline_check.page(data, newest.name) == (DOCS / "skyline.md").read_text(encoding="utf-8")
