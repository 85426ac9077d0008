"""What pinned knobs, the batch and the devices can't have together: all that a search would refuse without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from launcher.errors import ConfigError, UnsupportedByPlanner
from launcher.job import JobSpec
from launcher.planner.arrangements import arrangements
from launcher.planner.space import batch_splits, semantic_plans

OTHER_ENGINE = "another planner.pin.engine or planner.pin.zero_stage"
"""What to do where no engine can carry out a plan."""
ANY_LENGTH = 8
"""A length in the place of one that the data decide: what engines can do does not depend on it."""


def pin_limits(job: JobSpec) -> Iterator[tuple[str, str]]:
    """What is wrong with the pinned knobs of a job, each with a hint.

    Args:
        job: The job; its hardware and, where it is known, its model resolved.
    """
    try:
        batch_splits(job)
    except ConfigError as failure:
        yield failure.message, failure.hint
    if job.data.max_length == "auto":
        job = replace(job, data=replace(job.data, max_length=ANY_LENGTH))
    try:
        # of a method the first length and rank stand for all
        by_method = {plan.method: plan for plan in reversed(list(semantic_plans(job)))}
        found = [arrangements(job, plan) for plan in by_method.values()] if job.model.architecture else []
    except (ConfigError, UnsupportedByPlanner) as failure:
        yield failure.message, failure.hint
        return
    if found and not any(possible for possible, _ in found):
        reasons = dict.fromkeys(reason for _, refused in found for reason in refused.values())
        yield "; ".join(reasons), OTHER_ENGINE
