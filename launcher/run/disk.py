"""Whether the file system of a run has room for what the run leaves there, by prediction and by its rehearsal."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from launcher.checkpoints import PARTIAL, step_of, whole_checkpoints
from launcher.errors import LaunchError
from launcher.memory import DiskEstimate
from launcher.optimisation import TrainingSpec
from launcher.run_paths import RunPaths
from launcher.units import format_bytes


def require_disk(root: Path, needed_bytes: int) -> None:
    """Checks that the file system of a run directory has room for what the run leaves there.

    Args:
        root: The run directory; it need not exist yet.
        needed_bytes: What the run writes.

    Raises:
        LaunchError: When it has not.
    """
    try:
        existing = next(folder for folder in (root, *root.parents) if folder.exists())
        free_bytes = shutil.disk_usage(existing).free
    except OSError as failure:  # a name too long, a folder that may not be entered
        raise LaunchError(f"`{root}` can't be looked for: {failure}", "choose another `run_dir`") from failure
    if free_bytes < needed_bytes:
        raise LaunchError(
            f"`{root}` needs {needed_bytes} bytes ({format_bytes(needed_bytes)}) for checkpoints and models; its file "
            f"system has {free_bytes} bytes ({format_bytes(free_bytes)}) free",
            "another `run_dir`, a lower `training.save_total_limit`, or a higher `training.save_steps`",
        )


def rehearsed_bytes(paths: RunPaths, training: TrainingSpec) -> int:
    """Bytes that a run will write, by what its rehearsal wrote: how large an engine's checkpoints are, no plan says.

    Args:
        paths: The rehearsal's own run directory, before its results are thrown away.
        training: How often the run saves, and how much it keeps.
    """
    checkpoint = max(map(bytes_in, whole_checkpoints(paths.checkpoints)), default=0)
    return checkpoints_to_come(training, ()) * checkpoint + bytes_in(paths.model) + bytes_in(paths.merged)


def still_written_bytes(paths: RunPaths, training: TrainingSpec, disk: DiskEstimate | None) -> int:
    """Bytes that a run which goes on will take on disk beside what lies there already.

    Args:
        paths: The run directory.
        training: How often it saves, and how much it keeps.
        disk: What the whole run leaves; None, of an old run: nothing is known.
    """
    if disk is None:
        return 0
    steps = [step_of(path) for path in whole_checkpoints(paths.checkpoints)]
    checkpoints = checkpoints_to_come(training, steps) * disk.checkpoint_bytes
    results = [(paths.model, disk.model_bytes), (paths.merged, disk.merged_bytes)]
    more = sum(max(0, num_bytes - bytes_in(folder)) for folder, num_bytes in results)
    return max(0, checkpoints + more - bytes_in(paths.checkpoints / PARTIAL))  # which a start removes


def checkpoints_to_come(training: TrainingSpec, steps: Sequence[int]) -> int:
    """How many more checkpoints than there are will lie on disk at once; of an unknown number, one.

    Args:
        training: How often they are saved, and how many are kept.
        steps: Steps of those that are there.
    """
    between = training.steps_between_saves
    if between is None:
        return 0
    limit = training.save_total_limit
    room = None if limit is None else max(1, limit + 1 - len(steps))
    if training.max_steps is None:
        return room or 1
    done = max(steps, default=0)
    left = -(-training.max_steps // between) - done // between
    left = left if done < training.max_steps else 0
    return left if room is None else min(left, room)


def bytes_in(folder: Path) -> int:
    """Bytes of all files in a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
