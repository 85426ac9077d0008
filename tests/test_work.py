"""The work of a step: against torch's own counter on real training, and against numbers worked by hand.

The traces are shallow and at other shapes; the real steps have full depth. What must agree exactly are floating-point
operations; for bytes and operations a full-depth trace at the true shape is the judge.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from launcher import workload
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import (
    Attention,
    Checkpointing,
    DataSpec,
    JobSpec,
    Loss,
    Method,
    MethodSpec,
    ModelSpec,
    Optimizer,
    Precision,
    TrainingSpec,
)
from launcher.plan import Plan
from launcher.planner import trace
from launcher.planner.polynomial import TracedShape
from launcher.planner.rehearsal import STEPS, Rehearsal
from launcher.planner.tape import Tape
from launcher.planner.work import Stage, WorkKind, WorkTable, decode_table, encode_table, extend_tally
from launcher.workload import model_config

aten = torch.ops.aten
WIDTH, INNER, LAYERS, HEADS, KEY_HEADS, VOCABULARY = 64, 160, 5, 4, 2, 640
MODEL = ModelSpec(
    architecture={
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
)
JOB = JobSpec(
    model=MODEL,
    method=MethodSpec(rank=4),
    data=DataSpec(packing=True),
    training=TrainingSpec(precision=Precision.FP32, report_to=()),
)
UNCOUNTED = {
    aten.addmm_: lambda total, left, right, **named: 2 * left[0] * left[1] * right[1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *rest, **named: (
        sdpa_flop_count(query, key, value)
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, query, key, value, *rest, **named: (
        sdpa_backward_flop_count(grad, query, key, value)
    ),
}
"""What torch's counter leaves out. Its formulas of attention, here those of GPUs, know of no mask."""
LINEAR = 2 * WIDTH * WIDTH + 2 * WIDTH * (WIDTH // HEADS * KEY_HEADS) + 3 * WIDTH * INNER
"""Weights of one layer's matrices."""


def plan_of(batch: int, length: int, accumulation: int, **changes: Any) -> Plan:
    knobs: dict[str, Any] = {
        "method": Method.FULL,
        "rank": 0,
        "activation_checkpointing": Checkpointing.NONE,
        "attention": Attention.SDPA,
        "loss": Loss.CHUNKED,
        "optimizer": Optimizer.ADAMW_TORCH_FUSED,
        "precision": Precision.FP32,
    }
    return Plan(
        max_length=length,
        micro_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **{**knobs, **changes},
    )


def subject_of(plan: Plan, kind: DeviceKind = DeviceKind.CPU) -> trace.TraceSubject:
    hardware = HardwareSpec(kind=kind, supports_flash_attention=True)
    return trace.TraceSubject(JOB, plan, hardware, model_config("", MODEL))


def traced(plan: Plan, kind: DeviceKind = DeviceKind.CPU) -> WorkTable:
    """The work of the regime that holds a plan, from shallow traces at another shape."""
    subject = subject_of(plan, kind)
    return trace.trace_regime(
        subject, plan.micro_batch_size, plan.max_length, plan.gradient_accumulation_steps
    ).work


def flops(table: WorkTable, plan: Plan, *, causal: float = 1.0) -> float:
    """Floating-point operations of a step; `causal` multiplies those of attention."""
    quantities, counts = table.at(plan.micro_batch_size, plan.max_length)
    weights = np.array([causal if "attention" in kind.value else 1.0 for kind in table.kinds])
    later = plan.gradient_accumulation_steps - 1
    times = {stage: later if "later" in stage else 1 for stage in Stage}
    repeats = np.array([times[stage] for stage in table.stages])
    return float((quantities[:, 0] * counts * weights * repeats).sum())


def counted(plan: Plan, folder: Path) -> float:
    """What torch counts in one real step of full depth."""
    torch.manual_seed(0)
    model = workload.build_model(model_config("", MODEL), plan, "", JOB)
    model = workload.attach_adapters(model, JOB, plan)
    shape = TracedShape(plan.micro_batch_size, plan.max_length, False, False)
    inputs = Rehearsal(Tape(shape), model, JOB, plan, on_gpu=False).inputs(folder)
    trainer = workload.build_trainer(model, JOB, plan, callbacks=[], **inputs)
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        trainer.train()
    total: int = counter.get_total_flops()
    return total / STEPS


@pytest.mark.parametrize(
    "plan",
    [
        plan_of(2, 33, 3, activation_checkpointing=Checkpointing.FULL),
        plan_of(4, 50, 1, activation_checkpointing=Checkpointing.SELECTIVE),
        plan_of(3, 1500, 1, method=Method.LORA, rank=4),
        plan_of(1, 96, 1, loss=Loss.PLAIN),
        plan_of(2, 64, 1, attention=Attention.EAGER),
    ],
    ids=lambda plan: (
        f"{plan.method}-{plan.activation_checkpointing}-{plan.attention}-{plan.loss}-{plan.micro_batch_size}"
        f"x{plan.max_length}x{plan.gradient_accumulation_steps}"
    ),
)
def test_torch_counts_as_much_in_a_real_step(plan: Plan, tmp_path: Path) -> None:
    assert flops(traced(plan), plan, causal=2.0) == pytest.approx(counted(plan, tmp_path), rel=1e-12)


def matrices(batch: int, length: int) -> tuple[int, int, int]:
    """Worked by hand, without attention: a pass through all layers, a pass through the head, a layer's last product."""
    tokens, predicted = batch * length, batch * (length - 1)
    return 2 * LAYERS * LINEAR * tokens, 2 * VOCABULARY * WIDTH * predicted, 2 * INNER * WIDTH * tokens


def test_six_operations_per_weight_and_token_and_eight_in_the_head() -> None:
    """Forward, and two products backward; TRL's loss computes its logits again before it goes back."""
    plan = plan_of(3, 40, 1)
    layers, head, _ = matrices(3, 40)
    assert flops(traced(plan), plan, causal=0.0) == pytest.approx(3 * layers + 4 * head, rel=1e-12)


def test_recomputation_is_one_more_pass_but_for_the_last_product_of_each_layer() -> None:
    """Nobody needs the output of a layer again: torch stops before its last product."""
    plan = plan_of(3, 40, 1, activation_checkpointing=Checkpointing.FULL)
    layers, head, last = matrices(3, 40)
    assert flops(traced(plan), plan, causal=0.0) == pytest.approx(
        4 * layers - LAYERS * last + 4 * head, rel=1e-12
    )


def test_frozen_weights_have_no_gradients_and_adapters_do() -> None:
    """The first layer's queries, keys and values hand no gradient on: embeddings are frozen."""
    plan = plan_of(3, 40, 1, method=Method.LORA, rank=4)
    layers, head, _ = matrices(3, 40)
    key_width = WIDTH // HEADS * KEY_HEADS
    sides = [(WIDTH, WIDTH), (WIDTH, key_width), (WIDTH, key_width), (WIDTH, WIDTH)]
    sides += [(WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH)]
    adapters = 2 * LAYERS * 4 * sum(a + b for a, b in sides) * 3 * 40
    first = 2 * 3 * 40 * (WIDTH * WIDTH + 2 * WIDTH * key_width + 3 * WIDTH * 4)
    by_hand = 2 * layers + 3 * head + 3 * adapters - first
    assert flops(traced(plan), plan, causal=0.0) == pytest.approx(by_hand, rel=1e-12)


def test_bytes_and_operations_are_those_of_a_full_depth_trace() -> None:
    kind = DeviceKind.CUDA
    plan = plan_of(
        6,
        700,
        2,
        method=Method.LORA,
        rank=4,
        precision=Precision.BF16,
        activation_checkpointing=Checkpointing.FULL,
    )
    table, true = traced(plan, kind), trace.trace_full_depth(subject_of(plan, kind), 6, 700, 2).work
    for stage in set(Stage) - {Stage.UPDATE}:
        ours, theirs = (
            [np.array([item is stage for item in work.stages]) @ part for part in _bytes_and_counts(work)]
            for work in (table, true)
        )
        assert ours[0] == pytest.approx(theirs[0], rel=1e-3)
        assert ours[1] == pytest.approx(theirs[1], rel=1e-2)  # part of a tile counts as part of a launch


@pytest.mark.parametrize("method", [Method.FULL, Method.LORA])
def test_outside_of_the_loss_both_losses_do_the_same(method: Method) -> None:
    """By stage: operations, floating-point ones and bytes of chunked and plain losses, at a shape that neither traced."""
    rank = 4 if method is Method.LORA else 0
    plans = [plan_of(6, 700, 2, method=method, rank=rank, loss=loss) for loss in (Loss.CHUNKED, Loss.PLAIN)]
    whole = [traced(plan, DeviceKind.CUDA) for plan in plans]
    ours, theirs = (table.without_loss() for table in whole)
    for stage in Stage:
        for one, other in zip(_totals(ours, stage), _totals(theirs, stage), strict=True):
            assert one == pytest.approx(other, rel=1e-9)
        if "forward" in stage.value:
            head = 2 * WIDTH * VOCABULARY * 6 * 699
            assert _totals(whole[1], stage)[1] - _totals(theirs, stage)[1] == pytest.approx(head, rel=2e-3)


def _totals(table: WorkTable, stage: Stage) -> tuple[float, float, float]:
    quantities, counts = table.at(6, 700)
    counts = counts * np.array([item is stage for item in table.stages])
    return float(counts.sum()), float(quantities[:, 0] @ counts), float(quantities[:, 1] @ counts)


def _bytes_and_counts(table: WorkTable) -> tuple[np.ndarray, np.ndarray]:
    quantities, counts = table.at(6, 700)
    return quantities[:, 1] * counts, counts


def test_offloaded_layers_cross_the_link_twice() -> None:
    plan = plan_of(4, 96, 1, precision=Precision.BF16, activation_checkpointing=Checkpointing.OFFLOAD)
    table = traced(plan, DeviceKind.CUDA)
    quantities, counts = table.at(4, 96)
    crossing = np.array([kind is WorkKind.TRANSFER for kind in table.kinds])
    assert (quantities[:, 1] * counts)[crossing].sum() == 2 * LAYERS * 4 * 96 * WIDTH * 2


def test_the_optimizer_reads_four_numbers_per_weight_and_writes_three() -> None:
    plan = plan_of(2, 40, 1)
    table = traced(plan)
    quantities, counts = table.at(2, 40)
    is_optimizer = np.array([kind is WorkKind.OPTIMIZER for kind in table.kinds])
    norms = LAYERS * 2 * WIDTH + WIDTH
    weights = LAYERS * LINEAR + 2 * VOCABULARY * WIDTH + norms
    fused = (quantities[:, 1] * counts)[is_optimizer].sum()
    assert fused == pytest.approx(7 * 4 * weights, rel=1e-3)  # and a counter of steps per tensor


def test_tables_survive_the_cache() -> None:
    table = traced(plan_of(2, 40, 1))
    again = decode_table(encode_table(table))
    assert (again.stages, again.kinds, again.dtypes, again.layouts, again.exponents) == (
        table.stages,
        table.kinds,
        table.dtypes,
        table.layouts,
        table.exponents,
    )
    assert (again.quantities == table.quantities).all() and (again.counts == table.counts).all()


def test_counts_grow_by_what_a_period_adds() -> None:
    entry: Any = (Stage.UPDATE, "an operation")
    extended = extend_tally({entry: {(0, 0, 0): 5.0}}, {entry: {(0, 0, 0): 7.0, (1, 0, 0): 1.0}}, 10)
    assert extended[entry] == {(0, 0, 0): 25.0, (1, 0, 0): 10.0}
