"""Has a trainer write its checkpoints aside, and give them their place when they are whole."""

from __future__ import annotations

import shutil
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
        if trainer.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        _wait()
        save(*args, **kwargs)
        _wait()
        if trainer.args.should_save:
            (checkpoint,) = partial.iterdir()
            seal(checkpoint)
            publish(checkpoint, folder)
            partial.rmdir()
            rotate_checkpoints(str(folder), trainer.args.save_total_limit)
        _wait()

    def save_or_say_why(*args: Any, **kwargs: Any) -> None:
        try:
            save_whole(*args, **kwargs)
        except (
            Exception
        ) as failure:  # safetensors, torch and Python each have words of their own for a full disk
            free_bytes = shutil.disk_usage(folder).free
            shutil.rmtree(partial, ignore_errors=True)  # leaves room to say so
            if free_bytes > FULL_BYTES:
                raise
            raise LaunchError(
                f"the checkpoint of step {trainer.state.global_step} can't be written: the file system of `{folder}` is "
                f"full ({failure})",
                "make room there; the checkpoints before it are whole",
            ) from failure

    written._save_checkpoint = save_or_say_why


def _wait() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
