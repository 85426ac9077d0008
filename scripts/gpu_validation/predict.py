"""Predictions, by the launcher's own forecaster, in CPU processes beside the card.

    python -m scripts.gpu_validation.predict <order.json>

prints one JSON line per job, as each is ready. No torch here: the tracers are child processes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from launcher.documents import read_document, to_json
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.memory import Phase
from launcher.planner.allocator import AllocatorMode, replay
from launcher.planner.forecast import Forecaster
from launcher.planner.stream import Stream, flushes
from launcher.planner.trace_cache import TraceCache
from launcher.planner.tracer import Tracer
from launcher.rates import published_rates
from scripts.gpu_validation.jobs import ValidationJob, by_name, plan_of, spec_of
from scripts.gpu_validation.orders import Answer, PredictionOrder
from scripts.gpu_validation.results import PhaseBytes, Prediction


def predict(job: ValidationJob, hardware: HardwareSpec, tracer: Tracer) -> Prediction:
    """Predicts one job, traced at its true shape."""
    began = time.perf_counter()
    rates = published_rates(hardware)
    forecaster = Forecaster(spec_of(job, hardware), tracer, TraceCache(None), rates=rates)
    plan = plan_of(job)
    estimate = forecaster.estimate(plan, exact=True)
    phases = {
        peak.phase: PhaseBytes(peak.allocated_bytes, peak.reserved_bytes, None, peak.by_category_bytes)
        for peak in estimate.phases
    }
    if job.allocator == "classic" and hardware.kind is DeviceKind.CUDA:
        phases |= _classic(forecaster.stream(plan))
    step = forecaster.step_time(plan, exact=True)
    held = max(peak.reserved_bytes or peak.allocated_bytes for peak in phases.values())
    return Prediction(
        phases=phases,
        resident_bytes=estimate.resident_bytes,
        device_bytes=held + estimate.context_bytes,
        seconds=round(time.perf_counter() - began, 2),
        step_seconds=None if step is None else round(step.seconds, 4),
    )


def _classic(stream: Stream) -> dict[Phase, PhaseBytes]:
    """Peaks without expandable segments, which the launcher's own predictions take for granted.

    There torch's counter of allocated bytes counts whole blocks, up to 1 MiB more than was asked for.
    """
    peaks = replay(
        stream.sizes_bytes,
        stream.events,
        stream.phases,
        AllocatorMode.CLASSIC,
        None,
        stream.cuda_streams,
        flushes(stream),
    )
    return {peak.phase: PhaseBytes(peak.allocated_bytes, peak.reserved_bytes) for peak in peaks}


def answers(order: PredictionOrder) -> Iterator[Answer]:
    """Predicts the jobs of an order, one after another: a trace takes about half a second."""
    jobs = by_name()
    with Tracer(needed=("bitsandbytes",)) as tracer:
        for name in order.names:
            yield _answer(jobs[name], order.hardware, tracer)


def _answer(job: ValidationJob, hardware: HardwareSpec, tracer: Tracer) -> Answer:
    try:
        return Answer(job.name, predict(job, hardware, tracer))
    except Exception as failure:  # one job that can't be predicted must not cost the others theirs
        return Answer(job.name, None, f"{type(failure).__name__}: {failure}"[:1000])


def main(argv: list[str]) -> None:
    """Entry point."""
    order = read_document(Path(argv[1]), PredictionOrder)
    for answer in answers(order):
        print(to_json(answer, indent=None), flush=True)


if __name__ == "__main__":
    main(sys.argv)
