"""What devices exchange, against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.hardware import HardwareSpec
from launcher.job import Attention, Checkpointing, Engine, Loss, Method, Optimizer, Precision
from launcher.plan import Buckets, Plan
from launcher.planner.communication import Traffic, communication_seconds, offload_seconds, traffic

GB = 10**9
HARDWARE = HardwareSpec(
    device_link_bytes_per_second=500.0 * GB,
    host_link_bytes_per_second=25.0 * GB,
    network_bytes_per_second=12.5 * GB,
)
"""With 80 % of the links' rates: 200 GB/s between devices, 20 GB/s to the host, 10 GB/s between nodes."""


def plan(stage: int, accumulation: int = 1, **changes: Any) -> Plan:
    return Plan(
        method=Method.FULL,
        rank=0,
        max_length=1024,
        micro_batch_size=1,
        gradient_accumulation_steps=accumulation,
        activation_checkpointing=Checkpointing.NONE,
        attention=Attention.SDPA,
        loss=Loss.CHUNKED,
        optimizer=Optimizer.ADAMW_TORCH,
        precision=Precision.BF16,
        engine=Engine.DEEPSPEED if stage else Engine.DDP,
        zero_stage=stage,
        num_devices=8,
        **changes,
    )


@pytest.mark.parametrize(
    ("stage", "accumulation", "hidden", "exposed"),
    [
        (0, 4, 2 * 14 * GB, 0),  # once per step: 7/8 of 16 GB there, and back
        (1, 4, 2 * 14 * GB, 14 * GB),  # the same, and the updated weights
        (2, 4, 4 * 2 * 14 * GB, 14 * GB),  # in every micro batch
        (3, 4, 4 * (2 * 14 + 14) * GB, 0),  # weights for both passes, gradients to their owners
    ],
)
def test_bytes_of_the_rings(stage: int, accumulation: int, hidden: int, exposed: int) -> None:
    assert traffic(plan(stage, accumulation), 16 * GB, 16 * GB) == Traffic(hidden, exposed)


@pytest.mark.parametrize(
    ("stage", "mode", "exposed"),
    [
        (1, Checkpointing.NONE, (2 + 1) * 14 * GB),
        (2, Checkpointing.NONE, (4 * 2 + 1) * 14 * GB),
        (3, Checkpointing.NONE, 4 * (2 + 1) * 14 * GB),
        (3, Checkpointing.FULL, 4 * (3 + 1) * 14 * GB),  # the pass that recomputes gathers once more
    ],
)
def test_small_buckets_hide_nothing(stage: int, mode: Checkpointing, exposed: int) -> None:
    buckets = Buckets(1, 1, overlap_exchange=False)
    waiting = plan(stage, 4, buckets=buckets)
    waiting = replace(waiting, activation_checkpointing=mode)
    assert traffic(waiting, 16 * GB, 16 * GB) == Traffic(0, exposed)


def test_what_is_sent_meanwhile_is_hidden_as_far_as_there_is_a_meanwhile() -> None:
    sent = Traffic(28 * GB, 14 * GB)  # 0.14 s and 0.07 s at 200 GB/s
    assert communication_seconds(plan(1), HARDWARE, sent, 3.0) == pytest.approx(0.07)
    assert communication_seconds(plan(1), HARDWARE, sent, 0.15) == pytest.approx(0.07 + 0.14 - 0.10)
    across = replace(plan(1), num_nodes=2)
    assert communication_seconds(across, HARDWARE, sent, 0.0) == pytest.approx(4.2), "by the network, 10 GB/s"


def test_offloaded_states_wait_for_the_link_and_for_the_hosts_processor() -> None:
    """8 billion parameters: a part is 1 billion, 2 GB of bf16 and 4 GB of fp32; the node updates all 8 in 2.08 s."""
    offloaded = plan(2, offload_optimizer=True)
    once = offload_seconds(offloaded, HARDWARE, 16 * GB, 16 * GB, 1.0)
    assert once == pytest.approx(2.08 + (4 + 2) / 20), "gradients in fp32 there, weights back"
    twice = offload_seconds(
        replace(offloaded, gradient_accumulation_steps=2), HARDWARE, 16 * GB, 16 * GB, 1.0
    )
    assert twice - once == pytest.approx((2 * 2 + 2) / 20), "kept twice, fetched once"
    sharded = replace(offloaded, zero_stage=3, offload_parameters=True)
    assert offload_seconds(sharded, HARDWARE, 16 * GB, 16 * GB, 0.0) == pytest.approx(
        2.08 + (2 + 2 + 4) / 20 + 4 / 20
    ), "parameters come twice, and stay there when they are updated"
    assert offload_seconds(sharded, HARDWARE, 16 * GB, 16 * GB, 1.0) == pytest.approx(2.08 + 8 / 20)
    assert offload_seconds(plan(2), HARDWARE, 16 * GB, 16 * GB, 1.0) == 0.0
    waiting = replace(sharded, buckets=Buckets(1, 1, overlap_exchange=False))
    assert offload_seconds(waiting, HARDWARE, 16 * GB, 16 * GB, 1.0) == pytest.approx(
        2.08 + (2 + 2 + 4) / 20 + 4 / 20
    ), "nothing comes ahead"
