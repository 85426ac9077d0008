"""The meter: measures what really happened, never with the tracer's own bookkeeping.

On CUDA torch's allocator counters, and NVML for the device. On CPU the allocator has no counters: torch's
profiler reports every allocation and release of the CPU allocator, also those inside kernels, and their
running sum on top of what was alive before is the measurement. What each block is for follows from where in the
step it was taken, and from the live objects that lie in it.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer

from launcher.memory import Category, MeasuredPhase, Phase, Region, Timeline, last_step
from launcher.regions import RegionWatch
from launcher.run_record import WORKER_MARK
from launcher.worker.account import Account, AccountedPeak
from launcher.worker.collectives import settled_collectives
from launcher.worker.residents import all_live_tensors, distinct_storages, live_tensor_bytes
from launcher.worker.unseen import NOTE_MARK, Notes, WatchedTensors

METERED_STEPS = 2
"""Optimizer steps under the CPU meter: the profiler is too dear for a whole run."""
MEMORY_EVENT = "[memory]"
"""What torch's profiler calls a change of the allocator's bytes."""


class Meter(Protocol):
    """What measures one process."""

    name: str
    """How it measures."""
    step: Timeline | None
    """The last optimizer step of which every allocation was seen; None where none was."""

    def measure_load(self) -> AbstractContextManager[None]:
        """Measures what happens inside: loading weights and attaching adapters."""

    def watch(self, trainer: Trainer) -> None:
        """Follows the passes of the trainer's model, if the meter can tell what memory is for; before it trains."""

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
        self._residents = residents
        self._peaks: dict[Phase, AccountedPeak] = {}
        self._profiler: Any = None
        self._while_profiled = ExitStack()
        self._account = Account(Phase.LOAD)
        self._notes = Notes()
        self._watched = WatchedTensors(self._notes)
        self._regions = RegionWatch(self._enter_region, self._mark_residents)
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
        totals = self._stop().totals
        after = live_tensor_bytes(all_live_tensors()) - before
        # weights mapped from files never pass the allocator; they count as what is alive afterwards
        transient = max(0, max(totals, default=0) - (totals[-1] if totals else 0))
        parts = {Category.PARAMETERS: after, Category.TEMPORARIES: before + transient}
        self._peaks[Phase.LOAD] = AccountedPeak(sum(parts.values()), parts)

    def watch(self, trainer: Trainer) -> None:
        """See `Meter`."""
        self._regions.listen(trainer)
        self._mark_residents()  # an engine will put others in their place

    def enter(self, phase: Phase, steps: int) -> None:
        """See `Meter`."""
        self._note_process()
        self._phase = phase
        wanted = steps < METERED_STEPS or phase not in (Phase.TRAIN_STEP, Phase.OPTIMIZER_STEP)
        wanted = wanted and (steps < METERED_STEPS or phase not in self._seen)
        begins = phase is Phase.TRAIN_STEP and phase not in self._seen
        self._mark_residents()
        if self._profiler is not None and (begins or not wanted):
            # when training begins the account begins anew: what gloo's threads released of DDP's first broadcast, the
            # profiler, which reports no memory of other threads, has not seen
            self._fold_account()
        if self._profiler is None and wanted:
            self._start(phase, all_live_tensors())
        self._regions.region = Region.OUTSIDE
        if self._profiler is not None:
            self._notes.write(lambda account: account.enter_phase(phase))
            self._seen.add(phase)

    def receive(self, batch: Iterable[torch.Tensor]) -> None:
        """See `Meter`."""
        if self._profiler is not None:
            tensors = list(batch)
            self._watched.receive(tensors)
            addresses = _addresses(tensors)
            self._notes.write(lambda account: account.mark(addresses, Category.INPUTS))

    def finish(self) -> tuple[MeasuredPhase, ...]:
        """See `Meter`."""
        self._mark_residents()
        if self._profiler is not None:
            self._fold_account()
        self._note_process()
        return tuple(
            MeasuredPhase(
                phase, peak.allocated_bytes, None, self._process_bytes.get(phase), peak.by_category_bytes
            )
            for phase in Phase
            if (peak := self._peaks.get(phase)) is not None
        )

    def abandon(self) -> None:
        """See `Meter`."""
        if self._profiler is not None:
            self._while_profiled.close()
            self._profiler.stop()
            self._profiler = None

    def _enter_region(self, region: Region) -> None:
        if self._profiler is not None:
            self._notes.write(lambda account: account.enter_region(region))

    def _mark_residents(self) -> None:
        if self._profiler is not None:
            for category, addresses in self._resident_addresses():
                self._notes.write(partial(Account.mark, addresses=addresses, category=category))

    def _resident_addresses(self) -> list[tuple[Category, list[int]]]:
        return [(category, _addresses(tensors)) for category, tensors in self._residents().items()]

    def _note_process(self) -> None:
        """The process's highest memory by the end of the phase, the kernel's view: it never falls."""
        highest = process_memory_bytes().get("peak")
        if highest is not None:
            self._process_bytes[self._phase] = highest

    def _start(self, phase: Phase, alive: Sequence[torch.Tensor]) -> None:
        self._account, self._notes = Account(phase), Notes()
        self._watched = WatchedTensors(self._notes)
        self._watched.hold(self._account, alive)
        for category, addresses in self._resident_addresses():
            self._account.mark(addresses, category)
        self._account.hold_buckets(self._buckets())
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profiler.start()
        self._while_profiled.enter_context(settled_collectives())

    def _stop(self) -> Account:
        """What was held, moment by moment, since the profiler began."""
        self._while_profiled.close()
        self._profiler.stop()
        profiler, self._profiler = self._profiler, None
        account, notes = self._account, self._notes
        self._account, self._notes = Account(self._phase), Notes()
        self._watched = WatchedTensors(self._notes)
        for _, name, address, num_bytes in sorted(
            _memory_events(profiler.profiler.kineto_results.experimental_event_tree()), key=itemgetter(0)
        ):
            if name:
                notes.read(name, account)
            elif num_bytes > 0:
                account.take(address, num_bytes)
            else:
                account.give_back(address, -num_bytes)
        return account

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

    def _fold(self, account: Account) -> None:
        for phase, peak in account.peaks().items():
            seen = self._peaks.get(phase)
            if seen is None or peak.allocated_bytes > seen.allocated_bytes:
                self._peaks[phase] = peak
        if Phase.OPTIMIZER_STEP in account.phases:
            self.step = last_step(account.totals, account.phases)


def _addresses(tensors: Iterable[torch.Tensor]) -> list[int]:
    return [storage.data_ptr() for storage in distinct_storages(tensors)]


def _memory_events(roots: Sequence[Any]) -> Iterator[tuple[int, str, int, int]]:
    """What the profiler saw of memory, and the notes in between: time, note, address, bytes taken or given back."""
    waiting = list(reversed(roots))
    while waiting:
        event = waiting.pop()
        waiting.extend(reversed(event.children))
        name = event.name
        if name == MEMORY_EVENT:
            change = event.extra_fields
            yield event.start_time_ns, "", change.ptr, change.alloc_size
        elif name.startswith(NOTE_MARK):
            yield event.start_time_ns, name, 0, 0


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

    def watch(self, trainer: Trainer) -> None:
        """See `Meter`; counters don't tell what memory is for."""

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
