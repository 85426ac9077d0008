"""Has a trainer write its checkpoints and results aside, and gives them their place when they are whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from launcher.checkpoints import FULL_BYTES, PARTIAL, publish, seal
from launcher.errors import LaunchError


def save_aside(trainer: Trainer, folder: Path) -> None:
    """Replaces how a trainer saves checkpoints: first in a folder beside them, then sealed and renamed.

    All ranks write their parts; rank 0 seals and renames, and removes what is beyond `save_total_limit`.

    Args:
        trainer: Saves checkpoints of transformers 5.17 to 5.24: all of one below the folder that `_get_output_dir` names.
        folder: Where checkpoints belong.
    """
    written: Any = trainer
    save, partial = written._save_checkpoint, folder / PARTIAL
    written._get_output_dir = lambda trial: str(partial)

    def save_whole(*args: Any, **kwargs: Any) -> None:
        what = f"the checkpoint of step {trainer.state.global_step}"
        with _aside(partial, trainer.args.should_save, what, "the checkpoints before it are whole"):
            save(*args, **kwargs)
            _wait()
            if trainer.args.should_save:
                (checkpoint,) = partial.iterdir()
                seal(checkpoint)
                publish(checkpoint, folder)
                rotate_checkpoints(str(folder), trainer.args.save_total_limit)

    written._save_checkpoint = save_whole


def place_whole(place: Path, write: Callable[[Path], None], partial: Path, *, is_main: bool) -> None:
    """Has a folder of results written aside, on all ranks, sealed and given its place, at once or not at all.

    Args:
        place: Where it belongs; one that is there gives way.
        write: Writes it into the folder that it is called with.
        partial: Folder in which things are written; on the file system of the place.
        is_main: Whether this rank seals and renames.

    Raises:
        LaunchError: When the disk is full.
    """
    with _aside(partial, is_main, f"`{place}`", "then resume the run"):
        write(partial / place.name)
        _wait()
        if is_main:
            seal(partial / place.name)
            publish(partial / place.name, place.parent)


@contextmanager
def _aside(partial: Path, is_main: bool, what: str, hint: str) -> Iterator[None]:
    """The folder in which something is written, empty at first and gone afterwards; a full disk is told."""
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _wait()
    try:
        yield
    except Exception as failure:  # safetensors, torch and Python each have words of their own for a full disk
        free_bytes = shutil.disk_usage(partial.parent).free
        shutil.rmtree(partial, ignore_errors=True)  # leaves room to say so
        if free_bytes > FULL_BYTES:
            raise
        raise LaunchError(
            f"{what} can't be written: the file system of `{partial.parent}` is full ({failure})",
            f"make room there; {hint}",
        ) from failure
    if is_main:
        partial.rmdir()
    _wait()


def _wait() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
