"""What the processes of a validation tell each other; plain data, nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.hardware import HardwareSpec
from scripts.gpu_validation.results import Prediction


@dataclass(frozen=True)
class PredictionOrder:
    """What to predict."""

    names: tuple[str, ...]
    """Jobs, most urgent first."""
    hardware: HardwareSpec


@dataclass(frozen=True)
class Answer:
    """What the predicting process says of one job."""

    name: str
    prediction: Prediction | None = None
    message: str = ""
    """Why there is no prediction."""


@dataclass(frozen=True)
class RunOrder:
    """One job for the device, and where its results go."""

    name: str
    hardware: HardwareSpec
    outcome: str
    """File for the outcome."""
    snapshot: str = ""
    """File for the timeline; empty: none is recorded."""
