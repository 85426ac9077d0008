"""The meter on CUDA (and ROCm, through the same interface): counters say how much, the recorder what for.

The counters measure, on every step. The recorder follows the allocator's blocks for the first steps; where the highest
moment that it saw is what the counters say, it is told what that was for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import torch
from transformers import Trainer

from launcher.memory import Category, MeasuredPhase, Phase, Timeline
from launcher.worker.account import Account, AccountedPeak
from launcher.worker.events import EventSource, cuda_history, whole_blocks
from launcher.worker.recorder import Recorder, addresses_of
from launcher.worker.residents import all_live_tensors
from launcher.worker.unseen import WatchedTensors

RECORDED_PASSES: Final = {Phase.TRAIN_STEP: 2, Phase.EVALUATION: 4, Phase.GENERATION: 512}
"""Forward passes that are recorded of a phase: those after them hold the same, unless they are longer. A global batch may
be hundreds of micro batches here."""


class CudaMeter:
    """Allocated, reserved and device peaks per phase on CUDA.

    The counters are the host's: they move when a tensor is made or dropped, not when a kernel runs, so nothing
    waits for the device. They include what torch's matrix library takes for its workspaces, and whole blocks:
    512 bytes at least, and without expandable segments up to 1 MiB that was not worth splitting off.

    Args:
        buckets: Bytes of each bucket of gradients that Python may not see.
        residents: What the run's lasting tensors are for, asked at the borders of phases.
        cuda: torch.cuda.
        events: What tells of its allocator; None: its history.
    """

    name = "torch.cuda allocator counters and NVML"

    def __init__(
        self,
        buckets: Callable[[], Iterable[int]] = tuple,
        residents: Callable[[], Mapping[Category, Sequence[torch.Tensor]]] = dict,
        cuda: Any = torch.cuda,
        events: EventSource | None = None,
    ) -> None:
        self._cuda = cuda
        self._buckets = buckets
        self._recorder = Recorder(
            cuda_history() if events is None else events,
            self._open_account,
            residents,
            close_account=_name_workspaces,
            passes=RECORDED_PASSES,
        )
        self._peaks: dict[Phase, MeasuredPhase] = {}
        self._phase = Phase.LOAD
        self._card_before_bytes = _card_bytes(cuda)  # other processes'; this one has hardly begun
        cuda.reset_peak_memory_stats()

    @property
    def step(self) -> Timeline | None:
        """See `Meter`."""
        return self._recorder.step

    @contextmanager
    def measure_load(self) -> Iterator[None]:
        """Measures loading: what is alive afterwards, and the highest transient above that."""
        yield
        self._fold()
        peak = self._peaks[Phase.LOAD].allocated_bytes
        after = self._cuda.memory_allocated()
        parts = {Category.PARAMETERS: after, Category.TEMPORARIES: peak - after}
        self._recorder.peaks[Phase.LOAD] = AccountedPeak(peak, parts)

    def watch(self, trainer: Trainer) -> None:
        """See `Meter`."""
        self._recorder.listen(trainer)

    def enter(self, phase: Phase, steps: int) -> None:
        """See `Meter`; every step is measured, the first ones are recorded."""
        self._fold()
        self._phase = phase
        self._recorder.enter(phase, steps)

    def receive(self, batch: Iterable[torch.Tensor]) -> None:
        """See `Meter`; the loader's own tensors are on the host, and in no account."""
        self._recorder.receive(batch)

    def finish(self) -> tuple[MeasuredPhase, ...]:
        """See `Meter`."""
        self._fold()
        self._recorder.mark_residents()
        if self._recorder.is_on:
            self._recorder.fold()
        return tuple(self._with_categories(self._peaks[phase]) for phase in Phase if phase in self._peaks)

    def abandon(self) -> None:
        """See `Meter`."""
        self._recorder.abandon()

    def _with_categories(self, peak: MeasuredPhase) -> MeasuredPhase:
        """The peak with what it was for, where the recorder saw it: a longer batch may have come later."""
        seen = self._recorder.peaks.get(peak.phase)
        if seen is None or seen.allocated_bytes != peak.allocated_bytes:
            return peak
        return replace(peak, by_category_bytes=seen.by_category_bytes)

    def _open_account(self, account: Account, watched: WatchedTensors) -> None:
        here = self._cuda.current_device()
        for segment in self._cuda.memory_snapshot():
            for block in segment["blocks"]:
                if segment["device"] == here and block["state"] == "active_allocated":
                    account.take(block["address"], block["size"])
        account.mark_buckets(map(whole_blocks, self._buckets()))

    def _fold(self) -> None:
        seen = self._peaks.get(self._phase)
        allocated = self._cuda.max_memory_allocated()
        reserved = self._cuda.max_memory_reserved()
        if seen is not None:
            allocated = max(allocated, seen.allocated_bytes)
        if seen is None or reserved > (seen.reserved_bytes or 0):
            # what is reserved now is less than at the peak where memory was given back since
            device = self.held_bytes() - self._cuda.memory_reserved() + reserved
        else:  # the driver takes milliseconds to answer, and has nothing new to say
            reserved, device = seen.reserved_bytes or 0, seen.device_bytes or 0
        self._peaks[self._phase] = MeasuredPhase(self._phase, allocated, reserved, device)
        self._cuda.reset_peak_memory_stats()

    def held_bytes(self) -> int:
        """What this process holds on the device now: context, kernels, and what its allocator reserved.

        Containers may hide process ids from the driver's library, or the library altogether: then it is what the
        card holds more than before, or all that it holds, which is wrong where others use the card meanwhile.
        """
        used = process_device_bytes(_listed_processes(self._cuda), os.getpid())
        if used is not None:
            return used
        card = _card_bytes(self._cuda)
        if card is not None and self._card_before_bytes is not None:
            return card - self._card_before_bytes
        free, total = self._cuda.mem_get_info()
        return int(total) - int(free)


def _name_workspaces(account: Account) -> None:
    """Blocks that stay and in which no tensor lies are the matrix library's: it takes them once, and keeps them."""
    account.claim(set(addresses_of(all_live_tensors())), Category.WORKSPACES)


def process_device_bytes(listing: str, pid: int) -> int | None:
    """What a process uses on the device, as `torch.cuda.list_gpu_processes` words it; None where it is not listed."""
    for line in listing.splitlines():
        words = line.split()
        if words[:1] == ["process"] and words[1:3] == [str(pid), "uses"]:
            return int(float(words[3]) * (1 << 20))
    return None


def _listed_processes(cuda: Any) -> str:
    try:
        listing: str = cuda.list_gpu_processes()
    except Exception:  # whatever the driver's library objects to, training goes on without this number
        return ""
    return listing


def _card_bytes(cuda: Any) -> int | None:
    """What all processes use on the device; None where the driver's library does not say."""
    try:
        return int(cuda.device_memory_used())
    except Exception:  # as above
        return None
