"""What is said about a plan beyond its memory: what each knob buys, and what more memory would."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.plan import Plan, Squeeze


@dataclass(frozen=True)
class Change:
    """One knob turned, everything else as in the plan taken."""

    knob: str
    """The knob's name in the configuration."""
    words: str
    """From what to what."""
    plan: Plan
    """The plan with the change."""
    changes_result: bool
    """Whether another model comes out."""
    saved_bytes: int | None
    """Bytes of the device that it frees; negative where it takes more. None: it was not priced."""
    step_ratio: float | None
    """Predicted step time over that of the plan taken, tokens alike; None where a time is unknown."""
    fits: bool
    """Whether it fits the budget."""
    refusal: str = ""
    """Why it was not priced; empty when it was."""


@dataclass(frozen=True)
class AtCapacity:
    """The best plan if the device had another memory."""

    factor: float
    """Memory, in devices as they are."""
    capacity_bytes: int
    """Usable bytes."""
    plan: Plan | None
    """The plan; None: none fits."""
    position: int
    """Of its combination of method, length and rank among those the job lists, best first; -1 without a plan."""
    tokens_per_second: float | None
    """Predicted; None where nobody knows how fast the device is."""
    reason: str
    """Why this plan, or why none."""


@dataclass(frozen=True)
class Explanation:
    """Everything of the above for one plan."""

    changes: tuple[Change, ...]
    """The marginal table, what frees most first."""
    capacities: tuple[AtCapacity, ...]
    """Half, all and twice the memory."""
    verdict: str
    """Whether memory is this job's problem, in one sentence."""
    squeeze: Squeeze
    """How tight it is."""
