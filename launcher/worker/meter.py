"""The meter: measures what really happened, never with the tracer's own bookkeeping.

On CUDA torch's allocator counters, and NVML for the device. On CPU the allocator has no counters: torch's
profiler reports every allocation and release of the CPU allocator, also those inside kernels, and their
running sum on top of what was alive before is the measurement.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from launcher.memory import MeasuredPhase, Phase, Timeline, last_step
from launcher.run_record import WORKER_MARK
from launcher.worker.collectives import settled_collectives
from launcher.worker.residents import all_live_tensors, live_tensor_bytes
from launcher.worker.unseen import DROP_MARK, RECEIVE_MARK, RELEASE_MARK, EarlierTensors, ForeignTensors

METERED_STEPS = 2
"""Optimizer steps under the CPU meter: the profiler is too dear for a whole run."""
PHASE_MARK = "launcher.phase:"
MARKS = (PHASE_MARK, RECEIVE_MARK, RELEASE_MARK, DROP_MARK)


class Meter(Protocol):
    """What measures one process."""

    name: str
    """How it measures."""
    step: Timeline | None
    """The last optimizer step of which every allocation was seen; None where none was."""

    def measure_load(self) -> AbstractContextManager[None]:
        """Measures what happens inside: loading weights and attaching adapters."""

    def enter(self, phase: Phase, steps: int) -> None:
        """The training loop enters a phase after so many finished optimizer steps."""

    def receive(self, batch: Iterable[torch.Tensor]) -> None:
        """The loader hands over a batch, part of which torch's allocator may not have made."""

    def finish(self) -> tuple[MeasuredPhase, ...]:
        """Stops measuring and returns the peak of every phase that was seen."""

    def abandon(self) -> None:
        """Stops measuring; a process that ends while torch's profiler runs may crash on its way out (torch 2.13)."""


class CpuMeter:
    """Allocator-level peaks on CPU, from the profiler's memory events.

    Args:
        native_bytes: Bytes of tensors that Python doesn't see, asked whenever the meter begins to count anew.
    """

    name = "torch.profiler memory events"

    def __init__(self, native_bytes: Callable[[], int] = lambda: 0) -> None:
        self._native_bytes = native_bytes
        self._peaks: dict[Phase, int] = {}
        self._profiler: Any = None
        self._while_profiled = ExitStack()
        self._earlier = EarlierTensors(())
        self._foreign = ForeignTensors()
        self._base_bytes = 0
        self._first_phase = Phase.LOAD
        self._seen: set[Phase] = set()
        self.step: Timeline | None = None
        self._phase = Phase.LOAD
        self._process_bytes: dict[Phase, int] = {}

    @contextmanager
    def measure_load(self) -> Iterator[None]:
        """Measures reading the weights: what is alive afterwards, and the highest transient above that."""
        before = live_tensor_bytes(all_live_tensors())
        self._start(Phase.LOAD, ())
        yield
        gc.collect()  # what only cycles hold is not part of the model
        cumulative = self._stop()
        after = live_tensor_bytes(all_live_tensors()) - before
        highest = max((total for _, total in cumulative), default=0)
        final = cumulative[-1][1] if cumulative else 0
        # weights mapped from files never pass the allocator; they count as what is alive afterwards
        self._peaks[Phase.LOAD] = before + after + max(0, highest - final)

    def enter(self, phase: Phase, steps: int) -> None:
        """See `Meter`."""
        self._note_process()
        self._phase = phase
        wanted = steps < METERED_STEPS or phase not in (Phase.TRAIN_STEP, Phase.OPTIMIZER_STEP)
        wanted = wanted and (steps < METERED_STEPS or phase not in self._seen)
        begins = phase is Phase.TRAIN_STEP and phase not in self._seen
        if self._profiler is not None and (begins or not wanted):
            # when training begins the account begins anew: what gloo's threads released of DDP's first broadcast, the
            # profiler, which reports no memory of other threads, has not seen
            self._fold_account()
        if self._profiler is None and wanted:
            alive = all_live_tensors()
            self._base_bytes = live_tensor_bytes(alive) + self._native_bytes()
            self._start(phase, alive)
        if self._profiler is not None:
            with record_function(PHASE_MARK + phase.value):
                pass
            self._seen.add(phase)

    def receive(self, batch: Iterable[torch.Tensor]) -> None:
        """See `Meter`."""
        self._foreign.receive(batch)

    def finish(self) -> tuple[MeasuredPhase, ...]:
        """See `Meter`."""
        if self._profiler is not None:
            self._fold_account()
        self._note_process()
        return tuple(
            MeasuredPhase(phase, self._peaks[phase], None, self._process_bytes.get(phase))
            for phase in Phase
            if phase in self._peaks
        )

    def abandon(self) -> None:
        """See `Meter`."""
        if self._profiler is not None:
            self._while_profiled.close()
            self._profiler.stop()
            self._profiler = None

    def _note_process(self) -> None:
        """The process's highest memory by the end of the phase, the kernel's view: it never falls."""
        highest = process_memory_bytes().get("peak")
        if highest is not None:
            self._process_bytes[self._phase] = highest

    def _start(self, phase: Phase, alive: Sequence[torch.Tensor]) -> None:
        self._first_phase = phase
        self._earlier = EarlierTensors(alive)
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profiler.start()
        self._while_profiled.enter_context(settled_collectives())

    def _stop(self) -> list[tuple[Phase, int]]:
        """Running sum after every memory event, with the phase it fell into."""
        self._while_profiled.close()
        self._profiler.stop()
        profiler, self._profiler = self._profiler, None
        events = profiler.profiler.kineto_results.events()
        timeline = sorted(
            (
                (event.start_ns(), event.name(), event.nbytes())
                for event in events
                if event.name() == "[memory]" or event.name().startswith(MARKS)
            ),
            key=lambda item: item[0],
        )
        phase, total, sums = self._first_phase, 0, []
        dropped = 0  # marked, and perhaps about to be reported
        for _, name, num_bytes in timeline:
            if name == "[memory]":
                total -= 0 if num_bytes == -dropped else dropped
                dropped = 0
                total += 0 if self._earlier.ends_file(num_bytes) else num_bytes
                sums.append((phase, total))
            elif name.startswith(DROP_MARK):
                total -= dropped
                dropped = int(name.removeprefix(DROP_MARK))
            elif name.startswith((RECEIVE_MARK, RELEASE_MARK)):
                sign = 1 if name.startswith(RECEIVE_MARK) else -1
                total += sign * int(name.partition(":")[2])
                sums.append((phase, total))
            else:
                phase = Phase(name.removeprefix(PHASE_MARK))
                sums.append((phase, total))
        return sums

    def _fold_account(self) -> None:
        """Adds what was seen to the peaks, or says that there is no room to read it.

        The account of a step is megabytes of Python's objects, of which the training needs none: a run that has come
        this far is not ended for them.
        """
        try:
            self._fold(self._stop())
        except MemoryError:
            sys.stderr.write(
                f"{WORKER_MARK}no memory to read the meter: these phases have no measured peak\n"
            )

    def _fold(self, sums: Sequence[tuple[Phase, int]]) -> None:
        for phase, total in sums:
            self._peaks[phase] = max(self._peaks.get(phase, 0), self._base_bytes + total)
        phases = [phase for phase, _ in sums]
        if Phase.OPTIMIZER_STEP in phases:
            self.step = last_step([self._base_bytes + total for _, total in sums], phases)


class CudaMeter:
    """Allocated, reserved and device peaks per phase on CUDA (and ROCm, through the same interface).

    The counters are the host's: they move when a tensor is made or dropped, not when a kernel runs, so nothing
    waits for the device. They include what torch's matrix library takes for its workspaces, and whole blocks:
    512 bytes at least, and without expandable segments up to 1 MiB that was not worth splitting off.

    Args:
        cuda: torch.cuda.
    """

    name = "torch.cuda allocator counters and NVML"
    step: Timeline | None = None  # counters have no timeline; torch's memory history would slow the run down

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self._peaks: dict[Phase, MeasuredPhase] = {}
        self._phase = Phase.LOAD
        self._card_before_bytes = _card_bytes(cuda)  # other processes'; this one has hardly begun
        cuda.reset_peak_memory_stats()

    @contextmanager
    def measure_load(self) -> Iterator[None]:
        """Measures loading."""
        yield
        self._fold()

    def enter(self, phase: Phase, steps: int) -> None:
        """See `Meter`; every step is measured."""
        self._fold()
        self._phase = phase

    def receive(self, batch: Iterable[torch.Tensor]) -> None:
        """See `Meter`; what reaches the device is in its counters."""

    def finish(self) -> tuple[MeasuredPhase, ...]:
        """See `Meter`."""
        self._fold()
        return tuple(self._peaks[phase] for phase in Phase if phase in self._peaks)

    def abandon(self) -> None:
        """See `Meter`; counters cost nothing."""

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
