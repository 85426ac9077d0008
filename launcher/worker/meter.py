"""The meter: measures what really happened, never with the tracer's own bookkeeping.

On a CPU the allocator has no counters: what the recorder saw is the measurement. `launcher.worker.cuda_meter` reads
counters, and has the recorder tell what they count.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from transformers import Trainer

from launcher.memory import Category, MeasuredPhase, Phase, Timeline
from launcher.worker.account import Account, AccountedPeak
from launcher.worker.collectives import settled_collectives
from launcher.worker.events import ProfilerEvents
from launcher.worker.recorder import Recorder
from launcher.worker.residents import all_live_tensors, live_tensor_bytes
from launcher.worker.unseen import WatchedTensors


class Meter(Protocol):
    """What measures one process."""

    name: str
    """How it measures."""

    @property
    def step(self) -> Timeline | None:
        """The last optimizer step that was recorded; None where none was."""

    def measure_load(self) -> AbstractContextManager[None]:
        """Measures what happens inside: loading weights and attaching adapters."""

    def watch(self, trainer: Trainer) -> None:
        """Follows the passes of the trainer's model, if the meter can tell what memory is for; before it trains."""

    def enter(self, phase: Phase, steps: int) -> None:
        """The training loop enters a phase after so many finished optimizer steps."""

    def receive(self, batch: Iterable[torch.Tensor]) -> None:
        """The loader hands over a batch, part of which torch's allocator may not have made, or the model gets it."""

    def finish(self) -> tuple[MeasuredPhase, ...]:
        """Stops measuring and returns the peak of every phase that was seen."""

    def abandon(self) -> None:
        """Stops measuring, and reads nothing."""


class CpuMeter:
    """Allocator-level peaks on CPU, from the profiler's memory events.

    Args:
        buckets: Bytes of each bucket of gradients that Python may not see, asked whenever the meter begins to count anew.
        residents: What the run's lasting tensors are for, asked at the borders of phases.
    """

    name = "torch.profiler memory events"

    def __init__(
        self,
        buckets: Callable[[], Iterable[int]] = tuple,
        residents: Callable[[], Mapping[Category, Sequence[torch.Tensor]]] = dict,
    ) -> None:
        self._buckets = buckets
        self._recorder = Recorder(
            ProfilerEvents(), self._open_account, residents, while_recording=settled_collectives
        )
        self._phase = Phase.LOAD
        self._process_bytes: dict[Phase, int] = {}

    @property
    def step(self) -> Timeline | None:
        """See `Meter`."""
        return self._recorder.step

    @contextmanager
    def measure_load(self) -> Iterator[None]:
        """Measures reading the weights: what is alive afterwards, and the highest transient above that."""
        before = live_tensor_bytes(all_live_tensors())
        self._recorder.start(Phase.LOAD)
        yield
        gc.collect()  # what only cycles hold is not part of the model
        totals = self._recorder.stop().totals
        after = live_tensor_bytes(all_live_tensors()) - before
        # weights mapped from files never pass the allocator; they count as what is alive afterwards
        transient = max(0, max(totals, default=0) - (totals[-1] if totals else 0))
        parts = {Category.PARAMETERS: after, Category.TEMPORARIES: before + transient}
        self._recorder.peaks[Phase.LOAD] = AccountedPeak(sum(parts.values()), parts)

    def watch(self, trainer: Trainer) -> None:
        """See `Meter`."""
        self._recorder.listen(trainer)

    def enter(self, phase: Phase, steps: int) -> None:
        """See `Meter`."""
        self._note_process()
        self._phase = phase
        # when training begins the account begins anew: what gloo's threads released of DDP's first broadcast, the
        # profiler, which reports no memory of other threads, has not seen
        begins = phase is Phase.TRAIN_STEP and not self._recorder.has_seen(phase)
        self._recorder.enter(phase, steps, begins_anew=begins)

    def receive(self, batch: Iterable[torch.Tensor]) -> None:
        """See `Meter`."""
        self._recorder.receive(batch)

    def finish(self) -> tuple[MeasuredPhase, ...]:
        """See `Meter`."""
        self._recorder.mark_residents()
        if self._recorder.is_on:
            self._recorder.fold()
        self._note_process()
        return tuple(
            MeasuredPhase(
                phase, peak.allocated_bytes, None, self._process_bytes.get(phase), peak.by_category_bytes
            )
            for phase in Phase
            if (peak := self._recorder.peaks.get(phase)) is not None
        )

    def abandon(self) -> None:
        """See `Meter`."""
        self._recorder.abandon()

    def _open_account(self, account: Account, watched: WatchedTensors) -> None:
        watched.hold(account, all_live_tensors())
        account.hold_buckets(self._buckets())

    def _note_process(self) -> None:
        """The process's highest memory by the end of the phase, the kernel's view: it never falls."""
        highest = process_memory_bytes().get("peak")
        if highest is not None:
            self._process_bytes[self._phase] = highest


def process_memory_bytes() -> Mapping[str, int]:
    """Memory of this process: on CUDA the tensors' and the allocator's, on CPU the kernel's view, now and at its highest.

    CUDA's own peak is not told: the meter resets it at every phase.
    """
    if torch.cuda.is_available():
        return {"now": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
    status = Path("/proc/self/status")
    if not status.exists():
        return {}
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return {
        "now": int(fields["VmRSS"].split()[0]) << 10,
        "peak": int(fields["VmHWM"].split()[0]) << 10,
    }


def resident_peak_bytes() -> int | None:
    """Highest resident memory of this process, the kernel's view; None where it does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), None)
