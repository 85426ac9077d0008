"""What a training leaves: the trained weights or adapter, and a merged model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedTokenizerBase, ProcessorMixin, Trainer

from launcher.checkpoints import PARTIAL
from launcher.memory import Phase
from launcher.merge import drop_optimizer, merge_adapters
from launcher.worker.checkpoints import place_whole

TENSOR_FILES = (".safetensors", ".pt", ".pth", ".bin")
"""Endings of files that hold tensors."""


def save_results(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    model: Path | None,
    merged: Path | None,
    checkpoints: Path,
    enter: Callable[[Phase], None],
) -> None:
    """Saves what was trained, and merges adapters if there is a place for the merged model.

    Each folder is written aside, and has its place when it is whole.

    Args:
        trainer: A trainer that has trained; after a merge it has neither adapters nor optimizer states.
        tokenizer: Saved beside each model.
        model: Where the trained weights or adapter go; None: nowhere.
        merged: Where the merged model goes; None: nothing is merged.
        checkpoints: Where checkpoints go; results are written beside them, and a start removes what a kill leaves there.
        enter: Called with the phase that begins.

    Raises:
        LaunchError: When the disk is full.
    """
    is_main, partial = trainer.args.should_save, checkpoints / PARTIAL

    def write_model(folder: Path) -> None:
        trainer.save_model(str(folder))  # on all ranks: sharded weights are gathered
        if is_main:
            tokenizer.save_pretrained(str(folder))

    def write_merged(folder: Path) -> None:
        merge_adapters(trainer.model).save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))

    if model is not None:
        enter(Phase.SAVE)
        place_whole(model, write_model, partial, is_main=is_main)
    if merged is not None and isinstance(trainer.model, PeftModel):
        drop_optimizer(trainer)
        enter(Phase.MERGE)
        place_whole(merged, write_merged, partial, is_main=is_main)


def saved_bytes(checkpoints: Path, model: Path | None, merged: Path | None) -> dict[str, int]:
    """Size of the files that safetensors and torch wrote, of each folder that there is; text comes on top.

    Args:
        checkpoints: Holds checkpoints; the newest counts.
        model: The trained weights or adapter.
        merged: The merged model.
    """
    found = [
        item for item in checkpoints.glob("checkpoint-*") if item.name.removeprefix("checkpoint-").isdigit()
    ]
    newest = max(found, key=lambda item: int(item.name.removeprefix("checkpoint-")), default=None)
    return {
        name: sum(file.stat().st_size for file in folder.iterdir() if file.suffix in TENSOR_FILES)
        for name, folder in (("checkpoint", newest), ("model", model), ("merged", merged))
        if folder is not None and folder.exists()
    }
