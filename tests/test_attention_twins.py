"""What CUDA's attention kernels keep for themselves, against sizes worked by hand from their sources, and torch's own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from launcher.planner import attention_twin, kernel_twins
from launcher.planner.fast_fake import FastFakeTensorMode
from launcher.planner.polynomial import TracedShape
from launcher.planner.tape import Tape

aten = torch.ops.aten
BATCH, HEADS, LENGTH = 2, 4, 1000
SHAPE = TracedShape(BATCH, LENGTH, batch_is_symbol=False, length_is_symbol=False)
LARGE = 100_000


def births(kernel: object, size: int, *, rounds: bool) -> list[int]:
    """Bytes of every block that one backward (or forward) pass of a kernel allocates, on bf16 inputs."""
    fake = FastFakeTensorMode()
    tape = Tape(SHAPE, fake=fake)
    with fake, tape:
        query = torch.empty(BATCH, HEADS, LENGTH, size, dtype=torch.bfloat16)
        begin = len(tape.events)
        twin = attention_twin.twins(SHAPE, rounds=rounds)[kernel]
        backward = kernel is aten._scaled_dot_product_flash_attention_backward.default
        twin(*((query,) if backward else ()), query, query, query)
        return [event.block.num_bytes for event in tape.events[begin:] if event.birth]


@pytest.mark.parametrize(("size", "rounded_size"), [(64, 64), (80, 96), (128, 128), (160, 192), (256, 256)])
def test_flashs_backward_pass_rounds_lengths_to_128_and_head_sizes(size: int, rounded_size: int) -> None:
    kernel = aten._scaled_dot_product_flash_attention_backward.default
    found = births(kernel, size, rounds=True)
    assert found[3:] == [BATCH * HEADS * 1024 * rounded_size * 4, BATCH * HEADS * 1024 * 4]
    # on ROCm only the head size is rounded
    found = births(kernel, size, rounds=False)
    assert found[3:] == [BATCH * HEADS * 1000 * rounded_size * 4, BATCH * HEADS * 1000 * 4]


def test_efficient_attention_rounds_its_log_sum_exp_to_32() -> None:
    kernel = aten._scaled_dot_product_efficient_attention.default
    assert BATCH * HEADS * 1024 * 4 in births(kernel, 64, rounds=True)
    assert BATCH * HEADS * 1000 * 4 in births(kernel, 64, rounds=False)


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1000, [2000000]), (1001, [2004002, 2018016, -2004002]), (1007, [2028098, 2030112, -2028098])],
)
def test_a_mask_becomes_a_bias_with_rows_a_multiple_of_8_apart(length: int, expected: list[int]) -> None:
    """By hand: length x length x 2 bytes, and where that is ragged length x the next multiple in place of it."""
    fake = FastFakeTensorMode()
    shape = TracedShape(1, length, batch_is_symbol=False, length_is_symbol=False)
    tape = Tape(shape, fake=fake)
    with fake, tape:
        mask = torch.empty(1, 1, length, length, dtype=torch.bool)
        begin = len(tape.events)
        bias = attention_twin.aligned_bias(mask, torch.bfloat16, shape)
        changes = [event.block.num_bytes * (1 if event.birth else -1) for event in tape.events[begin:]]
    assert changes == expected
    assert (bias.shape, bias.stride(-2) % 8) == (mask.shape, 0)


def real_allocations(run: Callable[[], object]) -> list[int]:
    """Sizes that torch's allocator gives and takes while something runs, from 100 kB on; signed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return [change for change in changes if abs(change) >= LARGE]


def traced_allocations(run: Callable[[], object]) -> list[int]:
    """The same on the tape."""
    fake = FastFakeTensorMode()
    tape = Tape(TracedShape(BATCH, 256, False, False), twins=kernel_twins.twins(exact=True), fake=fake)
    with fake, tape:
        run()
    changes = [event.block.num_bytes * (1 if event.birth else -1) for event in tape.events]
    return [change for change in changes if abs(change) >= LARGE]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_attention_with_all_scores_allocates_what_torchs_does(is_causal: bool, gradients: bool) -> None:
    """torch computes it alike on every device; releases between two births may come in any order."""

    def run(attention: Callable[..., torch.Tensor]) -> None:
        query = torch.ones(BATCH, 8, 256, 64)
        key, value = (torch.ones(BATCH, 2, 256, 64) for _ in range(2))
        inputs = [tensor.requires_grad_(gradients) for tensor in (query, key, value)]
        mask = None if is_causal else torch.ones(256, 256, dtype=torch.bool)
        with torch.set_grad_enabled(gradients):
            output = attention(*inputs, mask, is_causal)
        if gradients:
            output.backward(torch.ones_like(output))

    def torchs(query: Any, key: Any, value: Any, mask: Any, is_causal: bool) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return functional.scaled_dot_product_attention(
                query, key, value, mask, 0.0, is_causal, enable_gqa=True
            )

    def ours(query: Any, key: Any, value: Any, mask: Any, is_causal: bool) -> torch.Tensor:
        return attention_twin.all_scores_attention(query, key, value, mask, 0.0, is_causal, None)

    real, traced = real_allocations(lambda: run(torchs)), traced_allocations(lambda: run(ours))
    scores = BATCH * 8 * 256 * 256 * 4
    if not gradients:  # softmax's backward pass is the one thing that is CUDA's own
        assert highest(real) == highest(traced) > 2 * scores
        assert [size for size in real if size > 0] == [size for size in traced if size > 0]
    forward = slice(0, real.index(scores // 4))
    assert [size for size in real[forward] if size > 0] == [size for size in traced[forward] if size > 0]


def highest(changes: list[int]) -> int:
    """The most that is alive."""
    return max(accumulate(changes))
