"""Where in a training step a model is: in its backbone, in its head, in the backward pass.

The tracer and the meter listen to the same calls, so that both mean the same by activations, logits and temporaries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

from launcher.memory import Region


class RegionWatch:
    """Tells when a model that is trained enters another region.

    Args:
        enter: Called with the region that begins.
        end_backward: Called when a micro batch's backward pass is over, while its gradients are there: engines may put
            them elsewhere before their optimizer steps.
    """

    def __init__(self, enter: Callable[[Region], None], end_backward: Callable[[], None]) -> None:
        self._tell = enter
        self._end_backward = end_backward
        self.region = Region.OUTSIDE

    def listen(self, trainer: Trainer) -> None:
        """Follows the passes of a trainer's model, adapters around it or not; before it trains."""
        backward = trainer.accelerator.backward

        def backward_and_tell(*args: Any, **kwargs: Any) -> None:
            backward(*args, **kwargs)
            self._end_backward()

        trainer.accelerator.backward = backward_and_tell
        model: Any = trainer.model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        backbone = base.base_model
        backbone.register_forward_pre_hook(lambda module, args: self.enter(Region.BACKBONE))
        backbone.register_forward_hook(self._backbone_ends)
        for module in backbone.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.register_forward_pre_hook(self._layer_begins)
                module.register_forward_hook(self._layer_ends, always_call=True)

    def enter(self, region: Region) -> None:
        """A region begins; every phase begins outside."""
        self.region = region
        self._tell(region)

    def _backbone_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        self.enter(Region.HEAD)
        hidden = output.last_hidden_state
        if hidden.requires_grad:
            hidden.register_hook(self._backward_reaches_backbone)

    def _backward_reaches_backbone(self, gradient: torch.Tensor) -> None:
        self.enter(Region.BACKWARD)

    def _layer_begins(self, module: nn.Module, args: Any) -> None:
        if self.region is Region.BACKWARD:
            self.enter(Region.RECOMPUTE)

    def _layer_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.region is Region.RECOMPUTE:
            self.enter(Region.BACKWARD)
