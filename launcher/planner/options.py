"""What a search knows of the plans of one arrangement."""

from __future__ import annotations

from dataclasses import dataclass, field

from launcher.plan import Plan
from launcher.planner.objective import NEVER_SLOWER, Price


@dataclass
class Options:
    """The plans of one combination of result-changing knobs, as far as they are known."""

    unpriced: list[Plan]
    fitting: list[Price] = field(default_factory=list)
    failed: list[Price] = field(default_factory=list)
    """Plans that accumulate and exceed the device."""
    bounded: list[tuple[Plan, int]] = field(default_factory=list)
    """Plans that accumulate and exceed the device, with what they need at least, bytes."""

    def is_dominated(self, plan: Plan) -> bool:
        """Whether a plan with the same micro batch fits that recomputes less and is never slower."""
        better = NEVER_SLOWER[plan.activation_checkpointing]
        return any(
            price.plan.micro_batch_size == plan.micro_batch_size
            and price.plan.activation_checkpointing in better
            for price in self.fitting
        )


def repeats(plan: Plan, fitting: Plan) -> bool:
    """Whether one with the same micro batch fits that shards less and whose checkpointing is never slower."""
    mode, other = plan.activation_checkpointing, fitting.activation_checkpointing
    return (other is mode or other in NEVER_SLOWER[mode]) and (
        plan.micro_batch_size == fitting.micro_batch_size
    )
