"""The work of a step: how many operations of which kind and size it runs, as polynomials in batch and length.

A tape sees every operation of the real step. Equal operations are counted together: a matrix product by its sides,
anything else by the bytes that it reads and writes. Like skylines, a table answers every shape of its domain, and two
depths answer for all layers: layers add operations, so counts are affine in the number of periods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.domain import Exponents
from launcher.planner.polynomial import CONSTANT, Polynomial, monomials

Terms = tuple[tuple[Exponents, int], ...]
"""A polynomial that can be a key: its terms in order."""


class WorkKind(StrEnum):
    """What limits an operation, and which kernels share a rate."""

    MATRIX = "matrix"
    ATTENTION = "attention"
    ATTENTION_BACKWARD = "attention_backward"
    FILL = "fill"
    COPY = "copy"
    LIGHT = "light"
    HEAVY = "heavy"
    SOFTMAX = "softmax"
    REDUCE = "reduce"
    GATHER = "gather"
    OPTIMIZER = "optimizer"
    BLOCKWISE_OPTIMIZER = "blockwise_optimizer"
    QUANTIZE = "quantize"
    TRANSFER = "transfer"
    LAUNCH = "launch"


class Stage(StrEnum):
    """Which part of an optimizer step an operation belongs to; recomputation is part of a backward pass."""

    FIRST_FORWARD = "first_forward"
    FIRST_BACKWARD = "first_backward"
    LATER_FORWARD = "later_forward"
    LATER_BACKWARD = "later_backward"
    UPDATE = "update"


@dataclass(frozen=True)
class Work:
    """One operation, by what decides how long it takes."""

    kind: WorkKind
    """Its kind."""
    dtype: str
    """Dtype of what it computes: `fp32`, `bf16`, `fp16`, `int8`, or `other`."""
    flops: Terms = ()
    """Floating-point operations of matrix products and attention; a causal mask halves them."""
    num_bytes: Terms = ()
    """Bytes read and written."""
    sides: tuple[Terms, Terms, Terms] = ((), (), ())
    """Rows, inner side and columns of one matrix product; of attention: queries, head size and keys."""
    layout: str = ""
    """How the operands of a product lie in memory: `n` row by row, `t` transposed; `nt` is a layer's forward pass."""
    in_loss: bool = False
    """Whether it belongs to the loss, head included: another loss does it in another way."""


WorkTally = Mapping[tuple[Stage, Work], Mapping[Exponents, float]]
"""How often each operation runs, as a polynomial: tiles of a fixed number of tokens are more where tokens are."""


@dataclass(frozen=True)
class WorkTable:
    """The work of a step for every shape in a domain; all arrays have one row per kind of operation."""

    stages: tuple[Stage, ...]
    """Where in the step; length rows."""
    kinds: tuple[WorkKind, ...]
    """Kinds; length rows."""
    dtypes: tuple[str, ...]
    """Dtypes; length rows."""
    layouts: tuple[str, ...]
    """Layouts of matrix products; length rows."""
    exponents: tuple[Exponents, ...]
    """The monomials, last axis of the arrays."""
    quantities: NDArray[np.float64]
    """Flops, bytes, and the three sides; shape (rows, 5, monomials)."""
    counts: NDArray[np.float64]
    """How often; shape (rows, monomials). Negative counts take back what an extension over depth has too much of."""
    in_loss: tuple[bool, ...]
    """Whether it belongs to the loss; length rows."""

    def at(self, batch: int, length: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The quantities, shape (rows, 5), and the counts, shape (rows,), at a shape."""
        powers = monomials(self.exponents, batch, length)
        return self.quantities @ powers, self.counts @ powers

    def without_loss(self) -> WorkTable:
        """What is the same whatever the loss."""
        rows = [row for row, in_loss in enumerate(self.in_loss) if not in_loss]
        return WorkTable(
            tuple(self.stages[row] for row in rows),
            tuple(self.kinds[row] for row in rows),
            tuple(self.dtypes[row] for row in rows),
            tuple(self.layouts[row] for row in rows),
            self.exponents,
            self.quantities[rows],
            self.counts[rows],
            (False,) * len(rows),
        )


def terms(polynomial: Polynomial) -> Terms:
    """A polynomial as a key."""
    return tuple(sorted((pair, value) for pair, value in polynomial.items() if value))


def build_table(tally: WorkTally) -> WorkTable:
    """Puts a tally into arrays."""
    entries = sorted(tally, key=lambda entry: (entry[0].value, entry[1].kind.value, repr(entry[1])))
    parts = [(work.flops, work.num_bytes, *work.sides) for _, work in entries]
    used = {pair for row in parts for item in row for pair, _ in item}
    used |= {pair for count in tally.values() for pair in count} | {CONSTANT}
    exponents = tuple(sorted(used))
    column = {pair: index for index, pair in enumerate(exponents)}
    quantities = np.zeros((len(entries), 5, len(exponents)))
    counts = np.zeros((len(entries), len(exponents)))
    for row, (entry, items) in enumerate(zip(entries, parts, strict=True)):
        for place, item in enumerate(items):
            for pair, value in item:
                quantities[row, place, column[pair]] = value
        for pair, number in tally[entry].items():
            counts[row, column[pair]] = number
    return WorkTable(
        tuple(stage for stage, _ in entries),
        tuple(work.kind for _, work in entries),
        tuple(work.dtype for _, work in entries),
        tuple(work.layout for _, work in entries),
        exponents,
        quantities,
        counts,
        tuple(work.in_loss for _, work in entries),
    )


def extend_tally(shallow: WorkTally, deep: WorkTally, steps: float) -> WorkTally:
    """The tally of the full depth: operations of equal size occur affinely often in the number of periods.

    An operation whose size grows with depth (a list over all layers) is taken back `steps` - 1 times at the shallow
    size and counted `steps` times at the deep one: its time is extended affinely, too.

    Args:
        shallow: Tally of the shallower trace.
        deep: Tally of the trace with one period more.
        steps: How many periods the full depth has more than the shallower trace.
    """
    extended: dict[tuple[Stage, Work], dict[Exponents, float]] = {}
    for entry in {**shallow, **deep}:
        low, high = shallow.get(entry, {}), deep.get(entry, {})
        count = {
            pair: low.get(pair, 0.0) + steps * (high.get(pair, 0.0) - low.get(pair, 0.0))
            for pair in {**low, **high}
        }
        extended[entry] = count
    return extended


def encode_table(table: WorkTable) -> dict[str, Any]:
    """A table as plain values."""
    return {
        "stages": [stage.value for stage in table.stages],
        "kinds": [kind.value for kind in table.kinds],
        "dtypes": list(table.dtypes),
        "layouts": list(table.layouts),
        "exponents": [list(pair) for pair in table.exponents],
        "quantities": table.quantities.tolist(),
        "counts": table.counts.tolist(),
        "in_loss": list(table.in_loss),
    }


def decode_table(payload: Mapping[str, Any]) -> WorkTable:
    """The table that `encode_table` took apart."""
    rows, columns = len(payload["kinds"]), len(payload["exponents"])
    return WorkTable(
        tuple(Stage(stage) for stage in payload["stages"]),
        tuple(WorkKind(kind) for kind in payload["kinds"]),
        tuple(str(dtype) for dtype in payload["dtypes"]),
        tuple(str(layout) for layout in payload["layouts"]),
        tuple((int(i), int(j), int(step)) for i, j, step in payload["exponents"]),
        np.array(payload["quantities"], dtype=np.float64).reshape(rows, 5, columns),
        np.array(payload["counts"], dtype=np.float64).reshape(rows, columns),
        tuple(bool(item) for item in payload["in_loss"]),
    )
