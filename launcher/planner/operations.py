"""What an operation costs, told from its name and its tensors: floating-point operations, bytes, sides of a product.

Operations are told apart by what limits them (`WorkKind`). Views and empty tensors cost nothing. A causal mask halves
attention; the window of sliding attention is not counted, so it is taken for full attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from launcher.domain import Exponents
from launcher.planner.polynomial import CONSTANT, TracedShape, factor_dimension, multiply
from launcher.planner.work import Terms, Work, WorkKind, terms

DTYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "int8",
}
FREE = (
    "empty",
    "new_empty",
    "detach",
    "lift_fresh",
    "alias",
    "_unsafe_view",
    "_local_scalar_dense",
    "record_stream",
)
"""Beginnings of names that launch nothing; views are known by their schema."""
NAMES: Mapping[WorkKind, tuple[str, ...]] = {
    WorkKind.FILL: ("zeros", "ones", "full", "fill", "zero", "new_zeros", "new_ones", "new_full", "arange"),
    WorkKind.COPY: ("copy", "_to_copy", "clone", "cat", "stack", "constant_pad", "slice_backward", "repeat"),
    WorkKind.HEAVY: (
        "exp", "log", "silu", "gelu", "tanh", "sigmoid", "pow", "rsqrt", "sqrt", "sin", "cos", "erf",
        "softplus", "native_dropout", "bernoulli", "rand",
    ),
    WorkKind.SOFTMAX: ("_softmax", "_log_softmax", "logsumexp", "_safe_softmax"),
    WorkKind.REDUCE: (
        "sum", "mean", "amax", "amin", "max", "min", "argmax", "norm", "linalg_vector_norm", "var", "prod",
        "cumsum", "sort", "topk", "any", "all", "native_layer_norm", "native_group_norm", "_fused_rms_norm",
    ),
    WorkKind.GATHER: (
        "embedding", "index", "gather", "scatter", "take", "_index_put_impl", "masked_select", "nonzero",
    ),
    WorkKind.QUANTIZE: ("dequantize", "quantize", "int8_vectorwise", "int8_double_quant"),
    WorkKind.LIGHT: ("logical_", "native_dropout_backward"),
    WorkKind.OPTIMIZER: ("_fused_adam", "_fused_sgd", "_foreach_", "optimizer_update"),
}  # fmt: skip
"""Beginnings of names, by kind; the longest that fits counts. All others are light: one pass over their elements."""
PRODUCTS = {
    "aten::mm": (0, 1, False),
    "aten::matmul": (0, 1, False),
    "aten::linear": (0, 1, True),
    "aten::addmm": (1, 2, False),
    "aten::addmm_": (1, 2, False),
    "aten::bmm": (0, 1, False),
    "aten::baddbmm": (1, 2, False),
    "aten::baddbmm_": (1, 2, False),
    "aten::_grouped_mm": (0, 1, False),
    "bitsandbytes::int8_linear_matmul": (0, 1, True),
    "bitsandbytes::int8_scaled_mm": (0, 1, True),
    "bitsandbytes::int8_mixed_scaled_mm": (1, 2, True),
}
"""Matrix products: places of the operands among the arguments, and whether the second one is transposed."""
ATTENTION = ("_scaled_dot_product_", "_flash_attention_", "_efficient_attention_")
LAUNCH = Work(WorkKind.LAUNCH, "other")
PUTS = ("put", "add", "scatter", "reduce", "fill", "copy")
"""Endings of look-ups that write into a table, not out of it."""


@dataclass(frozen=True)
class Operation:
    """What is known of an operation by its name alone."""

    name: str
    """Without namespace."""
    kind: WorkKind
    """Its kind."""
    product: tuple[int, int, bool] | None
    """See `PRODUCTS`; None for anything else."""
    overwrites: bool
    """Whether its first argument is written and not read."""


def classify(func: Any) -> Operation | None:
    """What an operation is; None for what costs nothing."""
    schema = func._schema
    name = schema.name.rpartition("::")[2]
    is_view = any(item.alias_info is not None and not item.alias_info.is_write for item in schema.returns)
    if is_view or name.startswith(FREE):
        return None
    product = PRODUCTS.get(schema.name)
    if product is not None:
        return Operation(name, WorkKind.MATRIX, product, False)
    if name.startswith(ATTENTION):
        kind = WorkKind.ATTENTION_BACKWARD if "backward" in name else WorkKind.ATTENTION
        return Operation(name, kind, None, False)
    found = [
        (len(prefix), kind) for kind, names in NAMES.items() for prefix in names if name.startswith(prefix)
    ]
    kind = max(found, key=lambda item: item[0])[1] if found else WorkKind.LIGHT
    overwrites = name in ("copy_", "copy") or any(argument.is_out for argument in schema.arguments)
    return Operation(name, kind, None, overwrites)


class Describer:
    """Puts operations into numbers: polynomials in the batch and the length of a traced shape.

    Args:
        shape: The traced shape.
    """

    def __init__(self, shape: TracedShape) -> None:
        self._shape = shape

    def describe(
        self, operation: Operation, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> tuple[Work, ...]:
        """The work of one operation; a list of tensors is a launch, and a piece for each place in the list."""
        tensors, outputs = tensors_in([*args, *kwargs.values()]), tensors_in([output])
        if operation.kind in (WorkKind.ATTENTION, WorkKind.ATTENTION_BACKWARD):
            names = {item.name: value for item, value in zip(func._schema.arguments, args, strict=False)}
            is_causal = bool({**names, **kwargs}.get("is_causal", False))
            return (self._attention(operation.kind, is_causal, tensors, outputs),)
        if operation.product is not None:
            first, second, transposed = operation.product
            return (self.product(args[first], args[second], outputs, transposed=transposed),)
        formula = flop_registry.get(getattr(func, "overloadpacket", None))
        if formula is not None:  # a convolution
            flops = factor_dimension(int(formula(*args, **kwargs, out_val=output)), self._shape)
            return (
                Work(WorkKind.MATRIX, dtype_of(tensors), terms(flops), self.num_bytes([*tensors, *outputs])),
            )
        if operation.kind is WorkKind.OPTIMIZER and any(isinstance(item, (list, tuple)) for item in args):
            return self._list(operation, [*args, *kwargs.values()])
        moved = self._moved(operation, tensors, outputs)
        kind = operation.kind
        if operation.name == "optimizer_update_8bit_blockwise" and "adam" in args[0]:
            kind = WorkKind.BLOCKWISE_OPTIMIZER
        work = Work(kind, dtype_of(outputs or tensors), (), self.num_bytes(moved))
        return (LAUNCH, work) if operation.kind is WorkKind.OPTIMIZER else (work,)

    def product(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        outputs: Sequence[torch.Tensor],
        *,
        transposed: bool = False,
    ) -> Work:
        """A matrix product; `transposed` says that the second operand lies the other way round."""
        columns = right.shape[-2] if transposed else right.shape[-1]
        is_alike = left.dim() == right.dim() and not transposed
        groups = left.shape[:-2] if is_alike else ()
        rows = left.shape[-2] if is_alike else math.prod(left.shape[:-1])
        sides = [factor_dimension(int(side), self._shape) for side in (rows, left.shape[-1], columns)]
        flops: dict[Exponents, int] = {CONSTANT: 2}
        for factor in (*sides, *(factor_dimension(int(group), self._shape) for group in groups)):
            flops = multiply(flops, factor)
        return Work(
            WorkKind.MATRIX,
            dtype_of([left]),
            terms(flops),
            self.num_bytes([left, right, *outputs]),
            (terms(sides[0]), terms(sides[1]), terms(sides[2])),
            layout(left) + layout(right),
        )

    def num_bytes(self, tensors: Sequence[torch.Tensor], times: int = 1) -> Terms:
        """Bytes of tensors; an expanded dimension is one and the same memory."""
        total: dict[Exponents, int] = {}
        for tensor in tensors:
            size: dict[Exponents, int] = {CONSTANT: times * tensor.element_size()}
            for side, stride in zip(tensor.shape, tensor.stride(), strict=True):
                if stride or side == 0:
                    size = multiply(size, factor_dimension(int(side), self._shape))
            for pair, number in size.items():
                total[pair] = total.get(pair, 0) + number
        return terms(total)

    def _attention(
        self, kind: WorkKind, is_causal: bool, tensors: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> Work:
        """Two products forward and five backward (torch.utils.flop_counter); a causal mask halves them."""
        is_backward = kind is WorkKind.ATTENTION_BACKWARD
        query, key, value = tensors[1:4] if is_backward else tensors[:3]
        products = 5 if is_backward else 2
        flops: dict[Exponents, int] = {CONSTANT: products if is_causal else 2 * products}
        for side in (*query.shape[:-1], key.shape[-2], (query.shape[-1] + value.shape[-1]) // 2):
            flops = multiply(flops, factor_dimension(int(side), self._shape))
        sides = [
            terms(factor_dimension(int(side), self._shape))
            for side in (query.shape[-2], query.shape[-1], key.shape[-2])
        ]
        moved = self.num_bytes([*tensors, *outputs])
        return Work(kind, dtype_of([query]), terms(flops), moved, (sides[0], sides[1], sides[2]))

    def _list(self, operation: Operation, values: Sequence[Any]) -> tuple[Work, ...]:
        """All lists are read. The first one is written; a fused optimizer writes all but the second, the gradients."""
        lists = [tensors_in([item]) for item in values if isinstance(item, (list, tuple))]
        longest = max(len(items) for items in lists)
        pieces = []
        for place in range(longest):
            read = [items[place] for items in lists if len(items) == longest]
            written = [read[0], *read[2:]] if operation.name.startswith("_fused") else read[:1]
            moved = self.num_bytes([*read, *written])
            pieces.append(Work(WorkKind.OPTIMIZER, dtype_of(read), (), moved))
        return (LAUNCH, *pieces)

    def _moved(
        self, operation: Operation, tensors: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """What is read and written, each once."""
        if operation.kind is WorkKind.FILL:
            return outputs
        if operation.kind is WorkKind.GATHER and tensors:
            # what is looked up is as much as what comes out, or as what is put in, not the whole table
            if operation.name.endswith("_backward"):
                return [*tensors[:1], *outputs]
            looked_up = tensors[-1:] if operation.name.rstrip("_").endswith(PUTS) else outputs
            return [*looked_up, *looked_up]
        return [*(tensors[1:] if operation.overwrites else tensors), *outputs]


def layout(matrix: torch.Tensor) -> str:
    """`t` for a matrix that lies transposed in memory, else `n`."""
    return "t" if matrix.stride(-2) == 1 and matrix.stride(-1) != 1 else "n"


def tensors_in(values: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors among values and in lists of them."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


def dtype_of(tensors: Sequence[torch.Tensor]) -> str:
    """The dtype in which something is computed, by the planner's name."""
    return DTYPES.get(tensors[0].dtype, "other") if tensors else "other"
