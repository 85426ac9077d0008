"""Lengths of a job's examples in tokens: what a length keeps of them, and what padding to it wastes.

All from the lengths that the trainer's own preparation gives the examples before it cuts them; nothing is simulated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from launcher.job import JobSpec

PERCENTILES = (0.5, 0.95, 0.99)
"""Shares of the examples whose longest length is told."""


@dataclass(frozen=True)
class LengthOrder:
    """What the process that reads the data is asked."""

    job: JobSpec
    """The job; its `data.max_length` plays no part."""
    weights: str
    """Folder or hub id of the tokenizer; for a packaged model the folder of its GGUF file."""
    converted: str
    """Where a packaged model is converted to; empty for any other."""


@dataclass(frozen=True)
class DataLengths:
    """Lengths of training examples in tokens, uncut, as the trainer gets them: rendered, with the end of text.

    Raises:
        ValueError: When there is no example, or figures contradict each other.
    """

    source: str
    """Where the examples are."""
    num_examples: int
    """Training examples."""
    lengths: tuple[int, ...]
    """Of the examples that were counted, in their order: all of them, or a random sample."""
    first_trained: tuple[int, ...]
    """Of each of these, the tokens before the first one that is learnt: those of a prompt that only asks."""
    longest: int
    """Of all examples that were counted, those counted for being the longest in characters among them."""

    def __post_init__(self) -> None:
        if not self.lengths or len(self.lengths) != len(self.first_trained):
            raise ValueError(f"{len(self.lengths)} lengths, {len(self.first_trained)} first trained tokens")
        if self.longest < max(self.lengths) or self.num_examples < len(self.lengths):
            raise ValueError(f"longest {self.longest}, {self.num_examples} examples: fewer than were counted")

    @property
    def is_whole(self) -> bool:
        """Whether every example was counted."""
        return len(self.lengths) == self.num_examples

    @property
    def num_tokens(self) -> int:
        """Tokens of the examples that were counted."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Kept:
    """What a length leaves of the examples when the longer ones are cut."""

    tokens_share: float
    """Tokens that are trained on, of all; those of examples that are left out are not."""
    cut_share: float
    """Examples that are longer, of all."""
    dropped_share: float
    """Examples of which nothing is left to learn, of all: the trainer leaves them out."""
    rows: tuple[int, ...]
    """Lengths of the examples that remain."""


def percentile(lengths: Sequence[int], share: float) -> int:
    """The smallest length that this share of the examples does not exceed (nearest rank)."""
    return sorted(lengths)[max(0, math.ceil(share * len(lengths)) - 1)]


def histogram(lengths: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Examples by length: from, to (both included), and how many; each range ends at a power of two."""
    ends = [1 << exponent for exponent in range(max(lengths).bit_length() + 1)]
    first = next(index for index, end in enumerate(ends) if end >= min(lengths))
    last = next(index for index, end in enumerate(ends) if end >= max(lengths))
    edges = [0 if first == 0 else ends[first - 1], *ends[first : last + 1]]
    return tuple(
        (low + 1, high, sum(low < length <= high for length in lengths)) for low, high in pairwise(edges)
    )


def kept_at(data: DataLengths, length: int) -> Kept:
    """What remains when examples are cut to a length.

    TRL 1.16 leaves an example out when nothing that is learnt remains of it (sft_trainer.py, `_prepare_dataset`).
    """
    rows = [
        min(full, length)
        for full, first in zip(data.lengths, data.first_trained, strict=True)
        if first < length
    ]
    count = len(data.lengths)
    return Kept(
        tokens_share=sum(rows) / data.num_tokens,
        cut_share=sum(full > length for full in data.lengths) / count,
        dropped_share=1 - len(rows) / count,
        rows=tuple(rows),
    )


def expected_longest(rows: Sequence[int], batch: int) -> float:
    """The expected length of a padded batch: of the longest of so many examples, drawn without replacement.

    Of n sorted lengths the i-th is the longest of a batch in C(i - 1, batch - 1) of C(n, batch) draws. A batch larger
    than the data is all of it.
    """
    count, size = len(rows), min(batch, len(rows))
    expected, share = 0.0, size / count  # share: C(i - 1, size - 1) / C(n, size), from the longest down
    for rank, length in zip(range(count, size - 1, -1), sorted(rows, reverse=True), strict=False):
        expected += length * share
        share *= (rank - size) / max(1, rank - 1)
    return expected


def padding_share(rows: Sequence[int], batch: int) -> float:
    """The share of a padded batch that is padding, as expected."""
    return 1 - sum(rows) / len(rows) / expected_longest(rows, batch)


def split_share(data: DataLengths, length: int) -> float:
    """The share of the examples that packing into rows of a length cuts: a row ends inside of them."""
    end, split = 0, 0
    for full in data.lengths:
        begin, end = end, end + full
        split += begin // length < (end - 1) // length
    return split / len(data.lengths)
