"""The predicted time of one optimizer step, taken apart."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepTime:
    """Time of one optimizer step on one device, seconds."""

    first_batch_seconds: float
    """The first micro batch."""
    later_batch_seconds: float
    """Every other micro batch; it adds to gradients that exist. 0 where there is none."""
    update_seconds: float
    """What comes after the last one: clipping, optimizer."""
    accumulation: int
    """Micro batches."""
    tokens: int
    """Tokens per step and device, padding included."""
    rates: str
    """Where the device's rates come from, for people."""
    is_calibrated: bool
    """Whether they were measured on the device itself."""
    communication_seconds: float = 0.0
    """What several devices add, where it is not hidden behind the work, and states that come from host memory."""

    @property
    def seconds(self) -> float:
        """The whole step."""
        batches = self.first_batch_seconds + (self.accumulation - 1) * self.later_batch_seconds
        return batches + self.update_seconds + self.communication_seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second and device, padding included."""
        return self.tokens / self.seconds


def dollars_per_million_tokens(step: StepTime, price_per_hour: float) -> float:
    """What a million tokens cost.

    Args:
        step: The step.
        price_per_hour: US dollars per device and hour.
    """
    return price_per_hour / 3600.0 / step.tokens_per_second * 1e6
