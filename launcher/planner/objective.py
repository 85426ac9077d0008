"""What makes one plan better than another: `planner.objective`.

A plan is worth what its optimizer step takes (`speed`), what that costs (`cost`), or what it takes of the device
(`memory`). All plans of one comparison train the same tokens per step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from launcher.job import Checkpointing, Objective
from launcher.memory import MemoryEstimate
from launcher.plan import Plan
from launcher.step_time import StepTime

SAME = 0.01
"""Plans whose steps are nearer than this are equally fast: no rate is known better."""
MODES = tuple(Checkpointing)
"""From nothing recomputed to everything, and then offloaded too: each runs all that those before it run, and more."""
NEVER_SLOWER: Mapping[Checkpointing, tuple[Checkpointing, ...]] = {
    Checkpointing.NONE: (),
    Checkpointing.SELECTIVE: (Checkpointing.NONE,),
    Checkpointing.FULL: (Checkpointing.NONE,),
    Checkpointing.OFFLOAD: (Checkpointing.NONE, Checkpointing.FULL),
}
"""The kinds of checkpointing that are never slower than another one. Selective checkpointing recomputes less than full,
and asks Python at every operation: where the host is the slower one, full checkpointing may be the faster."""


@dataclass(frozen=True)
class Price:
    """A plan with what it needs."""

    plan: Plan
    """The plan."""
    estimate: MemoryEstimate
    """Its memory."""
    step: StepTime | None
    """Its optimizer step; None where nobody knows how fast the device is."""


@dataclass(frozen=True)
class Ranking:
    """How plans of one job compare. Values are better the smaller they are.

    Args:
        objective: What counts.
        knows_speed: Whether steps have a time. Without it two rules stand in for it: nothing recomputed before
            everything recomputed, larger micro batch before smaller.
    """

    objective: Objective
    knows_speed: bool

    @property
    def by_memory(self) -> bool:
        """Whether the least memory counts, and not time."""
        return self.objective is Objective.MEMORY

    def value(self, price: Price) -> float:
        """What counts of a plan: bytes, or seconds per step. Cost is seconds times a constant."""
        if self.by_memory:
            return float(price.estimate.peak_device_bytes)
        return rule(price.plan) if price.step is None else price.step.seconds

    def floor(self, plan: Plan, seconds: float, num_bytes: int) -> float:
        """A value that an unpriced plan does not go below.

        Args:
            plan: The plan.
            seconds: A time that its step does not go below.
            num_bytes: A device peak that it does not go below.
        """
        if self.by_memory:
            return float(num_bytes)
        return seconds if self.knows_speed else rule(plan)

    def within(self, value: float) -> float:
        """The largest value that counts as the same as this one."""
        return value * (1 + SAME) if self.knows_speed and not self.by_memory else value

    def best(self, prices: Collection[Price]) -> Price:
        """The best of some plans: of those that are as good as the best one, the one that needs least memory.

        But ordinary buckets come before small ones, whose exchange in more pieces has no time of its own. Among equals it
        is the simpler one: the one that recomputes and accumulates less.
        """
        limit = self.within(min(self.value(price) for price in prices))
        same = [price for price in prices if self.value(price) <= limit]
        return min(
            same,
            key=lambda price: (
                price.plan.has_small_buckets,
                price.estimate.peak_device_bytes,
                rule(price.plan),
            ),
        )


def rule(plan: Plan) -> float:
    """The order of plans as far as it is known without rates, as a number."""
    return MODES.index(plan.activation_checkpointing) + plan.gradient_accumulation_steps / (
        plan.gradient_accumulation_steps + 1
    )
