"""The timeline of a run: every allocation and release in order, from torch's own record of the CUDA allocator.

It is condensed to what a comparison with the tracer's stream needs, and small enough to keep. The events are those
that `launcher.planner.allocator.replay` takes, so that the allocator's model can be tested on a real stream.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from launcher.memory import Phase

MAX_EVENTS = 2_000_000
"""Events that torch keeps; older ones would be overwritten."""
NUM_BLOCKS = 50
"""Kinds of blocks described at the peak."""
NUM_FRAMES = 12
"""Innermost Python frames kept of each."""


@dataclass(frozen=True)
class LiveBlocks:
    """Blocks of one size and origin that are alive at the peak."""

    size_bytes: int
    count: int
    frames: tuple[str, ...]
    """Where they were allocated, `file:line function`, innermost first."""


@dataclass(frozen=True)
class Timeline:
    """One run. Blocks are numbered in the order of their births, from 1."""

    sizes_bytes: tuple[int, ...]
    """Bytes that were asked for, by block."""
    events: tuple[int, ...]
    """`n`: block n is born; `-n`: it is released. Blocks from before the record are left out."""
    phases: tuple[tuple[int, Phase], ...]
    """Number of events before each phase begins, as the optimizer and the model are called."""
    reserved: tuple[tuple[int, int], ...]
    """Number of events before each change of what the allocator has from the device, and its bytes, signed."""
    peak_event: int
    """Number of events up to the highest moment."""
    peak_bytes: int
    """Bytes asked for that are alive then."""
    peak_blocks: tuple[LiveBlocks, ...]
    """The most of them, largest sum first."""


class Recording:
    """Records what the CUDA allocator does from now on.

    Args:
        cuda: torch.cuda.
    """

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        cuda.init()
        cuda.memory._record_memory_history(max_entries=MAX_EVENTS, context="alloc", stacks="python")
        self._before = self._count()
        self._marks: list[tuple[int, Phase]] = [(0, Phase.LOAD)]
        self._hooks: list[Any] = []

    def watch(self, model: nn.Module) -> None:
        """Notes phases from now on: forward passes in training and evaluation, and optimizer steps.

        The launcher's phases begin a little apart (clipping and zeroing gradients lie between); the peaks do not.
        """
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self._hooks += [
            base.base_model.register_forward_pre_hook(self._forward_begins),
            register_optimizer_step_pre_hook(lambda *call: self._mark(Phase.OPTIMIZER_STEP)),
            register_optimizer_step_post_hook(lambda *call: self._mark(Phase.TRAIN_STEP)),
        ]

    def stop(self) -> Timeline:
        """Ends the record."""
        for hook in self._hooks:
            hook.remove()
        trace = self._cuda.memory._snapshot()["device_traces"][self._cuda.current_device()]
        self._cuda.memory._record_memory_history(enabled=None)
        return condense(trace, self._marks, sys.path)

    def _forward_begins(self, module: nn.Module, inputs: Any) -> None:
        self._mark(Phase.TRAIN_STEP if module.training else Phase.EVALUATION)

    def _mark(self, phase: Phase) -> None:
        if self._marks[-1][1] is not phase:
            self._marks.append((self._count() - self._before, phase))

    def _count(self) -> int:
        """Allocations and releases so far, by the allocator's own counters."""
        stats = self._cuda.memory_stats()
        return int(stats["allocation.all.allocated"]) + int(stats["allocation.all.freed"])


def condense(
    trace: Iterable[Mapping[str, Any]], marks: Sequence[tuple[int, Phase]], roots: Sequence[str]
) -> Timeline:
    """Sums up torch's record of one device.

    Args:
        trace: `device_traces` of a snapshot: actions with address, size and frames, in order.
        marks: Number of events before each phase begins.
        roots: Folders that modules are imported from.
    """
    sizes: list[int] = []
    origins: list[tuple[str, ...]] = []
    events: list[int] = []
    reserved: list[tuple[int, int]] = []
    live: dict[int, int] = {}  # block at each address
    for entry in trace:
        action, size = entry["action"], int(entry.get("size", 0))
        if action == "alloc":
            sizes.append(size)
            origins.append(_frames(entry.get("frames", ()), roots))
            live[entry["addr"]] = len(sizes)
            events.append(len(sizes))
        elif action == "free_requested" and entry["addr"] in live:
            events.append(-live.pop(entry["addr"]))
        elif action in ("segment_alloc", "segment_map"):
            reserved.append((len(events), size))
        elif action in ("segment_free", "segment_unmap"):
            reserved.append((len(events), -size))
    peak_event, peak_bytes = _highest(sizes, events)
    blocks = _alive(events[:peak_event])
    kinds = Counter((sizes[block - 1], origins[block - 1]) for block in blocks)
    largest = sorted(kinds.items(), key=lambda kind: kind[0][0] * kind[1], reverse=True)[:NUM_BLOCKS]
    return Timeline(
        sizes_bytes=tuple(sizes),
        events=tuple(events),
        phases=tuple(marks),
        reserved=tuple(reserved),
        peak_event=peak_event,
        peak_bytes=peak_bytes,
        peak_blocks=tuple(LiveBlocks(size, count, frames) for (size, frames), count in largest),
    )


def _highest(sizes: Sequence[int], events: Sequence[int]) -> tuple[int, int]:
    total = highest = at = 0
    for index, event in enumerate(events):
        total += sizes[event - 1] if event > 0 else -sizes[-event - 1]
        if total > highest:
            highest, at = total, index + 1
    return at, highest


def _alive(events: Sequence[int]) -> list[int]:
    alive: set[int] = set()
    for event in events:
        if event > 0:
            alive.add(event)
        else:
            alive.remove(-event)
    return sorted(alive)


def _frames(frames: Iterable[Mapping[str, Any]], roots: Sequence[str]) -> tuple[str, ...]:
    kept = [f"{_below(frame['filename'], roots)}:{frame['line']} {frame['name']}" for frame in frames]
    return tuple(kept[:NUM_FRAMES])


def _below(filename: str, roots: Sequence[str]) -> str:
    """A path below its import root, or the bare name: where a machine keeps its packages is nobody's business."""
    found = [root for root in roots if root and filename.startswith(f"{root}/")]
    if not found:
        return filename.rsplit("/", 1)[-1]
    return filename[len(max(found, key=len)) + 1 :]


def write_timeline(path: Path, job: str, timeline: Timeline) -> None:
    """Writes a timeline as compressed JSON."""
    text = json.dumps({"job": job, **asdict(timeline)}, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
