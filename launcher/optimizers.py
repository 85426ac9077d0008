"""What optimizers that project gradients need beyond others. Traced AND run, like the rest of the workload."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from launcher.optimisation import LOW_RANK_OPTIMIZERS, Optimizer, TrainingSpec


def low_rank_arguments(training: TrainingSpec, optimizer: Optimizer) -> dict[str, Any]:
    """The trainer's arguments for GaLore and APOLLO; none for any other optimizer."""
    if optimizer not in LOW_RANK_OPTIMIZERS:
        return {}
    targets = training.optimizer_target_modules
    return {
        "optim_target_modules": targets if isinstance(targets, str) else list(targets),
        "optim_args": f"rank={training.optimizer_rank}",
    }


def optimizer_tensors(state: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that an optimizer keeps for one parameter, the projection of GaLore and APOLLO included."""
    values = [*state.values(), getattr(state.get("projector"), "ortho_matrix", None)]
    return [value for value in values if isinstance(value, torch.Tensor)]
