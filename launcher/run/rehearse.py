"""The rehearsal: a short run of the longest examples in processes of its own, before the run itself.

It has a run directory of its own below the run's. What it trained is thrown away; what it measured stays.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Final

from launcher.checkpoints import last_checkpoint
from launcher.run_paths import RunPaths
from launcher.run_record import WorkerOrder

STEPS: Final = 2
"""Optimizer steps: the second one has optimizer states beside its activations."""
MICRO_BATCHES: Final = 2
"""Micro batches per step at most: the second one has gradients beside its activations."""
MARK: Final = "rehearsal  "
"""What the rehearsal's lines begin with."""


def rehearsal_order(order: WorkerOrder) -> WorkerOrder:
    """What the workers of a rehearsal do: the order's own phases, each once and early."""
    job, plan = order.job, order.plan
    steps = min(MICRO_BATCHES, plan.gradient_accumulation_steps)
    training = replace(
        job.training,
        global_batch_size=plan.micro_batch_size * steps * plan.world_size,
        max_steps=STEPS,
        save_steps=STEPS if job.training.save_steps else None,
        save_total_limit=None,
        report_to=(),
        logging_steps=1,
    )
    rehearsed = replace(
        job,
        training=training,
        evaluation=replace(job.evaluation, steps=STEPS if job.evaluation.enabled else None),
        launch=replace(job.launch, rehearse=False),
    )
    return replace(
        order, job=rehearsed, plan=replace(plan, gradient_accumulation_steps=steps), rehearses=True
    )


def is_due(paths: RunPaths) -> bool:
    """Whether a run has a rehearsal that comes before its first step: one that is continued has none."""
    return paths.rehearsal.worker.is_file() and last_checkpoint(paths.checkpoints) is None


def discard_results(paths: RunPaths) -> None:
    """Removes what a rehearsal trained; its log, and what was measured, stay.

    Args:
        paths: The rehearsal's own run directory.
    """
    for folder in (paths.checkpoints, paths.model, paths.merged):
        shutil.rmtree(folder, ignore_errors=True)
    for file in (paths.generations, paths.metrics):
        file.unlink(missing_ok=True)
