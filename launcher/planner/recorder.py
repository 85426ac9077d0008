"""Counts the work of the operations that a tape sees.

Only the last optimizer step is counted: in it the optimizer has its states. Equal operations are described once. What
a twin stands for is counted as the operation itself, unless the twin is made of operations that are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from launcher.domain import Exponents
from launcher.planner.operations import Describer, Operation, classify, dtype_of, layout
from launcher.planner.polynomial import CONSTANT, TracedShape, multiply
from launcher.planner.work import Stage, Work, WorkKind

Signature = tuple[Any, ...]
BACKWARD_PASSES: Mapping[Stage, Stage] = {
    Stage.FIRST_FORWARD: Stage.FIRST_BACKWARD,
    Stage.LATER_FORWARD: Stage.LATER_BACKWARD,
}
"""The backward pass that follows on a forward pass."""


class WorkRecorder:
    """Counts works; see the module.

    Args:
        shape: The traced shape, for writing sizes as polynomials.
        token_tile: Tokens that the loss handles at a time; None: all at once.
    """

    def __init__(self, shape: TracedShape, token_tile: int | None = None) -> None:
        self._shape = shape
        self._describer = Describer(shape)
        self._tile = token_tile if shape.length_is_symbol else None
        self._operations: dict[Any, Operation | None] = {}
        self._works: dict[Signature, tuple[Work, ...]] = {}
        self._counts: dict[tuple[Stage, bool, Signature], int] = {}
        self.active = False
        self.stage = Stage.FIRST_FORWARD
        """The part of the step; of a micro batch, its forward pass: a backward pass is known by autograd's engine."""
        self.total = 0
        """Operations counted so far."""

    def note(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        output: Any,
        in_head: bool,
        counted: int,
    ) -> None:
        """Counts one operation.

        Args:
            func: The operation.
            args: Its arguments.
            kwargs: Its named arguments.
            output: What it returned.
            in_head: Whether it belongs to the loss, which works on tiles.
            counted: `total` before it ran; where its twin's own operations were counted, it is counted already.
        """
        if func not in self._operations:
            self._operations[func] = classify(func)
        operation = self._operations[func]
        if operation is None or (self.total != counted and operation.product is None):
            return
        signature: Signature = (func, _facts(output), *map(_facts, args))
        if operation.product is not None:
            first, second, _ = operation.product
            signature += (layout(args[first]) + layout(args[second]),)
        if kwargs:
            signature += tuple((name, _facts(value)) for name, value in kwargs.items())
        if signature not in self._works:
            self._works[signature] = self._describer.describe(operation, func, args, kwargs, output)
        self._count(signature, in_head)

    def note_kernel(self, name: str, kind: WorkKind, tensor: torch.Tensor, passes: int) -> None:
        """Counts a kernel that is no operation of torch, by the passes that it makes over a tensor."""
        signature: Signature = (name, _facts(tensor))
        if signature not in self._works:
            moved = self._describer.num_bytes([tensor], times=passes)
            self._works[signature] = (Work(kind, dtype_of([tensor]), num_bytes=moved),)
        self._count(signature, kind is not WorkKind.TRANSFER)

    def note_product(self, name: str, left: torch.Tensor, right: torch.Tensor, output: torch.Tensor) -> None:
        """Counts a matrix product of the loss that fake tensors can't run."""
        signature: Signature = (name, *map(_facts, (left, right, output)), layout(left) + layout(right))
        if signature not in self._works:
            self._works[signature] = (self._describer.product(left, right, [output]),)
        self._count(signature, True)

    def tally(self) -> dict[tuple[Stage, Work], dict[Exponents, float]]:
        """All works with their counts; those of the loss's tiles grow with the tokens."""
        tally: dict[tuple[Stage, Work], dict[Exponents, float]] = {}
        tiles = self._tiles()
        for (stage, in_head, signature), number in self._counts.items():
            count = {CONSTANT: float(number)}
            if in_head and tiles:
                count = self._tiled(signature, number, tiles.get((stage, signature)))
            for work in self._works[signature] if count else ():
                entry = tally.setdefault((stage, replace(work, in_loss=in_head)), {})
                for pair, value in count.items():
                    entry[pair] = entry.get(pair, 0.0) + value
        return tally

    def _count(self, signature: Signature, in_head: bool) -> None:
        if self.active:
            self.total += 1
            stage = self.stage
            if stage in BACKWARD_PASSES and torch._C._current_graph_task_id() != -1:
                stage = BACKWARD_PASSES[stage]
            place = (stage, in_head, signature)
            self._counts[place] = self._counts.get(place, 0) + 1

    def _tiles(self) -> dict[tuple[Stage, Signature], bool]:
        """Operations on tiles of the loss: whether the tile is a whole one; the last one is smaller.

        The sizes of the last tile occur nowhere else, so an operation on it names its twin on a whole one. (The
        other way round fails where the model has a side as long as a tile.)
        """
        tokens, tile = self._shape.batch * (self._shape.length - 1), self._tile
        found: dict[tuple[Stage, Signature], bool] = {}
        if tile is None or tokens <= tile or tokens % tile == 0:
            return found
        for stage, in_head, signature in self._counts:
            if in_head and _has(signature, tokens % tile):
                twin = _swapped(signature, tokens % tile, tile)
                if (stage, True, twin) in self._counts:
                    found[stage, signature], found[stage, twin] = False, True
        return found

    def _tiled(self, signature: Signature, number: int, is_whole: bool | None) -> dict[Exponents, float]:
        """How often an operation of the loss runs at any number of tokens.

        Those on whole tiles are as many as the tokens make tiles, a part of one counted as such. What runs in every
        tile at one size (a cast of the weights) is known by its number.
        """
        if is_whole is False:
            return {}
        assert self._tile is not None
        whole = self._shape.batch * (self._shape.length - 1) // self._tile
        rows = {(1, 0, 0): 1} if self._shape.batch_is_symbol else {CONSTANT: self._shape.batch}
        tiles = {
            pair: value / self._tile for pair, value in multiply(rows, {(0, 1, 0): 1, CONSTANT: -1}).items()
        }
        if is_whole:
            return {pair: number / whole * value for pair, value in tiles.items()}
        sizes = [item for work in self._works[signature] for item in (work.num_bytes, work.flops)]
        is_constant = all(pair == CONSTANT for item in sizes for pair, _ in item)
        if is_constant and number > whole and number % (whole + 1) == 0:
            return {pair: number / (whole + 1) * value for pair, value in tiles.items()}
        return {CONSTANT: float(number)}


def idle_recorder() -> WorkRecorder:
    """One that counts nothing, for callers that don't ask for work."""
    return WorkRecorder(TracedShape(1, 1, batch_is_symbol=False, length_is_symbol=False))


def _facts(value: Any) -> Any:
    """What of an argument decides the work: shapes, dtypes, which dimensions are expanded, and switches."""
    if isinstance(value, torch.Tensor):
        strides = value.stride()
        expanded = tuple(stride == 0 for stride in strides) if 0 in strides else None
        return (value.shape, value.dtype, expanded)
    if isinstance(value, (list, tuple)):
        return tuple(_facts(item) for item in value)
    return value if value is True or value is False else None


def _has(signature: Any, size: int) -> bool:
    """Whether a side of that size occurs in a signature."""
    if isinstance(signature, (tuple, torch.Size)):
        return any(_has(item, size) for item in signature)
    return type(signature) is int and signature == size


def _swapped(signature: Any, old: int, new: int) -> Any:
    """A signature with one size in place of another."""
    if isinstance(signature, torch.Size):
        return torch.Size([new if side == old else side for side in signature])
    if isinstance(signature, tuple):
        return tuple(_swapped(item, old, new) for item in signature)
    return signature
