"""What one may ask about a plan without running it: its memory, what each knob would change, which device is best."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from launcher.documents import read_document
from launcher.errors import ConfigError, NoPlanFits
from launcher.explanation import OnCard
from launcher.job import JobSpec
from launcher.length_choice import lengths_at_hand, settle_length
from launcher.memory import Timeline
from launcher.planner.bill import build_bill
from launcher.planner.cards import cheapest, on_card, ranked
from launcher.planner.explain import explain
from launcher.planner.forecast import Forecaster
from launcher.planner.lengths import far_above
from launcher.planner.tracer import Tracer
from launcher.planning import find_plan, needed_libraries, plan_job, resolve, settled, trace_cache
from launcher.publish import published, published_run
from launcher.report import tables
from launcher.report.bill import bill_document, bill_text
from launcher.report.cards import cards_document, cards_text
from launcher.report.explanation import explanation_document, explanation_text
from launcher.report.lengths import lengths_document, lengths_text, packing_lines
from launcher.run.cache import cache_folder
from launcher.run.calibrate import device_rates
from launcher.run.status import ordered_run
from launcher.workflow import Answer, planned, say_nothing, weights_of


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
        forecaster = Forecaster(job, tracer, trace_cache(job), rates=rates)
        data, unknown = lengths_at_hand(job)
        words = "" if data is None else far_above(job, choice.plan, data, forecaster)
        explanation = explain(job, choice, forecaster, partial(find_plan, tracer=tracer), words)
    parts = [answer.text, explanation_text(explanation)]
    document = {**answer.document, "explanation": explanation_document(explanation)}
    if data is None:
        parts.append(tables.wrapped("data     ", f"lengths not known: {unknown}"))
    elif "data_lengths" not in document:
        lines = packing_lines(data, choice.plan.max_length, choice.plan.micro_batch_size, job.data.packing)
        parts.append("\n".join([lengths_text(data), *lines]))
        document["data_lengths"] = lengths_document(data)
    return published(job, choice, Answer("\n\n".join(parts), document), explanation)


def cards_answer(jobs: Sequence[JobSpec]) -> Answer:
    """The same job planned for several devices, and which of them is fastest and cheapest for it.

    Args:
        jobs: The job on each device.
    """
    cards = []
    for job in jobs:
        try:
            resolved, _ = settle_length(resolve(job, ()), partial(weights_of, show=say_nothing))
            cards.append(on_card(resolved, plan_job(resolved)))
        except ConfigError as refusal:  # a row, and no reason to leave out the others
            cards.append(_refused(job, refusal.message))
    best_first = ranked(cards)
    cheap = cheapest(best_first)
    fits = any(card.plan is not None for card in cards)
    failure = (
        None if fits else NoPlanFits("no device fits the job", "shorter data.max_length, or another method")
    )
    return Answer(cards_text(best_first, cheap), cards_document(best_first, cheap), failure)


def _refused(job: JobSpec, reason: str) -> OnCard:
    hardware = job.hardware
    return OnCard(
        hardware.name, hardware.world_size, None, reason, -1, None, hardware.memory_bytes, None, None, None
    )
