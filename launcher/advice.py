"""What one may ask about a plan without running it: its memory, what each knob would change, which device is best."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from launcher.data_lengths import DataLengths
from launcher.documents import read_document
from launcher.errors import ConfigError, DataError, LauncherError, NoPlanFits, UnsupportedByPlanner
from launcher.explanation import OnCard, SweepPoint
from launcher.job import JobSpec
from launcher.length_choice import lengths_at_hand, settle_length
from launcher.memory import Timeline
from launcher.planner.bill import build_bill
from launcher.planner.cards import cheapest, on_card, ranked
from launcher.planner.explain import explain
from launcher.planner.forecast import Forecaster
from launcher.planner.lengths import far_above, words_of_choice
from launcher.planner.trace_cache import library_versions
from launcher.planner.tracer import Tracer
from launcher.planning import find_plan, needed_libraries, plan_job, resolve, settled, trace_cache
from launcher.publish import published, published_run
from launcher.report import tables
from launcher.report.bill import bill_document, bill_text
from launcher.report.cards import cards_document, cards_text
from launcher.report.explanation import explanation_document, explanation_text
from launcher.report.layout import wrapped
from launcher.report.lengths import lengths_document, lengths_text, packing_lines
from launcher.report.sweep import sweep_document, sweep_text
from launcher.run.cache import cache_folder
from launcher.run.calibrate import device_rates
from launcher.run.detect import detect_cuda
from launcher.run.status import ordered_run
from launcher.sweep import Point
from launcher.workflow import Answer, document_of, planned, say_nothing, weights_of

PLANNING_REFUSALS = (ConfigError, UnsupportedByPlanner, DataError)
"""What makes one job impossible, and leaves others possible."""


def plan_answer(job: JobSpec) -> Answer:
    """`action=plan`: the plan, and the files about it that the job asks for."""
    return published(*planned(job))


def memory_answer(job: JobSpec) -> Answer:
    """`action=memory`: where the memory of a plan goes, or of the past run in `run_dir`."""
    measured: Timeline | None = None
    plot = Path(job.plot) if job.plot else None
    asked, order, choice = job, None, None
    if job.run_dir:
        paths, order = ordered_run(Path(job.run_dir).resolve())
        job, plan, answer = order.job, order.plan, Answer(f"run       {paths.root}", {})
        timeline = paths.timeline(0)
        measured = read_document(timeline, Timeline) if timeline.exists() else None
        plot = plot or paths.plot
    else:
        job, choice, answer = planned(job)
        if choice.plan is None:
            return published(job, choice, answer)
        plan = choice.plan
    with Tracer(needed_libraries(job)) as tracer:
        bill = build_bill(Forecaster(job, tracer, trace_cache(job)).stream(plan))
    text = answer.text + "\n\n" + bill_text(bill, measured)
    if plot is not None:
        from launcher.report.plot import write_plot  # noqa: PLC0415  # the plotting library takes half a second

        write_plot(bill, measured, f"{job.recipe}: {tables.plan_words(plan)}", plot)
        text += f"\n\nplot      {plot}"
    answer = Answer(text, {**answer.document, "bill": bill_document(bill, measured), "plot": str(plot or "")})
    if order is not None:
        return published_run(order, asked, bill, measured, answer)
    return published(job, choice, answer) if choice is not None else answer


def explain_answer(job: JobSpec) -> Answer:
    """`action=explain`: what each knob buys, whether more memory would help, and how tight the plan is."""
    job, choice, answer = planned(job)
    if choice.plan is None:
        return published(job, choice, answer)
    job = settled(job)
    libraries = {*needed_libraries(job), "bitsandbytes"}  # quantised methods are among the changes
    with Tracer(tuple(sorted(libraries))) as tracer:
        rates = device_rates(job.hardware, cache_folder("rates"))
        cache = trace_cache(job)

        def forecasters(other: JobSpec) -> Forecaster:
            return Forecaster(other, tracer, cache, rates=rates)

        data, unknown = lengths_at_hand(job)
        words = "" if data is None else far_above(job, choice.plan, data, forecasters(job))
        search = partial(find_plan, tracer=tracer)
        explanation = explain(job, choice, forecasters, search, words, data)
    parts = [answer.text, explanation_text(explanation)]
    document = {**answer.document, "explanation": explanation_document(explanation)}
    if data is None:
        parts.append(wrapped("data     ", f"lengths not known: {unknown}"))
    elif "data_lengths" not in document:
        lines = packing_lines(data, choice.plan.max_length, choice.plan.micro_batch_size, job.data.packing)
        parts.append("\n".join([lengths_text(data), *lines]))
        document["data_lengths"] = lengths_document(data)
    return published(job, choice, Answer("\n\n".join(parts), document), explanation)


def cards_answer(jobs: Sequence[JobSpec]) -> Answer:
    """The same job planned for several devices and counts, and which of them is fastest and cheapest for it.

    Args:
        jobs: The job on each device, in each count.
    """
    sides = _side_by_side(jobs)
    best_first = ranked(side.card for side in sides)
    cheap = cheapest(best_first)
    failure = _failure(sides, "no device fits the job")
    return Answer(cards_text(best_first, cheap), cards_document(best_first, cheap), failure)


def sweep_answer(points: Sequence[Point]) -> Answer:
    """`launch -m`: every point planned, in one table."""
    sides = _side_by_side([point.job for point in points])
    shown = [SweepPoint(point.swept, side.card, side.note) for point, side in zip(points, sides, strict=True)]
    document = sweep_document(shown, [side.document for side in sides])
    return Answer(
        sweep_text(shown),
        {**document, "versions": library_versions()},
        _failure(sides, "no point of the sweep has a plan"),
    )


@dataclass(frozen=True)
class _Side:
    """One of several jobs that are compared."""

    card: OnCard
    """The job on its device."""
    document: dict[str, Any]
    """Its plan for programs."""
    refusal: LauncherError | None = None
    """Why it could not be planned for."""
    note: str = ""
    """What an automatic length does to the result."""


def _side_by_side(jobs: Sequence[JobSpec]) -> list[_Side]:
    """Plans several jobs; those that need the same libraries share the processes that trace.

    A job that can't be planned for is no reason to leave out the others.
    """
    sides: dict[int, _Side] = {}
    ready: dict[tuple[str, ...], list[tuple[int, JobSpec, DataLengths | None]]] = {}
    devices = detect_cuda()
    for index, job in enumerate(jobs):
        try:
            settled, data = settle_length(resolve(job, devices), partial(weights_of, show=say_nothing))
            ready.setdefault(needed_libraries(settled), []).append((index, settled, data))
        except PLANNING_REFUSALS as refusal:
            sides[index] = _refused(job, refusal)
    for libraries, alike in ready.items():
        with Tracer(libraries) as tracer:
            for index, job, data in alike:
                try:
                    sides[index] = _side(job, data, tracer)
                except PLANNING_REFUSALS as refusal:
                    sides[index] = _refused(job, refusal)
    return [sides[index] for index in range(len(jobs))]


def _side(job: JobSpec, data: DataLengths | None, tracer: Tracer) -> _Side:
    began = time.perf_counter()
    choice, note = plan_job(job, tracer), ""
    if data is not None and choice.plan is not None:
        lengths = job.planner.choices.max_length
        note = words_of_choice(data, choice.plan.max_length, lengths, packing=job.data.packing)
        choice = replace(choice, notes=(*choice.notes, note))
    document = document_of(job, choice, time.perf_counter() - began, None)
    return _Side(on_card(job, choice), document, note=note)


def _failure(sides: Sequence[_Side], message: str) -> LauncherError | None:
    """Why a comparison has nothing to offer; None when it has a plan."""
    if any(side.card.plan is not None for side in sides):
        return None
    unread = next((side.refusal for side in sides if isinstance(side.refusal, DataError)), None)
    return unread or NoPlanFits(message, "shorter data.max_length, or another method")


def _refused(job: JobSpec, refusal: LauncherError) -> _Side:
    hardware, reason = job.hardware, refusal.message.splitlines()[0]
    card = OnCard(
        hardware=hardware.name,
        num_devices=hardware.world_size,
        num_nodes=hardware.num_nodes,
        plan=None,
        reason=reason,
        position=-1,
        peak_device_bytes=None,
        capacity_bytes=hardware.memory_bytes,
        tokens_per_second=None,
        dollars_per_million_tokens=None,
        grade=None,
    )
    return _Side(card, {"feasible": False, "plan": None, "reason": reason, "predicted": None}, refusal)
