"""Models that see: where their vision tower is, how it stays frozen, and which inputs a batch with images has.

Every example has as many images as `data.images_per_example` says, and the processor makes each of them equally many
pixels and tokens; both are facts of the model's config. Families that cut an image into as many patches as it happens
to have (Qwen-VL, Pixtral, Idefics3 with splitting) have no such number, and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from launcher.errors import UnsupportedByPlanner
from launcher.job import Task

COLORS = 3


@dataclass(frozen=True)
class ImageShape:
    """What one image becomes."""

    pixels: int
    """Height, and width."""
    tokens: int
    """Places that it takes in the sequence."""
    has_token_types: bool
    """Whether the processor also marks which tokens are an image's."""


def _of_gemma3(config: Any) -> ImageShape:
    """Pan and scan is off, as it is in the published processors (processing_gemma3.py, transformers 5.24)."""
    return ImageShape(config.vision_config.image_size, config.mm_tokens_per_image, True)


def _of_llava(config: Any) -> ImageShape:
    """One token a patch; the class token is dropped unless `full` keeps it (modeling_llava.py, transformers 5.24)."""
    vision = config.vision_config
    kept = 1 if config.vision_feature_select_strategy == "full" else 0
    return ImageShape(vision.image_size, (vision.image_size // vision.patch_size) ** 2 + kept, False)


FAMILIES: Mapping[str, Callable[[Any], ImageShape]] = {"gemma3": _of_gemma3, "llava": _of_llava}
"""Families of which an image always becomes the same, by model type."""


def image_shape(config: PretrainedConfig) -> ImageShape:
    """What one image becomes for a model.

    Raises:
        UnsupportedByPlanner: When the family has no fixed shape.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedByPlanner(
            f"model.task={Task.IMAGE_TEXT_TO_TEXT}: the images of {config.model_type} have no fixed number of pixels "
            f"and tokens that the planner knows",
            f"take a model of {', '.join(FAMILIES)}, or train on text alone with model.task={Task.CAUSAL_LM}",
        )
    return family(config)


def tower_names(model: Any) -> tuple[str, ...]:
    """Paths of the modules that only images go through; none in a model without vision.

    These are the parts of the model's body that do not hold its decoder: tower, projector, learned separators.

    Raises:
        UnsupportedByPlanner: When the decoder is no direct part of the body, so that what is beside it is unknown.
    """
    if getattr(model.config, "vision_config", None) is None:
        return ()
    decoder = model.get_decoder()
    body_name = model.base_model_prefix
    body = getattr(model, body_name, None)
    if body is None or not any(child is decoder for child in body.children()):
        raise UnsupportedByPlanner(
            f"model.freeze_vision=true: {model.config.model_type} keeps its vision tower where nobody looks for it",
            "model.freeze_vision=false trains it along",
        )
    return tuple(f"{body_name}.{name}" for name, child in body.named_children() if child is not decoder)


def freeze_tower(model: nn.Module) -> None:
    """Takes the vision tower out of the training."""
    for name in tower_names(model):
        model.get_submodule(name).requires_grad_(False)


def tower_pattern(model: nn.Module) -> str | None:
    """A regular expression for the paths of all modules of the vision tower; None where there is none."""
    names = tower_names(model)
    return rf"({'|'.join(map(re.escape, names))})(\..*)?" if names else None


@dataclass(frozen=True)
class BlankImages:
    """Collates rows of token ids with blank images, into what TRL's vision collator gets from the processor."""

    shape: ImageShape
    """What one image becomes."""
    images_per_example: int
    """Images of each row."""

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Inputs of a batch; token ids of shape (batch, length), pixels of (images, colors, height, width)."""
        ids = torch.tensor([example["input_ids"] for example in examples])
        side = self.shape.pixels
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": ids.clone(),
            "pixel_values": torch.zeros((len(examples) * self.images_per_example, COLORS, side, side)),
        }
        if self.shape.has_token_types:
            batch["token_type_ids"] = torch.zeros_like(ids)
        return batch


def require_shape(batch: Mapping[str, torch.Tensor], shape: ImageShape, images_per_example: int) -> None:
    """Checks that a processor makes of images what was planned for.

    Raises:
        UnsupportedByPlanner: When it makes something else.
    """
    num_images = len(batch["input_ids"]) * images_per_example
    wanted = {"pixel_values": (num_images, COLORS, shape.pixels, shape.pixels)}
    found = {
        name: tuple(value.shape)
        for name, value in batch.items()
        if name not in ("input_ids", "attention_mask", "labels", "token_type_ids")
    }
    if found != wanted:
        raise UnsupportedByPlanner(
            f"the processor makes {found} of a batch with {num_images} images; the plan is for {wanted}",
            "the processor's settings must be those of the model's config: `size` its image_size, no pan and scan",
        )
