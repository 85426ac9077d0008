"""Plans that fit and are refused: `planner.refused_grades`, which `profile=production` sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launcher.job import JobSpec, Profile
from launcher.memory import MemoryEstimate
from launcher.plan import Grade, Plan
from launcher.planner.explain import COMFORTABLE_SHARE, SQUEEZED_SHARE, squeeze
from launcher.planner.interval import Residual, with_interval
from launcher.units import format_bytes

GRADES = tuple(Grade)
"""From comfortable to squeezed."""


@dataclass(frozen=True)
class Refusal:
    """Why a plan that fits is refused."""

    reason: str
    """With figures, and what to change."""
    short_by_bytes: int
    """Bytes less with which it would not be refused."""


Judge = Callable[[Plan, MemoryEstimate], Refusal | None]
"""Whether a plan that fits is refused; None: it is not."""


def judge(job: JobSpec, residuals: Sequence[Residual]) -> Judge:
    """What refuses the plans of a job for their grade; a grade refuses all that are tighter, too.

    Args:
        job: The job, resolved.
        residuals: How far off earlier predictions were.
    """
    refused = job.planner.refused_grades
    capacity = job.hardware.memory_bytes
    wanted = COMFORTABLE_SHARE if Grade.TIGHT in refused else SQUEEZED_SHARE
    who = "planner.refused_grades" if job.profile is Profile.EXPERIMENT else f"profile={job.profile.value}"

    def refuse(plan: Plan, estimate: MemoryEstimate) -> Refusal | None:
        if not refused:
            return None
        found = squeeze(plan, with_interval(estimate, plan, job, residuals), capacity)
        if GRADES.index(found.grade) < min(map(GRADES.index, refused)):
            return None
        short = max(1, round(wanted * capacity) - found.free_bytes)
        savers = ", ".join(found.savers) or "none"
        return Refusal(
            f"fits, and is {found.grade.value}, which {who} refuses: {format_bytes(found.free_bytes)} "
            f"({found.free_share:.1%}) would stay free at the upper end of what is expected, memory savers in use: "
            f"{savers}; {format_bytes(short)} less, or fewer savers, would do",
            short,
        )

    return refuse
