"""The CPU meter against allocations worked out by hand: peaks per phase, loading, residents, live tensors.

The meter never asks the tracer; here it watches plain tensors whose sizes are known.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from launcher.memory import Category, Phase
from launcher.worker.cuda_meter import CudaMeter, process_device_bytes
from launcher.worker.events import ProfilerEvents
from launcher.worker.held import MappedFile, mapped_files
from launcher.worker.meter import CpuMeter, process_memory_bytes
from launcher.worker.recorder import METERED_STEPS
from launcher.worker.residents import (
    live_tensor_bytes,
    resident_tensors,
    weigh_gradients,
    weigh_residents,
)

MIB = 1 << 20
SLACK_BYTES = 4096
"""Profiler marks and small bookkeeping tensors."""


def peaks_of(meter: CpuMeter) -> dict[Phase, int]:
    return {phase.phase: phase.allocated_bytes for phase in meter.finish()}


def other_tensors_bytes(*known: torch.Tensor) -> int:
    """Bytes of tensors that other tests left behind, which the meter counts as alive before."""
    gc.collect()
    alive = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return live_tensor_bytes(alive) - live_tensor_bytes(known)


def test_peak_is_what_was_alive_before_plus_what_is_born() -> None:
    resident = torch.ones(MIB, dtype=torch.uint8)
    base = other_tensors_bytes(resident)
    meter = CpuMeter()
    meter.enter(Phase.TRAIN_STEP, 0)
    first = torch.ones(2 * MIB, dtype=torch.uint8)
    second = torch.ones(3 * MIB, dtype=torch.uint8)
    del first
    third = torch.ones(MIB, dtype=torch.uint8)
    del second, third
    meter.enter(Phase.OPTIMIZER_STEP, 0)
    fourth = torch.ones(4 * MIB, dtype=torch.uint8)
    del fourth
    peaks = peaks_of(meter)
    assert peaks[Phase.TRAIN_STEP] - base == pytest.approx(6 * MIB, abs=SLACK_BYTES)
    assert peaks[Phase.OPTIMIZER_STEP] - base == pytest.approx(5 * MIB, abs=SLACK_BYTES)


def test_temporaries_inside_a_kernel_are_seen() -> None:
    """An outer product summed away: the product is never held by Python, and still counts."""
    column, row = torch.ones(1024, 1), torch.ones(1, 1024)
    base = other_tensors_bytes()
    meter = CpuMeter()
    meter.enter(Phase.TRAIN_STEP, 0)
    total = (column + row).sum()
    peaks = peaks_of(meter)
    assert total.item() == 2 * 1024 * 1024
    assert peaks[Phase.TRAIN_STEP] - base == pytest.approx(4 * MIB, abs=SLACK_BYTES)


class Backbone(nn.Module):
    """Keeps a mebibyte for the backward pass, and takes another meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(MIB // 4))
        self.base_model = self  # as transformers' models have it: this one is its own backbone

    def forward(self, scale: torch.Tensor) -> BaseModelOutput:
        passing = torch.ones(MIB // 4) * 2
        hidden = self.weight * scale
        del passing
        return BaseModelOutput(last_hidden_state=hidden)


def test_what_memory_is_for_is_told_apart() -> None:
    """A weight of 1 MiB; kept for the backward pass 1 MiB; scores of 2 MiB; a gradient; two states of AdamW."""
    model = Backbone()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    meter = CpuMeter(residents=lambda: resident_tensors(model, optimizer))
    trainer: Any = SimpleNamespace(model=model, accelerator=SimpleNamespace(backward=torch.Tensor.backward))
    meter.watch(trainer)
    for step in range(2):
        meter.enter(Phase.TRAIN_STEP, step)
        batch = [torch.ones(MIB // 4)]
        meter.receive(batch)
        hidden = model(batch[0]).last_hidden_state
        scores = torch.cat([hidden, hidden])
        trainer.accelerator.backward(scores.square().sum())
        del hidden, scores
        meter.enter(Phase.OPTIMIZER_STEP, step)
        optimizer.step()
        meter.enter(Phase.TRAIN_STEP, step + 1)
        optimizer.zero_grad()
        batch.clear()
    train, update = (phase.by_category_bytes for phase in meter.finish())
    assert train is not None and update is not None
    for category, lasting in ((Category.PARAMETERS, 1), (Category.OPTIMIZER_STATE, 2), (Category.INPUTS, 1)):
        assert train[category] == update[category] == pytest.approx(lasting * MIB, abs=64)
    assert update[Category.GRADIENTS] == MIB
    # backward: the scores, their square's gradient, and what the sum spreads, before the backbone is reached
    assert train[Category.ACTIVATIONS] == MIB
    assert train[Category.LOGITS_AND_LOSS] >= 2 * MIB
    assert Category.ACTIVATIONS not in update


def test_only_the_first_steps_are_profiled() -> None:
    meter = CpuMeter()
    for step in range(METERED_STEPS + 3):
        meter.enter(Phase.TRAIN_STEP, step)
        late = torch.ones((64 if step >= METERED_STEPS else 1) * MIB, dtype=torch.uint8)
        del late
        meter.enter(Phase.OPTIMIZER_STEP, step)
    peaks = peaks_of(meter)
    assert peaks[Phase.TRAIN_STEP] < other_tensors_bytes() + 32 * MIB


def test_a_late_first_evaluation_is_still_measured() -> None:
    meter = CpuMeter()
    for step in range(METERED_STEPS + 2):
        meter.enter(Phase.TRAIN_STEP, step)
    base = other_tensors_bytes()
    meter.enter(Phase.EVALUATION, METERED_STEPS + 2)
    evaluated = torch.ones(7 * MIB, dtype=torch.uint8)
    del evaluated
    meter.enter(Phase.TRAIN_STEP, METERED_STEPS + 2)
    assert peaks_of(meter)[Phase.EVALUATION] - base == pytest.approx(7 * MIB, abs=SLACK_BYTES)


SHORT = """
import resource
import torch
from launcher.memory import Phase
from launcher.worker.meter import CpuMeter, process_memory_bytes

meter = CpuMeter()
with meter.measure_load():
    weights = torch.ones(1 << 20)
meter.enter(Phase.TRAIN_STEP, 0)
small = torch.ones(1)
for _ in range(30_000):
    small = small + small
with open("/proc/self/statm") as statm:
    size = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (4 << 20), resource.RLIM_INFINITY))
meter.enter(Phase.EVALUATION, 2)
print("went on:", [peak.phase.value for peak in meter.finish()])
"""


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="the limit is put just above what Linux counts"
)
def test_an_account_that_has_no_room_is_lost_and_ends_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHORT], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "no memory to read the meter" in done.stderr
    assert done.stdout.startswith("went on: ['load'") and "train_step" not in done.stdout


def test_arrays_of_numpy_count_from_their_batch_until_they_are_dropped() -> None:
    base = other_tensors_bytes()
    meter = CpuMeter()
    meter.enter(Phase.TRAIN_STEP, 0)
    batch = {
        "pixels": torch.from_numpy(np.ones(6 * MIB, dtype=np.uint8)),
        "ids": torch.ones(MIB, dtype=torch.uint8),
    }
    batch["half"] = batch["pixels"][: 3 * MIB]  # one storage counts once
    meter.receive(batch.values())
    meter.receive(batch.values())
    batch.clear()
    meter.enter(Phase.OPTIMIZER_STEP, 0)
    late = torch.ones(2 * MIB, dtype=torch.uint8)
    del late
    peaks = peaks_of(meter)
    assert peaks[Phase.TRAIN_STEP] - base == pytest.approx(7 * MIB, abs=SLACK_BYTES)
    assert peaks[Phase.OPTIMIZER_STEP] - base == pytest.approx(2 * MIB, abs=SLACK_BYTES)


def test_what_the_profiler_never_saw_born_is_missed_when_it_is_dropped() -> None:
    """Weights from a thread of their own, one by one in another place: no more than one is there twice."""
    weights: list[torch.Tensor] = []
    base = other_tensors_bytes()
    meter = CpuMeter()
    with meter.measure_load():
        thread = Thread(target=lambda: weights.extend(torch.ones(4 * MIB // 4) for _ in range(4)))
        thread.start()
        thread.join()
    before = live_tensor_bytes(weights)
    meter.enter(Phase.TRAIN_STEP, 0)
    for index in range(4):
        weights[index] = weights[index].clone()
    meter.enter(Phase.OPTIMIZER_STEP, 0)
    again = weights.pop().clone()  # one that it did see born
    del again
    step, update = meter.finish()[1:]
    assert before == 16 * MIB
    for measured in (step, update):
        assert measured.allocated_bytes - base == pytest.approx(20 * MIB, abs=SLACK_BYTES)


def test_loading_counts_the_transient_above_what_stays() -> None:
    base = other_tensors_bytes()
    meter = CpuMeter()
    with meter.measure_load():
        stored = torch.ones(2 * MIB, dtype=torch.bfloat16)
        held = stored.float()
        del stored
    assert peaks_of(meter)[Phase.LOAD] - base == pytest.approx(12 * MIB, abs=SLACK_BYTES)
    assert held.numel() == 2 * MIB


def test_weights_of_a_mapped_file_count_until_each_is_dropped(tmp_path: Path) -> None:
    """Of two weights one is replaced by a larger one, then the other: the file ends with the second."""
    path = tmp_path / "model.safetensors"
    save_file({name: torch.ones(MIB, dtype=torch.uint8) for name in ("first", "second")}, path)
    weights = load_file(path)
    base = other_tensors_bytes()
    meter = CpuMeter()
    meter.enter(Phase.MERGE, 0)
    for name in ("first", "second"):
        weights[name] = torch.ones(3 * MIB, dtype=torch.uint8)
    # 1 + 1 + 3, then 1 + 3 + 3
    assert peaks_of(meter)[Phase.MERGE] == pytest.approx(base + 5 * MIB, abs=SLACK_BYTES)
    assert sum(weight.numel() for weight in weights.values()) == 6 * MIB


def test_weight_files_are_found_among_the_mappings() -> None:
    maps = (
        "7f00-7f10 r--p 00000000 fe:01 12 /some where/model.safetensors\n"
        "8f00-8f20 r-xp 00000000 fe:01 13 /usr/lib/libc.so.6\n9f00-9f10 rw-p 00000000 00:00 0\n"
    )
    assert mapped_files(maps) == (MappedFile(0x7F00, 0x7F10),)


def test_residents_are_weighed_once_each() -> None:
    model = nn.Linear(256, 256, bias=False)
    model.tied = model.weight
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 256)).sum().backward()
    assert weigh_gradients(model) == 256 * 256 * 4
    optimizer.step()
    resident = weigh_residents(model, optimizer)
    assert resident[Category.PARAMETERS] == 256 * 256 * 4
    assert resident[Category.BUFFERS] == 0
    assert resident[Category.OPTIMIZER_STATE] == 2 * 256 * 256 * 4 + 4  # two moments and a step counter


def test_views_share_their_storage() -> None:
    base = torch.ones(1000)
    assert live_tensor_bytes([base, base[10:], base.view(10, 100)]) == 4000


def test_process_memory_has_a_peak_above_now() -> None:
    memory = process_memory_bytes()
    assert 0 < memory["now"] <= memory["peak"]


class Card:
    """Stands in for torch.cuda, which is not here: counters as torch has them, set by hand."""

    def __init__(self) -> None:
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.listing = ""
        self.others: int | None = 7 * MIB
        self.context = 100 * MIB

    def hold(self, allocated: int, reserved: int) -> None:
        self.allocated, self.reserved = allocated, reserved
        self.peak_allocated = max(self.peak_allocated, allocated)
        self.peak_reserved = max(self.peak_reserved, reserved)
        self.listing = (
            f"GPU:0\nprocess {os.getpid():>10d} uses {(reserved + self.context) / MIB:>12.3f} MB GPU memory"
        )

    def reset_peak_memory_stats(self) -> None:
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def max_memory_allocated(self) -> int:
        return self.peak_allocated

    def max_memory_reserved(self) -> int:
        return self.peak_reserved

    def memory_allocated(self) -> int:
        return self.allocated

    def memory_reserved(self) -> int:
        return self.reserved

    def current_device(self) -> int:
        return 0

    def memory_snapshot(self) -> list[Any]:
        return []

    def list_gpu_processes(self) -> str:
        return self.listing

    def device_memory_used(self) -> int:
        if self.others is None:
            raise RuntimeError("no driver library")
        return self.others + (self.reserved + self.context if self.reserved else 0)

    def mem_get_info(self) -> tuple[int, int]:
        used = self.reserved + self.context
        return 1000 * MIB - used, 1000 * MIB


def test_cuda_peaks_are_of_their_phase_and_the_highest_of_all_steps() -> None:
    card = Card()
    meter = CudaMeter(cuda=card, events=ProfilerEvents())
    with meter.measure_load():
        card.hold(10 * MIB, 20 * MIB)
    for step, peak in enumerate((30, 50, 40)):
        meter.enter(Phase.TRAIN_STEP, step)
        card.hold(peak * MIB, 60 * MIB)
        card.hold(15 * MIB, 60 * MIB)
        meter.enter(Phase.OPTIMIZER_STEP, step)
        card.hold(16 * MIB, 60 * MIB)
        card.hold(10 * MIB, 60 * MIB)
    load, train, step_peak = meter.finish()
    assert (load.phase, load.allocated_bytes, load.reserved_bytes) == (Phase.LOAD, 10 * MIB, 20 * MIB)
    assert load.device_bytes == 120 * MIB
    assert (train.allocated_bytes, train.reserved_bytes, train.device_bytes) == (
        50 * MIB,
        60 * MIB,
        160 * MIB,
    )
    assert (step_peak.phase, step_peak.allocated_bytes) == (Phase.OPTIMIZER_STEP, 16 * MIB)


def test_cuda_device_peak_counts_what_was_given_back_before_the_driver_was_asked() -> None:
    card = Card()
    meter = CudaMeter(cuda=card, events=ProfilerEvents())
    card.hold(50 * MIB, 60 * MIB)
    card.hold(0, 10 * MIB)
    (load,) = meter.finish()
    assert load.device_bytes == 160 * MIB


@pytest.mark.parametrize("others", [7 * MIB, None], ids=["by the card", "without NVML"])
def test_cuda_device_bytes_where_process_ids_are_hidden(others: int | None) -> None:
    card = Card()
    card.others = others
    meter = CudaMeter(cuda=card, events=ProfilerEvents())
    card.hold(50 * MIB, 60 * MIB)
    card.listing = f"GPU:0\nprocess {os.getpid() + 1:>10d} uses {999:>12.3f} MB GPU memory"
    (load,) = meter.finish()
    assert load.device_bytes == 160 * MIB


def test_a_process_is_found_in_the_words_of_torch() -> None:
    listing = "GPU:0\nprocess       1234 uses      501.250 MB GPU memory\nprocess          5 uses 1234.000 MB GPU memory"
    assert process_device_bytes(listing, 1234) == int(501.25 * MIB)
    assert process_device_bytes(listing, 501) is None
    assert process_device_bytes("pynvml module not found, please install nvidia-ml-py", 1) is None
