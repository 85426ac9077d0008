"""Whether weights were loaded whole: transformers fills what a file lacks with random numbers, and only logs that."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from launcher.errors import DataError
from launcher.job import Task


def require_loaded(model: Any, report: Mapping[str, Collection[Any]], source: str, task: Task) -> None:
    """Makes sure that every weight of a model came from its files, with its shape.

    Args:
        model: A model of transformers that was loaded.
        report: What `from_pretrained(output_loading_info=True)` gave beside it (transformers 5.24).
        source: Folder or hub id.
        task: A classifier's new head is in no file.

    Raises:
        DataError: Naming a weight that is missing or has another shape.
    """
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, stored, wanted = mismatched[0]
        raise DataError(
            f"{len(mismatched)} weights at `{source}` have another shape than config.json says, such as `{name}`: "
            f"{tuple(stored)} in the file, {tuple(wanted)} in the model",
            "correct config.json, or fetch the model again",
        )
    missing = sorted(report["missing_keys"])
    if task is Task.SEQUENCE_CLASSIFICATION:
        missing = [name for name in missing if name.startswith(f"{model.base_model_prefix}.")]
    if missing:
        raise DataError(
            f"the files at `{source}` lack {len(missing)} weights of the model, such as `{missing[0]}`",
            "fetch the model again, or correct its config.json where it tells of more than there is",
        )
