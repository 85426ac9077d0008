"""What CUDA's attention kernels keep for themselves, against sizes worked by hand from their sources."""

from __future__ import annotations

import pytest
import torch

from launcher.planner import attention_twin
from launcher.planner.fast_fake import FastFakeTensorMode
from launcher.planner.polynomial import TracedShape
from launcher.planner.tape import Tape

aten = torch.ops.aten
BATCH, HEADS, LENGTH = 2, 4, 1000


def births(kernel: object, size: int, *, rounds: bool) -> list[int]:
    """Bytes of every block that one backward (or forward) pass of a kernel allocates, on bf16 inputs."""
    fake = FastFakeTensorMode()
    tape = Tape(TracedShape(BATCH, LENGTH, False, False), fake=fake)
    with fake, tape:
        query = torch.empty(BATCH, HEADS, LENGTH, size, dtype=torch.bfloat16)
        begin = len(tape.events)
        twin = attention_twin.twins(rounds=rounds)[kernel]
        backward = kernel is aten._scaled_dot_product_flash_attention_backward.default
        twin(*((query,) if backward else ()), query, query, query)
        return [event.block.num_bytes for event in tape.events[begin:] if event.birth]


@pytest.mark.parametrize(("size", "rounded_size"), [(64, 64), (80, 96), (128, 128), (160, 192), (256, 256)])
def test_flashs_backward_pass_rounds_lengths_to_128_and_head_sizes(size: int, rounded_size: int) -> None:
    kernel = aten._scaled_dot_product_flash_attention_backward.default
    found = births(kernel, size, rounds=True)
    assert found[3:] == [BATCH * HEADS * 1024 * rounded_size * 4, BATCH * HEADS * 1024 * 4]
    # with symbols only the head size is rounded
    found = births(kernel, size, rounds=False)
    assert found[3:] == [BATCH * HEADS * 1000 * rounded_size * 4, BATCH * HEADS * 1000 * 4]


def test_efficient_attention_rounds_its_log_sum_exp_to_32() -> None:
    kernel = aten._scaled_dot_product_efficient_attention.default
    assert BATCH * HEADS * 1024 * 4 in births(kernel, 64, rounds=True)
    assert BATCH * HEADS * 1000 * 4 in births(kernel, 64, rounds=False)
