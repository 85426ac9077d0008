"""Figures of many shapes at once, off one skyline: what a search asks of plans that differ in their micro batch alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from launcher.job import Checkpointing, JobSpec
from launcher.memory import Category, Phase
from launcher.plan import Plan, varied
from launcher.planner.group import Split
from launcher.planner.polynomial import monomials
from launcher.planner.skyline import Skyline
from launcher.planner.space import attentions, losses, optimizers
from launcher.planner.stream import CATEGORIES


def peaks_bytes(
    skyline: Skyline,
    splits: Sequence[Split],
    length: int,
    without: Collection[Category] = (),
    *,
    only_steps: bool = False,
    workspaces_bytes: int = 0,
) -> NDArray[np.int64]:
    """Highest bytes over all phases, as `Skyline.peaks` and `Skyline.floor_bytes` have them; shape (splits,).

    Args:
        skyline: The skyline, whose domain holds all shapes.
        splits: Micro batch and accumulation of each.
        length: Tokens per sequence.
        without: Categories that have nothing in training steps.
        only_steps: Whether other phases count for nothing.
        workspaces_bytes: What every phase has besides, but for loading.
    """
    batches = np.array([split[0] for split in splits], dtype=np.float64)
    accumulations = np.array([split[1] for split in splits], dtype=np.float64)
    powers = monomials(skyline.exponents, batches, length)
    kept = [index for index, category in enumerate(CATEGORIES) if category not in without]
    highest = np.zeros(len(splits))
    for part in skyline.phases:
        is_step = part.phase is Phase.TRAIN_STEP
        if only_steps and not is_step:
            continue
        rows = part.rows[:, kept].sum(axis=1) if is_step and without else part.rows.sum(axis=1)
        besides = 0 if part.phase is Phase.LOAD else workspaces_bytes
        highest = np.maximum(highest, (powers @ rows.T).max(axis=1) + besides)
    each = np.array([skyline.batch_inputs.get(pair, 0) for pair in skyline.exponents], dtype=np.float64)
    waiting = (accumulations - skyline.traced_accumulation) * (powers @ each)
    return np.rint(highest + waiting).astype(np.int64)


class Readings:
    """Peaks that were read off skylines: groups of plans with other kernels ask for the same ones again."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], list[int]] = {}

    def clear(self) -> None:
        """Forgets all, because a skyline was made."""
        self._known.clear()

    def peaks_bytes(
        self,
        name: str,
        skyline: Skyline,
        length: int,
        splits: tuple[Split, ...],
        without: Collection[Category] = (),
        *,
        only_steps: bool = False,
        workspaces_bytes: int = 0,
    ) -> list[int]:
        """See `peaks_bytes`; of each skyline the name stands for it."""
        key = name, length, splits, tuple(without), only_steps, workspaces_bytes
        known = self._known.get(key)
        if known is None:
            read = peaks_bytes(
                skyline, splits, length, without, only_steps=only_steps, workspaces_bytes=workspaces_bytes
            )
            known = self._known[key] = [int(size) for size in read]
        return known


def alike_plans(job: JobSpec, plan: Plan) -> Iterator[Plan]:
    """The plan with each checkpointing, each of the job's kernels and each implementation of its optimizer."""
    kernels = {plan.optimizer, *optimizers(job)}
    options = {plan.attention, *attentions(job)}
    for mode, attention, loss, optimizer in product(Checkpointing, options, losses(job), kernels):
        changes = {"activation_checkpointing": mode, "loss": loss, "optimizer": optimizer}
        yield varied(plan, attention=attention, **changes)
