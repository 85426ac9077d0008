"""What is said about a plan beyond its memory: what each knob buys, and what more memory would."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.plan import Grade, Plan, Squeeze


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
    sharding: str = ""
    """What each higher ZeRO stage would free, and which would not help, and why; empty where there is none."""


@dataclass(frozen=True)
class OnCard:
    """A job on one kind of device, in one count of it, among others."""

    hardware: str
    """Name of the device."""
    num_devices: int
    """How many, over all nodes."""
    num_nodes: int
    """Nodes."""
    plan: Plan | None
    """The plan; None: none fits, or the device can't carry the job out."""
    reason: str
    """Why this plan, or why none."""
    position: int
    """Of the plan's method, length and rank among the job's combinations, best first; -1 without a plan."""
    peak_device_bytes: int | None
    """Highest bytes on a device."""
    capacity_bytes: int
    """Usable bytes of a device."""
    tokens_per_second: float | None
    """Predicted, of all devices together; None where nobody knows how fast they are."""
    dollars_per_million_tokens: float | None
    """Of all devices together; None without a price."""
    grade: Grade | None
    """How tight the plan is."""

    @property
    def tokens_per_second_per_device(self) -> float | None:
        """Predicted; None where nobody knows how fast the device is."""
        return None if self.tokens_per_second is None else self.tokens_per_second / self.num_devices


@dataclass(frozen=True)
class SweepPoint:
    """One point of a sweep."""

    swept: tuple[tuple[str, str], ...]
    """Keys with several values, and this point's."""
    card: OnCard
    """The job there, on its device."""
    note: str = ""
    """What an automatic length does to the result; empty without one."""


@dataclass(frozen=True)
class LengthOption:
    """One length for a job's data: what it costs, and what it keeps of them."""

    length: int
    """Tokens per sequence."""
    plan: Plan | None
    """The best plan at this length; None: none fits."""
    reason: str
    """Why this plan, or why none."""
    peak_device_bytes: int | None
    """Highest bytes on a device."""
    real_tokens_per_second: float | None
    """Predicted, over all devices, padding not counted; None where nobody knows how fast they are."""
    padding_share: float | None
    """Expected share of the plan's batches that is padding; None without a plan."""
    kept_share: float
    """Tokens that are trained on, of all."""
    cut_share: float
    """Examples that are cut, of all: at the length, or where packed rows end."""
    dropped_share: float
    """Examples that are left out because nothing that is learnt remains of them, of all."""
