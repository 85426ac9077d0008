"""Examples of the tasks that are no plain language modelling: which layout they have, and whether they fit the model."""

# mypy: disable-error-code="import-untyped"
# datasets has no type information

from __future__ import annotations

from dataclasses import replace

from datasets import Dataset

from launcher.errors import DataError
from launcher.job import DataFormat, DataSpec, ModelSpec, Task


def data_of_task(data: DataSpec, model: ModelSpec) -> DataSpec:
    """The data of a job, with the layout that its task asks for."""
    if model.task is Task.SEQUENCE_CLASSIFICATION:
        return replace(data, format=DataFormat.LABELED)
    return data


def require_labels(model: ModelSpec, *examples: Dataset | None) -> None:
    """Raises DataError when an example has a label that the model does not have."""
    for rows in examples:
        if model.task is not Task.SEQUENCE_CLASSIFICATION or rows is None:
            continue
        highest = max(rows["label"])
        if highest >= model.num_labels:
            raise DataError(
                f"the examples have label {highest}; model.num_labels={model.num_labels} has 0 to "
                f"{model.num_labels - 1}",
                f"model.num_labels={highest + 1}",
            )
