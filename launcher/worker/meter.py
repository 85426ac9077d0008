"""The meter: measures what really happened, never with the tracer's own bookkeeping.

On CUDA torch's allocator counters, and NVML for the device. On CPU the allocator has no counters: torch's
profiler reports every allocation and release of the CPU allocator, also those inside kernels, and their
running sum on top of what was alive before is the measurement.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile, record_function

from launcher.memory import Category, MeasuredPhase, Phase

METERED_STEPS = 2
"""Optimizer steps under the CPU meter: the profiler is too dear for a whole run."""
PHASE_MARK = "launcher.phase:"


class Meter(Protocol):
    """What measures one process."""

    name: str
    """How it measures."""

    def measure_load(self) -> AbstractContextManager[None]:
        """Measures what happens inside: loading weights and attaching adapters."""

    def enter(self, phase: Phase, steps: int) -> None:
        """The training loop enters a phase after so many finished optimizer steps."""

    def finish(self) -> tuple[MeasuredPhase, ...]:
        """Stops measuring and returns the peak of every phase that was seen."""


def live_tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind tensors."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        if not tensor.is_sparse and tensor.device.type != "meta" and not isinstance(tensor, FakeTensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def all_live_tensors() -> list[torch.Tensor]:
    """Every tensor that Python holds."""
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


def weigh_residents(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[Category, int]:
    """Bytes of parameters, buffers and optimizer state, weighed on the live objects."""
    states = optimizer.state.values() if optimizer is not None else ()
    tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return {
        Category.PARAMETERS: live_tensor_bytes(model.parameters()),
        Category.BUFFERS: live_tensor_bytes(model.buffers()),
        Category.OPTIMIZER_STATE: live_tensor_bytes(tensors),
    }


def weigh_gradients(model: nn.Module) -> int:
    """Bytes of the gradients that are alive now."""
    return live_tensor_bytes(p.grad for p in model.parameters() if p.grad is not None)


class CpuMeter:
    """Allocator-level peaks on CPU, from the profiler's memory events."""

    name = "torch.profiler memory events"

    def __init__(self) -> None:
        self._peaks: dict[Phase, int] = {}
        self._profiler: Any = None
        self._base_bytes = 0
        self._first_phase = Phase.LOAD
        self._seen: set[Phase] = set()

    @contextmanager
    def measure_load(self) -> Iterator[None]:
        """Measures loading: what is alive afterwards, and the highest transient above that."""
        before = live_tensor_bytes(all_live_tensors())
        self._start(Phase.LOAD)
        yield
        cumulative = self._stop()
        after = live_tensor_bytes(all_live_tensors()) - before
        highest = max((total for _, total in cumulative), default=0)
        final = cumulative[-1][1] if cumulative else 0
        # weights mapped from files never pass the allocator; they count as what is alive afterwards
        self._peaks[Phase.LOAD] = before + after + max(0, highest - final)

    def enter(self, phase: Phase, steps: int) -> None:
        """See `Meter`."""
        wanted = steps < METERED_STEPS or phase not in (Phase.TRAIN_STEP, Phase.OPTIMIZER_STEP)
        wanted = wanted and (steps < METERED_STEPS or phase not in self._seen)
        if self._profiler is not None and not wanted:
            self._fold(self._stop())
        elif self._profiler is None and wanted:
            self._base_bytes = live_tensor_bytes(all_live_tensors())
            self._start(phase)
        if self._profiler is not None:
            with record_function(PHASE_MARK + phase.value):
                pass
            self._seen.add(phase)

    def finish(self) -> tuple[MeasuredPhase, ...]:
        """See `Meter`."""
        if self._profiler is not None:
            self._fold(self._stop())
        return tuple(MeasuredPhase(p, self._peaks[p], None, None) for p in Phase if p in self._peaks)

    def _start(self, phase: Phase) -> None:
        self._first_phase = phase
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profiler.start()

    def _stop(self) -> list[tuple[Phase, int]]:
        """Running sum after every memory event, with the phase it fell into."""
        self._profiler.stop()
        events = self._profiler.profiler.kineto_results.events()
        self._profiler = None
        timeline = sorted(
            (
                (event.start_ns(), event.name(), event.nbytes())
                for event in events
                if event.name() == "[memory]" or event.name().startswith(PHASE_MARK)
            ),
            key=lambda item: item[0],
        )
        phase, total, sums = self._first_phase, 0, []
        for _, name, num_bytes in timeline:
            if name == "[memory]":
                total += num_bytes
                sums.append((phase, total))
            else:
                phase = Phase(name.removeprefix(PHASE_MARK))
                sums.append((phase, total))
        return sums

    def _fold(self, sums: Iterable[tuple[Phase, int]]) -> None:
        for phase, total in sums:
            self._peaks[phase] = max(self._peaks.get(phase, 0), self._base_bytes + total)


class CudaMeter:
    """Allocated, reserved and device peaks per phase on CUDA (and ROCm, through the same interface)."""

    name = "torch.cuda allocator counters and NVML"

    def __init__(self) -> None:
        self._peaks: dict[Phase, MeasuredPhase] = {}
        self._phase = Phase.LOAD
        torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def measure_load(self) -> Iterator[None]:
        """Measures loading."""
        yield
        self._fold()

    def enter(self, phase: Phase, steps: int) -> None:
        """See `Meter`; every step is measured."""
        self._fold()
        self._phase = phase

    def finish(self) -> tuple[MeasuredPhase, ...]:
        """See `Meter`."""
        self._fold()
        return tuple(self._peaks[phase] for phase in Phase if phase in self._peaks)

    def _fold(self) -> None:
        torch.cuda.synchronize()
        seen = self._peaks.get(self._phase, MeasuredPhase(self._phase, 0, 0, None))
        device = _process_device_bytes()
        self._peaks[self._phase] = MeasuredPhase(
            self._phase,
            max(seen.allocated_bytes, torch.cuda.max_memory_allocated()),
            max(seen.reserved_bytes or 0, torch.cuda.max_memory_reserved()),
            max(seen.device_bytes or 0, device) if device is not None else seen.device_bytes,
        )
        torch.cuda.reset_peak_memory_stats()


def _process_device_bytes() -> int | None:
    """What NVML says this process uses on the device; None where it can't say."""
    try:
        used = torch.cuda.memory.list_gpu_processes()
    except (ModuleNotFoundError, RuntimeError):
        return None
    for line in used.splitlines():
        words = line.split()
        if str(os.getpid()) in words and "uses" in words:
            return int(float(words[words.index("uses") + 1]) * (1 << 20))
    return None


def process_memory_bytes() -> Mapping[str, int]:
    """Memory of this process now and at its highest: on CUDA the allocator's, on CPU the kernel's view."""
    if torch.cuda.is_available():
        return {"now": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}
    status = Path("/proc/self/status")
    if not status.exists():
        return {}
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return {
        "now": int(fields["VmRSS"].split()[0]) << 10,
        "peak": int(fields["VmHWM"].split()[0]) << 10,
    }
