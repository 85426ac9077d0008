"""What CUDA's meter tells beyond counters: real training on the host's memory, which plays the card's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from launcher.memory import Category, MeasuredPhase, Phase
from launcher.worker.cuda_meter import RECORDED_PASSES, CudaMeter
from launcher.worker.events import MOST_ENTRIES, Change, HistoryEvents, ProfilerEvents
from launcher.worker.residents import all_live_tensors, distinct_storages, resident_tensors

LENGTH = 64


class HostAsCard:
    """Stands in for torch.cuda: its blocks are the host's tensors, and its counter is the recorder's own sum."""

    def __init__(self, hidden: Sequence[dict[str, Any]] = ()) -> None:
        self.hidden = hidden

    def memory_snapshot(self) -> list[dict[str, Any]]:
        blocks = [
            {"address": storage.data_ptr(), "size": storage.nbytes(), "state": "active_allocated"}
            for storage in distinct_storages(all_live_tensors())
            if storage.nbytes()
        ]
        return [
            {"device": 0, "blocks": [*blocks, *self.hidden, {"address": 1, "size": 77, "state": "inactive"}]}
        ]

    def max_memory_allocated(self) -> int:
        return 0

    max_memory_reserved = memory_reserved = memory_allocated = device_memory_used = max_memory_allocated

    def current_device(self) -> int:
        return 0

    def list_gpu_processes(self) -> str:
        return ""

    def reset_peak_memory_stats(self) -> None:
        pass


class Accelerator:
    """As much of accelerate's as the meter listens to."""

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


class Run:
    """A small Llama that is trained, its meter, and what its trainer would say to it."""

    def __init__(self, card: HostAsCard) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=256,
        )
        self.model: Any = LlamaForCausalLM(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), foreach=False)
        self.accelerator = Accelerator()
        self.meter = CudaMeter(
            residents=lambda: resident_tensors(self.model, self.optimizer), cuda=card, events=ProfilerEvents()
        )

    def train(self, steps: int, accumulation: int) -> None:
        self.meter.enter(Phase.LOAD, 0)
        self.meter.watch(self)  # type: ignore[arg-type]
        for step in range(steps):
            self.meter.enter(Phase.TRAIN_STEP, step)
            for _ in range(accumulation):
                tokens = torch.randint(0, 256, (2, LENGTH))
                self.meter.receive([tokens])
                self.accelerator.backward(self.model(input_ids=tokens, labels=tokens).loss)
            self.meter.enter(Phase.OPTIMIZER_STEP, step)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.meter.enter(Phase.TRAIN_STEP, steps)

    def parameter_bytes(self) -> int:
        return sum(weight.numel() * 4 for weight in self.model.parameters())


def test_categories_of_a_step_come_from_its_first_passes() -> None:
    run = Run(HostAsCard())
    run.train(steps=3, accumulation=5)
    recorded = run.meter._recorder.peaks
    train = recorded[Phase.TRAIN_STEP].by_category_bytes
    update = recorded[Phase.OPTIMIZER_STEP].by_category_bytes
    size = run.parameter_bytes()
    assert train[Category.PARAMETERS] == update[Category.PARAMETERS] == size
    # the second pass of the second step: gradients of the first, and states of the step before
    assert train[Category.GRADIENTS] == update[Category.GRADIENTS] == size
    assert train[Category.OPTIMIZER_STATE] == pytest.approx(2 * size, rel=0.001)
    assert train[Category.ACTIVATIONS] > 2 * LENGTH * 64 * 4 * 2
    assert train[Category.LOGITS_AND_LOSS] >= 2 * LENGTH * 256 * 4
    assert train[Category.INPUTS] == 2 * LENGTH * 8
    assert Category.ACTIVATIONS not in update
    assert run.meter.step is not None
    assert {Phase.TRAIN_STEP, Phase.OPTIMIZER_STEP} == set(run.meter.step.phases)
    assert min(run.meter.step.allocated_bytes) >= 3 * size


def test_an_evaluation_is_followed_for_some_passes() -> None:
    run = Run(HostAsCard())
    run.train(steps=1, accumulation=1)
    run.meter.enter(Phase.EVALUATION, 1)
    kept: list[torch.Tensor] = []
    with torch.no_grad():
        for _ in range(RECORDED_PASSES[Phase.EVALUATION] + 3):
            assert run.meter._recorder.is_on == (len(kept) <= RECORDED_PASSES[Phase.EVALUATION])
            kept.append(run.model(input_ids=torch.zeros(2, LENGTH, dtype=torch.long)).logits)
    assert not run.meter._recorder.is_on
    run.meter.enter(Phase.EVALUATION, 5)
    assert not run.meter._recorder.is_on  # a phase that was seen


def test_what_stays_without_a_tensor_is_a_workspace() -> None:
    run = Run(HostAsCard(hidden=[{"address": 12345, "size": 1 << 20, "state": "active_allocated"}]))
    run.train(steps=2, accumulation=1)
    for phase in (Phase.TRAIN_STEP, Phase.OPTIMIZER_STEP):
        assert run.meter._recorder.peaks[phase].by_category_bytes[Category.WORKSPACES] == 1 << 20


@pytest.mark.parametrize("counted", ["as recorded", "more"])
def test_categories_are_told_where_the_counters_agree(counted: str) -> None:
    run = Run(HostAsCard())
    run.train(steps=2, accumulation=1)
    seen = run.meter._recorder.peaks[Phase.TRAIN_STEP]
    more = 0 if counted == "as recorded" else 512
    peak = MeasuredPhase(Phase.TRAIN_STEP, seen.allocated_bytes + more, None, None)
    told = run.meter._with_categories(peak)
    assert told.allocated_bytes == peak.allocated_bytes
    assert told.by_category_bytes == (None if more else seen.by_category_bytes)


def test_tied_weights_are_one_block() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8, bias=False)
            self.second = nn.Linear(8, 8, bias=False)
            self.second.weight = self.first.weight

    tied = Tied()
    meter = CudaMeter(
        residents=lambda: resident_tensors(tied, None), cuda=HostAsCard(), events=ProfilerEvents()
    )
    meter.enter(Phase.SAVE, 0)
    meter.enter(Phase.TRAIN_STEP, 5)
    assert meter._recorder.peaks[Phase.SAVE].by_category_bytes[Category.PARAMETERS] == 8 * 8 * 4


class Historian:
    """Stands in for torch.cuda: an allocator that counts, and keeps a history when asked, as torch's does."""

    def __init__(self) -> None:
        self.memory = self
        self.counts = {"allocation.all.allocated": 7, "allocation.all.freed": 3}
        self.entries: list[dict[str, Any]] | None = None
        self.live: dict[int, int] = {}

    def take(self, address: int, size: int) -> None:
        self.counts["allocation.all.allocated"] += 1
        self.live[address] = size
        self._note("segment_alloc", address, size)
        self._note("alloc", address, size)

    def free(self, address: int) -> None:
        self.counts["allocation.all.freed"] += 1
        size = self.live.pop(address)
        self._note("free_requested", address, size)
        self._note("free_completed", address, size)

    def _note(self, action: str, address: int, size: int) -> None:
        if self.entries is not None:
            self.entries.append({"action": action, "addr": address, "size": size})

    def memory_stats(self) -> dict[str, int]:
        return self.counts

    def current_device(self) -> int:
        return 1

    def _record_memory_history(self, enabled: str | None, **options: Any) -> None:
        self.entries = [] if enabled == "all" else None

    def _snapshot(self) -> dict[str, Any]:
        return {"device_traces": [[], list(self.entries or [])]}


def test_marks_stand_where_the_allocator_had_counted_so_far() -> None:
    card = Historian()
    card.take(1, 100)
    events = HistoryEvents(card, lambda: card.entries is not None)
    assert events.start()
    events.mark(0)
    card.take(2, 513)
    events.mark(1)
    events.mark(2)
    card.free(1)
    card.take(3, 0)
    card.free(2)
    events.mark(3)
    assert events.stop() == [0, Change(2, 1024), 1, 2, Change(1, -512), Change(3, 512), Change(2, -1024), 3]
    assert card.entries is None


def test_a_history_that_is_kept_for_another_is_left_alone() -> None:
    card = Historian()
    card._record_memory_history("all")
    assert not HistoryEvents(card, lambda: True).start()
    assert card.entries == []


def test_a_history_that_overflowed_says_nothing() -> None:
    card = Historian()
    events = HistoryEvents(card, lambda: False)
    events.start()
    card.entries = [{"action": "alloc", "addr": 1, "size": 1}] * MOST_ENTRIES
    assert events.stop() == []
