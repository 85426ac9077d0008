"""The door to the heavy libraries: traces run in child processes, two at a time.

The planner's own process never imports torch. A child process does, and forks into two, so that the traces of two depths
(or of two plans) run at the same time.
"""

from __future__ import annotations

import gc
import importlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from launcher.hardware import HardwareSpec
from launcher.job import JobSpec, Loss
from launcher.libraries import OPTIONAL_LIBRARIES, hide_libraries, unneeded_libraries
from launcher.plan import Plan
from launcher.planner.depth import DepthPlan
from launcher.planner.forked import ForkedPool
from launcher.planner.polynomial import TracedShape
from launcher.planner.regimes import Lines
from launcher.planner.skyline import Profile

NUM_PROCESSES = 2
TRACE_MODULE = "launcher.planner.trace"
FACTS_MODULE = "launcher.planner.facts"


@dataclass(frozen=True)
class Subject:
    """What is traced, in plain data: everything but the shape."""

    job: JobSpec
    """The job, reduced to what a trace depends on."""
    plan: Plan
    """The plan; its batch and length are replaced by those of the trace."""
    hardware: HardwareSpec
    """Reduced to what decides the code paths."""


@dataclass(frozen=True)
class SubjectFacts:
    """What the libraries say about a subject before anything is traced."""

    lines: Mapping[Loss, Lines]
    """Where its regimes meet, with each loss."""
    depths: DepthPlan
    """Which depths to trace."""
    num_layers: int
    """Full depth."""
    supports_sdpa: bool
    """Whether the model's code has scaled-dot-product attention; eager attention always exists."""
    weight_bytes: int = 0
    """All weights as they are held on one device; 0 where they are quantised, and nobody has weighed them yet."""
    trained_bytes: int = 0
    """Those of them that are trained."""
    trained_elements: int = 0
    """How many numbers that are."""
    process_bytes: int = 0
    """Memory of a process that has imported the libraries and done nothing yet; 0 where the kernel doesn't say."""


@cache
def _libraries() -> tuple[Any, int]:
    """What traces, and the memory of this process right after importing it; asked for the first time it imports."""
    gc.disable()  # nothing that an import makes is garbage: looking for some costs a fifth of the time
    trace = importlib.import_module(TRACE_MODULE)
    gc.enable()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    resident = [line.split()[1] for line in lines if line.startswith("VmRSS:")]
    return trace, int(resident[0]) << 10 if resident else 0


def import_libraries(hidden: Sequence[str]) -> None:
    """Imports all that traces need, without the optional libraries that they don't."""
    hide_libraries(hidden)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of kernels that no trace runs
    _libraries()
    importlib.import_module(FACTS_MODULE)


def facts_of(subject: Subject) -> SubjectFacts:
    """Reads a subject's facts off the libraries; runs in a child process."""
    _, process_bytes = _libraries()
    facts = importlib.import_module(FACTS_MODULE)
    answer: SubjectFacts = replace(facts.facts(subject), process_bytes=process_bytes)
    return answer


def record(subject: Subject, shape: TracedShape, depth: int, accumulation: int) -> Profile:
    """Traces once; runs in a child process."""
    trace, _ = _libraries()
    answer: Profile = trace.record(trace.open_subject(subject), shape, depth, accumulation)
    return answer


class Tracer:
    """Two child processes that trace. Started at the first use; close it, or use it as a context.

    A plan that needs an optional library which they don't have is traced by two others.

    Args:
        needed: Those of `OPTIONAL_LIBRARIES` that most traced steps call; the others are hidden from them.
    """

    def __init__(self, needed: Sequence[str] = ()) -> None:
        self._hidden = tuple(name for name in OPTIONAL_LIBRARIES if name not in needed)
        self._pools: dict[tuple[str, ...], ForkedPool] = {}

    def facts(self, subject: Subject) -> Future[SubjectFacts]:
        """Starts reading a subject's facts."""
        return self._pool_for(subject.plan).submit(facts_of, subject)

    def records(
        self, subject: Subject, shape: TracedShape, depths: Sequence[int], accumulation: int
    ) -> tuple[Future[Profile], ...]:
        """Starts a trace at each depth."""
        pool = self._pool_for(subject.plan)
        return tuple(pool.submit(record, subject, shape, depth, accumulation) for depth in depths)

    def close(self) -> None:
        """Ends the child processes."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def _pool_for(self, plan: Plan) -> ForkedPool:
        """The processes that have all that a plan needs."""
        unneeded = unneeded_libraries(plan)
        hidden = tuple(name for name in self._hidden if name in unneeded)
        if hidden not in self._pools:
            self._pools[hidden] = ForkedPool(NUM_PROCESSES, import_libraries, hidden)
        return self._pools[hidden]
