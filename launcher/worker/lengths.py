"""Counts the tokens of a job's examples: the training's own reading, rendering and tokenizing, and nothing else.

A process of its own, `python -m launcher.worker.lengths <order> <answer>`, because it imports the libraries. Its exit
code is the launcher's.
"""

# mypy: disable-error-code="import-untyped"
# datasets has no type information

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import datasets
from datasets import Dataset
from jinja2 import TemplateError

from launcher import workload
from launcher.data_lengths import DataLengths, LengthOrder
from launcher.documents import read_document, write_document
from launcher.errors import LauncherError
from launcher.run_record import WORKER_MARK
from launcher.worker.laid_out import blamed_template
from launcher.worker.longest import num_characters
from launcher.worker.tasks import examples_of, tokenizer_of

SAMPLE = 10_000
"""Examples that are counted at most: a random sample of these gives shares to within one percent."""
PROBES = 200
"""Examples with the most characters that are counted besides, so that the longest one is most likely among them."""
SEED = 20_261


def count(order: LengthOrder, folder: Path) -> DataLengths:
    """Counts the tokens of the training examples.

    Args:
        order: The job, and where its tokenizer is.
        folder: Scratch space.

    Raises:
        DataError: When examples or tokenizer can't be read.
    """
    job = order.job
    tokenizer = tokenizer_of(job, order.weights, order.converted)
    rows, _ = examples_of(job, tokenizer)
    sampled = _sample(len(rows))
    try:
        lengths, first = _counted(workload.prepared_rows(rows.select(sampled), job, tokenizer, folder))
        longest = max(lengths)
        if len(sampled) < len(rows):
            probes = rows.select(_longest_texts(rows))
            longest = max(longest, *_counted(workload.prepared_rows(probes, job, tokenizer, folder))[0])
    except TemplateError as failure:
        raise blamed_template(tokenizer, job, failure) from failure
    return DataLengths(job.data.path, len(rows), tuple(lengths), tuple(first), longest)


def _sample(num_rows: int) -> Sequence[int]:
    if num_rows <= SAMPLE:
        return range(num_rows)
    return sorted(random.Random(SEED).sample(range(num_rows), SAMPLE))


def _longest_texts(rows: Dataset) -> list[int]:
    """The rows with the most characters."""
    sizes = [num_characters(row) for row in rows]
    return sorted(sorted(range(len(sizes)), key=lambda index: -sizes[index])[:PROBES])


def _counted(prepared: Dataset) -> tuple[list[int], list[int]]:
    """Tokens of each row, and of each the tokens before the first one that is learnt."""
    lengths = [len(ids) for ids in prepared["input_ids"]]
    if "labels" not in prepared.column_names:
        return lengths, [0] * len(lengths)
    first = [
        next((index for index, label in enumerate(labels) if label != workload.NOT_LEARNT), len(labels))
        for labels in prepared["labels"]
    ]
    return lengths, first


def main(argv: Sequence[str]) -> int:
    """Entry point: `python -m launcher.worker.lengths <order> <answer>`."""
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as folder:
            answer = count(read_document(Path(argv[1]), LengthOrder), Path(folder))
    except LauncherError as failure:
        for line in str(failure).splitlines():
            sys.stderr.write(f"{WORKER_MARK}{line}\n")
        return failure.exit_code
    write_document(Path(argv[2]), answer)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
