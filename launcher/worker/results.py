"""What a training leaves: the trained weights or adapter, and a merged model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedTokenizerBase, ProcessorMixin, Trainer

from launcher.memory import Phase
from launcher.merge import drop_optimizer, merge_adapters

TENSOR_FILES = (".safetensors", ".pt", ".pth", ".bin")
"""Endings of files that hold tensors."""


def save_results(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    model: Path | None,
    merged: Path | None,
    enter: Callable[[Phase], None],
) -> None:
    """Saves what was trained, and merges adapters if there is a place for the merged model.

    Args:
        trainer: A trainer that has trained; after a merge it has neither adapters nor optimizer states.
        tokenizer: Saved beside each model.
        model: Where the trained weights or adapter go; None: nowhere.
        merged: Where the merged model goes; None: nothing is merged.
        enter: Called with the phase that begins.
    """
    if model is not None:
        enter(Phase.SAVE)
        trainer.save_model(str(model))  # on all ranks: sharded weights are gathered
        if trainer.args.should_save:
            tokenizer.save_pretrained(str(model))
    if merged is not None and isinstance(trainer.model, PeftModel):
        drop_optimizer(trainer)
        enter(Phase.MERGE)
        merge_adapters(trainer.model).save_pretrained(str(merged))
        tokenizer.save_pretrained(str(merged))


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
