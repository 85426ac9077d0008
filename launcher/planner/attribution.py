"""Which module of a model is at work: in forward the innermost one, in backward the one that is gone back through."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from launcher.planner.tape import Tape


class Attribution:
    """Follows a model through forward and backward passes.

    Forward hooks keep a stack of the modules that run. For backward they note autograd's sequence number at every
    entry and exit: nodes of the graph are numbered in the order in which forward made them, so a node's number
    tells between which two hooks it was made. A recomputed forward pass runs the same hooks inside backward.

    Args:
        model: The model; the path of its adapters' wrapper is left out of the paths.
    """

    def __init__(self, model: nn.Module) -> None:
        base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self._paths = {module: path or type(base).__name__ for path, module in base.named_modules()}
        self._stack = [""]
        self._numbers = [0]
        self._owners = [""]
        for module in self._paths:
            module.register_forward_pre_hook(self._begin)
            module.register_forward_hook(self._end, always_call=True)  # recomputation stops by an exception

    def path(self) -> str:
        """Path of the module at work, `model.layers.3.mlp.down_proj`; empty where none is."""
        if len(self._stack) > 1:
            return self._stack[-1]
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return ""
        return self._owners[bisect_right(self._numbers, node._sequence_nr()) - 1]

    def assign(self, tape: Tape, belongings: Callable[[torch.Tensor], Iterable[torch.Tensor]]) -> None:
        """Assigns what belongs to a module's own parameters and buffers to the module, where nobody did before.

        Args:
            tape: Knows the blocks.
            belongings: A parameter or buffer itself, and all that is kept for it.
        """
        for module, path in self._paths.items():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    tape.assign(belongings(tensor), path)

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._stack.append(self._paths[module])
        self._note()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()
        self._note()

    def _note(self) -> None:
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._owners.append(self._stack[-1])
