"""What a page and its pictures are made of: all that was found out about one plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.explanation import Explanation
from launcher.job import JobSpec
from launcher.memory import Bill, MemoryEstimate, Timeline
from launcher.plan import Plan, PlanChoice
from launcher.whatif import WhatIf


@dataclass(frozen=True)
class Findings:
    """Everything about one plan."""

    job: JobSpec
    """The job, resolved."""
    plan: Plan
    """The plan taken; where none fits, the nearest one."""
    estimate: MemoryEstimate
    """Its memory."""
    capacity_bytes: int
    """Usable bytes of the device."""
    headroom_bytes: int
    """Bytes of them that a plan must leave free."""
    choice: PlanChoice | None
    """What the search found; None for a past run, whose plan is not searched again."""
    explanation: Explanation | None
    """What each knob buys; None where nobody asked."""
    bill: Bill
    """What is alive at the plan's highest moment, and a step over time."""
    measured: Timeline | None
    """The measured step; None where none was measured with this plan."""
    what_if: WhatIf
    """Other batches, lengths and memories."""
    notes: tuple[str, ...]
    """What a reader should know."""
    versions: Mapping[str, str]
    """Libraries that were traced."""

    @property
    def title(self) -> str:
        """The job and its device, in a few words."""
        return f"{self.job.recipe} on {self.job.hardware.name}"

    @property
    def fits(self) -> bool:
        """Whether a plan was found, or is that of a run."""
        return self.choice is None or self.choice.feasible
