"""Plans that differ in their micro batch alone."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.plan import Plan, varied

Split = tuple[int, int]
"""Micro batch, and how many of them make a step."""


@dataclass(frozen=True)
class Group:
    """Plans that differ in their micro batch alone."""

    like: Plan
    """One of them, whose micro batch counts for nothing."""
    splits: tuple[Split, ...]
    """Of each plan, smallest micro batch first."""

    def plan(self, split: Split) -> Plan:
        """One of the plans."""
        return varied(self.like, micro_batch_size=split[0], gradient_accumulation_steps=split[1])

    def plans(self) -> list[Plan]:
        """All of them."""
        return [self.plan(split) for split in self.splits]


def shapeless(plan: Plan) -> Plan:
    """What plans have in common that differ in their micro batch alone, as `Group.like`."""
    return varied(plan, micro_batch_size=1, gradient_accumulation_steps=1)
