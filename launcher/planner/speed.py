"""Step time from the trace: a roofline per operation, at the device's own rates.

Every operation of the step takes the time of its arithmetic or of its bytes, whichever is longer. Where operations
are queued (GPU), a forward or a backward pass, or the update, takes what the device needs or what the host needs to
launch it, whichever is longer: after each of them the host waits for the device, because TRL reads its metrics after
the loss (trl 1.16, sft_trainer.py, `compute_loss`), and transformers looks for a loss that is no number after the
backward pass (transformers 5.24, trainer.py, `logging_nan_inf_filter`). Where they are not queued (CPU), both add up.
Recomputation, clipping and the optimizer are operations of the trace like any other; what is offloaded adds its bytes
over the link to the host.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from launcher.errors import UnsupportedByPlanner
from launcher.planner.work import Stage, WorkKind, WorkTable
from launcher.rates import Rates, host_seconds
from launcher.step_time import StepTime

Values = NDArray[np.float64]
BLOCKWISE_SHARE = 0.081
"""Share of the bandwidth of passes that bitsandbytes' 8-bit Adam reaches over what it reads: it searches each state's
place in a table of 256. Its kernels took 206 ms for 8.03e9 parameters on an H100 (bitsandbytes 0.50, torch's profiler,
2026-11-26); Lion's, with one state, were not measured and count as passes."""
TILE = 128
"""Side of the tile of a matrix product that one multiprocessor works on: the smallest of the efficient tiles of
cuBLAS (NVIDIA, Matrix Multiplication Background User's Guide, 2023)."""
NEIGHBOR_POWER = 4
"""Power of the distance by which measured products count for others (Shepard's interpolation)."""
NO_LAUNCH = (WorkKind.OPTIMIZER, WorkKind.BLOCKWISE_OPTIMIZER, WorkKind.TRANSFER)
"""Kinds that are pieces of a launch counted elsewhere, or none."""


class SpeedModel:
    """The time of a step on one device, for every shape of a table.

    Args:
        table: The work of the step.
        rates: The device's rates.
        checkpointing: Activation checkpointing of the plan that the table is of, by name.
    """

    def __init__(self, table: WorkTable, rates: Rates, checkpointing: str = "none") -> None:
        self._table = table
        self._rates = rates
        groups: dict[tuple[WorkKind, str, str], list[int]] = {}
        for row, facts in enumerate(zip(table.kinds, table.dtypes, table.layouts, strict=True)):
            groups.setdefault(facts, []).append(row)
        self._groups = [(*facts, np.array(rows)) for facts, rows in groups.items()]
        launches = np.array([kind not in NO_LAUNCH for kind in table.kinds], dtype=np.float64)
        forward, backward = host_seconds(rates, checkpointing)
        per_stage = {stage: backward if "backward" in stage else forward for stage in Stage}
        per_stage[Stage.UPDATE] = rates.launch_seconds
        self._host = launches * np.array([per_stage[stage] for stage in table.stages])
        self._is_in = np.array(
            [[stage is item for item in table.stages] for stage in Stage], dtype=np.float64
        )
        self._known: dict[tuple[int, int], tuple[float, float, float]] = {}

    def step(self, batch: int, length: int, accumulation: int) -> StepTime:
        """Time of an optimizer step.

        Args:
            batch: Sequences per micro batch.
            length: Tokens per sequence.
            accumulation: Micro batches per optimizer step.

        Raises:
            UnsupportedByPlanner: When the device has no rate for what the step does.
        """
        first, later, update = self._stages(batch, length)
        return StepTime(
            first_batch_seconds=first,
            later_batch_seconds=later,
            update_seconds=update,
            accumulation=accumulation,
            tokens=batch * length * accumulation,
            rates=self._rates.source,
            is_calibrated=self._rates.is_calibrated,
        )

    def _stages(self, batch: int, length: int) -> tuple[float, float, float]:
        """Times of the first micro batch, of a later one, and of the update."""
        known = self._known.get((batch, length))
        if known is None:
            quantities, counts = self._table.at(batch, length)
            working = self._is_in @ (counts * self.operation_seconds(quantities))
            launching = self._is_in @ (counts * self._host)
            totals = working + launching if self._rates.is_synchronous else np.maximum(working, launching)
            forward, backward, later_forward, later_backward, update = (float(total) for total in totals)
            first, later = forward + backward, later_forward + later_backward
            known = self._known[batch, length] = (first, later, update)
        return known

    def operation_seconds(self, quantities: Values) -> Values:
        """Time that the device needs for one operation of each row; shape (rows,).

        Args:
            quantities: Flops, bytes, rows, inner side and columns at a shape; shape (rows, 5).
        """
        seconds = np.zeros(len(quantities))
        for kind, dtype, layout, rows in self._groups:
            values = quantities[rows]
            if kind is WorkKind.MATRIX:
                seconds[rows] = _matrix_seconds(self._rates, dtype, layout, values)
            elif kind in (WorkKind.ATTENTION, WorkKind.ATTENTION_BACKWARD):
                seconds[rows] = _attention_seconds(self._rates, kind, dtype, values)
            elif kind is WorkKind.BLOCKWISE_OPTIMIZER:
                seconds[rows] = _pass_seconds(self._rates, kind, dtype, values[:, 1]) / BLOCKWISE_SHARE
            elif kind is WorkKind.TRANSFER:
                seconds[rows] = values[:, 1] / _link(self._rates)
            elif kind is not WorkKind.LAUNCH:
                seconds[rows] = _pass_seconds(self._rates, kind, dtype, values[:, 1])
        return seconds


def _matrix_seconds(rates: Rates, dtype: str, layout: str, values: Values) -> Values:
    same = [point for point in rates.matrix if point.dtype == dtype] or list(rates.matrix)
    points = [point for point in same if point.layout == layout] or same
    flops, sides = values[:, 0], np.maximum(values[:, 2:], 1.0)
    if points:
        places = np.array([[point.rows, point.inner, point.columns] for point in points], dtype=np.float64)
        known = np.log([point.flops_per_second for point in points])
        return flops / np.exp(_interpolate(np.log2(places), known, np.log2(sides)))
    rate = _matrix_rate(rates, dtype)
    share = np.ones(len(values))
    if rates.multiprocessors:
        per_product = 2.0 * sides.prod(axis=1)
        products = np.maximum(flops / per_product, 1.0)
        high, wide = _tile_side(sides[:, 0]), _tile_side(sides[:, 2])
        tiles = np.ceil(sides[:, 0] / high) * np.ceil(sides[:, 2] / wide) * products
        waves = np.ceil(tiles / rates.multiprocessors)
        share = flops / (2.0 * sides[:, 1] * high * wide * waves * rates.multiprocessors)
    return np.maximum(flops / (rate * share), values[:, 1] / rates.bytes_per_second)


def _tile_side(side: Values) -> Values:
    """Side of a tile: half or a quarter of the full one where the product is that thin."""
    tile: Values = np.clip(2.0 ** np.ceil(np.log2(side)), TILE / 4, TILE)
    return tile


def _matrix_rate(rates: Rates, dtype: str) -> float:
    """The rate of large products; int8 ones are not faster than those of 16 bits unless it is known."""
    for name in (dtype, "bf16", "fp16", "fp32") if dtype not in ("fp32", "other") else ("fp32", "bf16"):
        if rates.matrix_flops.get(name):
            return rates.matrix_flops[name]
    raise UnsupportedByPlanner(
        f"{rates.source}: no rate of matrix products in {dtype}",
        "`launch action=calibrate` measures this machine",
    )


def _interpolate(places: Values, known: Values, wanted: Values) -> Values:
    """Values at places between known ones: each counts by a power of its nearness; at a known place it alone counts.

    Args:
        places: Where values are known; shape (points, 3).
        known: The values; shape (points,).
        wanted: Where they are wanted; shape (rows, 3).
    """
    distance = np.sqrt(((wanted[:, None, :] - places[None, :, :]) ** 2).sum(axis=2))
    weight = 1.0 / np.maximum(distance, 1e-6) ** NEIGHBOR_POWER
    values: Values = (weight * known).sum(axis=1) / weight.sum(axis=1)
    return values


def _attention_seconds(rates: Rates, kind: WorkKind, dtype: str, values: Values) -> Values:
    points = [point for point in rates.attention if point.dtype == dtype] or list(rates.attention)
    if points:
        points = sorted(points, key=lambda point: point.length)
        backward = kind is WorkKind.ATTENTION_BACKWARD
        known = [
            point.backward_flops_per_second if backward else point.forward_flops_per_second
            for point in points
        ]
        lengths = np.log([point.length for point in points])
        rate = np.exp(np.interp(np.log(np.maximum(values[:, 2], 1.0)), lengths, np.log(known)))
        seconds: Values = values[:, 0] / rate
        return seconds
    reached = _matrix_rate(rates, dtype) * rates.attention_efficiency
    return np.maximum(values[:, 0] / reached, values[:, 1] / rates.bytes_per_second)


def _pass_seconds(rates: Rates, kind: WorkKind, dtype: str, num_bytes: Values) -> Values:
    points = _passes(rates, kind, dtype)
    if not points:
        return num_bytes / rates.bytes_per_second
    sizes = np.array([float(size) for size, _ in points])
    speeds = np.log([speed for _, speed in points])
    rate = np.exp(np.interp(np.log(np.maximum(num_bytes, 1.0)), np.log(sizes), speeds))
    seconds: Values = num_bytes / rate
    return seconds


def _passes(rates: Rates, kind: WorkKind, dtype: str) -> list[tuple[int, float]]:
    """Measured passes of a kind: of its dtype if there are any, else of another one, else light ones."""
    for wanted in (kind.value, WorkKind.LIGHT.value):
        same = [point for point in rates.passes if point.kind == wanted]
        found = [point for point in same if point.dtype == dtype] or same
        if found:
            first = found[0].dtype
            pairs = {(point.num_bytes, point.bytes_per_second) for point in found if point.dtype == first}
            return sorted(pairs)
    return []


def _link(rates: Rates) -> float:
    if not rates.host_link_bytes_per_second:
        raise UnsupportedByPlanner(
            f"{rates.source}: no rate of the link to the host, and the plan offloads",
            "set `hardware.host_link_bytes_per_second`",
        )
    return rates.host_link_bytes_per_second
