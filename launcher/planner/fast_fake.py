"""A fake-tensor mode that remembers the outputs of plain operations.

A training step repeats a few hundred distinct operations some ten thousand times. torch's own cache pays for
generality on every look-up; this one answers the plain cases (fake tensors and Python scalars in, fresh dense
tensors out, or the first argument changed in place) from a small key, and leaves everything else to torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import islice
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout)
RESHAPING = (
    "resize_",
    "set_",
    "as_strided_",
    "t_",
    "transpose_",
    "squeeze_",
    "unsqueeze_",
    "swapaxes_",
    "detach_",
)

Recipe = tuple[tuple[torch.Size, tuple[int, ...], int, torch.dtype, torch.device], ...]
Told = tuple[list[tuple[str, Any, tuple[bool, Recipe]]], list[tuple[str, str]]]
"""Recipes by name and arguments of the operation, and kinds by name."""


@dataclass(frozen=True)
class Memory:
    """What is known of operations: the same in every trace of a process, so traces may share it."""

    recipes: dict[Any, tuple[bool, Recipe]] = field(default_factory=dict)
    """Outputs, by operation and arguments."""
    kinds: dict[Any, str] = field(default_factory=dict)
    """See `_kind`, by operation."""

    def told(self, known: int = 0) -> Told:
        """What is remembered, in words that another process understands.

        Args:
            known: So many recipes, the oldest ones, are left out.
        """
        recipes = [
            (str(key[0]), key[1:], recipe) for key, recipe in islice(self.recipes.items(), known, None)
        ]
        return recipes, [(str(func), kind) for func, kind in self.kinds.items() if kind != "other"]

    def learn(self, told: Told) -> None:
        """Takes over what another process remembers."""
        recipes, kinds = told
        for name, kind in kinds:
            self.kinds.setdefault(_operation(name), kind)
        for name, arguments, recipe in recipes:
            self.recipes[(_operation(name), *arguments)] = recipe


def _operation(name: str) -> Any:
    """The operation of a name, `aten.add.Tensor`."""
    return reduce(getattr, name.split("."), torch.ops)


class FastFakeTensorMode(FakeTensorMode):
    """See the module; behaves as `FakeTensorMode`, in about half the time.

    Args:
        memory: What earlier traces of this process have learned; None: nothing.
    """

    def __init__(self, memory: Memory | None = None) -> None:
        super().__init__(allow_non_fake_inputs=True)
        memory = memory or Memory()
        self._recipes, self._kinds = memory.recipes, memory.kinds

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard against it costs on every operation

    def shortcut(self, func: Any, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """The output of a plain operation that is known already; NotImplemented for any other."""
        kind = self._kinds.get(func)
        first = args[0] if args else None
        if kind == "in_place":
            return first if isinstance(first, FakeTensor) and first.constant is None else NotImplemented
        if kind not in ("fresh", "view"):
            return NotImplemented
        known = self._recipes.get(_key(func, args, kwargs))
        if known is None:
            return NotImplemented
        return self._view(first, known[1]) if kind == "view" else self._make(*known)

    def _cached_dispatch_impl(
        self, func: Any, types: Sequence[type], args: Sequence[object], kwargs: Mapping[str, object]
    ) -> object:
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _kind(func)
        first = args[0] if args else None
        output = super()._cached_dispatch_impl(func, types, args, kwargs)
        key = _key(func, args, kwargs) if kind in ("fresh", "view") else None
        if key is None:
            return output
        leaves = output if isinstance(output, tuple) else (output,)
        if not all(isinstance(leaf, FakeTensor) for leaf in leaves):
            return output
        if kind == "fresh" and not _storages(leaves).isdisjoint(_storages(args)):
            self._kinds[func] = "other"  # aliases its input without saying so
        elif kind == "fresh" or (isinstance(first, FakeTensor) and leaves[0].dtype is first.dtype):
            self._recipes[key] = (
                isinstance(output, tuple),
                tuple(
                    (leaf.shape, leaf.stride(), leaf.storage_offset(), leaf.dtype, leaf.fake_device)
                    for leaf in leaves
                ),
            )
        return output

    def _make(self, several: bool, recipe: Recipe) -> object:
        with in_kernel_invocation_manager(self):
            bare = [
                torch.empty_strided(size, stride, dtype=dtype, device="meta")
                for size, stride, _, dtype, _ in recipe
            ]
        made = [FakeTensor(self, tensor, facts[-1]) for tensor, facts in zip(bare, recipe, strict=True)]
        return tuple(made) if several else made[0]

    def _view(self, base: Any, recipe: Recipe) -> object:
        size, stride, offset, _, device = recipe[0]
        with in_kernel_invocation_manager(self):
            bare = torch.as_strided(base, size, stride, offset)
        return FakeTensor(self, bare, device)


def _storages(values: Sequence[object]) -> set[int]:
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def _kind(func: Any) -> str:
    """`fresh` outputs alias nothing, `view` aliases the first argument, `in_place` returns it; else `other`."""
    schema = getattr(func, "_schema", None)
    if schema is None or func.namespace != "aten" or len(schema.arguments) == 0:
        return "other"
    name = schema.name.split("::")[1]
    aliased = [argument for argument in schema.arguments if argument.alias_info is not None]
    plain_returns = bool(schema.returns) and all(str(output.type) == "Tensor" for output in schema.returns)
    if not plain_returns:
        return "other"
    if not aliased:
        return "fresh" if not any(output.alias_info for output in schema.returns) else "other"
    if len(aliased) > 1 or aliased[0].name != schema.arguments[0].name or len(schema.returns) > 1:
        return "other"
    if not aliased[0].alias_info.is_write:
        return "view"
    return "in_place" if name.endswith("_") and name not in RESHAPING else "other"


def _key(func: Any, args: Sequence[object], kwargs: Mapping[str, object]) -> Any:
    parts: list[object] = [func]
    for value in args:
        part = _part(value)
        if part is NotImplemented:
            return None
        parts.append(part)
    for name, value in kwargs.items():
        part = _part(value)
        if part is NotImplemented:
            return None
        parts.append((name, part))
    return tuple(parts)


def _part(value: object) -> object:
    if isinstance(value, FakeTensor):
        if value.constant is not None:
            return NotImplemented
        return (value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device)
    if isinstance(value, PLAIN):
        return (type(value), value)
    if isinstance(value, (list, tuple)):
        items = tuple(_part(item) for item in value)
        return NotImplemented if any(item is NotImplemented for item in items) else items
    return NotImplemented
