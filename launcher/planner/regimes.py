"""Regimes: within one, the step is one polynomial in batch and length; across its lines it is another.

Lines come from these places: a batch of one takes other code paths (no-op `contiguous`), TRL's chunked loss works
on tiles of a fixed number of tokens, Liger's on tiles that double with the tokens, and sliding-window attention needs
a mask from the window's length on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from launcher.domain import Domain
from launcher.planner.polynomial import TracedShape, symbol_prime, with_stand_ins

FIRST_LENGTH = 211
"""Shortest length traced for a symbol, where the regime allows: long enough to divide no small dimension."""
BATCH_PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71)
SINGLE_TOKENS = 2503
"""Length traced when the batch is one."""


@dataclass(frozen=True)
class Lines:
    """Where the regimes of a job meet."""

    token_tile: int | None
    """Predicted tokens that the loss handles at a time; None when it handles all at once."""
    lengths: tuple[int, ...]
    """Lengths at which other code begins to run, ascending."""
    dimensions: tuple[int, ...]
    """The model's own dimensions, which no symbol may divide."""
    doubling_tokens: int | None = None
    """Liger's loss: tokens per token of a tile, before that is rounded up to a power of two; None without such tiles."""
    has_symbols: bool = True
    """Whether traces with symbols answer: the rows that an evaluation keeps are no polynomial of the batch."""
    shortest: int = 2
    """Tokens that a sequence has at least: its images, and one more."""


def domain_of(batch: int, length: int, lines: Lines) -> Domain:
    """The regime that holds a shape; narrowed to this batch where no prime fits that could stand for a batch."""
    below = [line for line in lines.lengths if line <= length]
    above = [line for line in lines.lengths if line > length]
    tile = lines.token_tile
    over = tile is not None and batch * (length - 1) > tile
    regime = Domain(
        batch_min=1 if batch == 1 else 2,
        batch_max=1 if batch == 1 else None,
        length_min=max(lines.shortest, *below[-1:]) if below else lines.shortest,
        length_max=above[0] - 1 if above else None,
        tokens_min=tile + 1 if tile is not None and over else 1,
        tokens_max=tile if not over else None,
    )
    if lines.doubling_tokens is not None:
        step, tile = lines.doubling_tokens, doubled_tile(batch * length, lines.doubling_tokens)
        regime = replace(regime, tokens_min=tile // 2 * step + 1, tokens_max=tile * step, unseen=0)
    if batch == 1 or symbolic_shape(regime, lines) is not None:
        return regime
    return replace(regime, batch_min=batch, batch_max=batch)


def doubled_tile(tokens: int, step: int) -> int:
    """Tokens that Liger's loss handles at a time: a `step`th of all, rounded up to a power of two."""
    return int(2 ** (-(-tokens // step) - 1).bit_length())


def symbolic_shape(domain: Domain, lines: Lines) -> TracedShape | None:
    """A shape inside the regime whose batch and length can serve as symbols; None when there is none.

    The batch of a regime of one batch is a constant.
    """
    if not lines.has_symbols:
        return None
    if domain.batch_max == domain.batch_min:
        length = _symbolic_length(domain, lines, domain.batch_min)
        fixed = TracedShape(domain.batch_min, length or 0, batch_is_symbol=False, length_is_symbol=True)
        return with_stand_ins(fixed, lines.dimensions) if length else None
    for batch in BATCH_PRIMES:
        if all(size % batch for size in lines.dimensions if size > 1):
            length = _symbolic_length(domain, lines, batch)
            if length:
                both = TracedShape(batch, length, batch_is_symbol=True, length_is_symbol=True)
                return with_stand_ins(both, lines.dimensions)
    return None


def _symbolic_length(domain: Domain, lines: Lines, batch: int) -> int | None:
    lowest = max(domain.length_min, -(-domain.tokens_min // batch) + 1)
    preferred = SINGLE_TOKENS if batch == 1 else FIRST_LENGTH
    for minimum in (max(lowest, preferred), max(lowest, FIRST_LENGTH), max(lowest, 31)):
        length = symbol_prime(minimum, (*lines.dimensions, batch), taken=(batch,))
        while domain.contains(batch, length):
            if not _rest_looks_symbolic(batch, length, lines):
                return length
            length = symbol_prime(length + 1, (*lines.dimensions, batch), taken=(batch,))
    return None


def _rest_looks_symbolic(batch: int, length: int, lines: Lines) -> bool:
    """Whether the last, smaller tile of Liger's loss has a size that would be taken for a multiple of a symbol."""
    if lines.doubling_tokens is None:
        return False
    rest = batch * length % doubled_tile(batch * length, lines.doubling_tokens)
    return rest > 0 and any(
        rest % symbol == 0 for symbol in (length - 1, length, length + 1, batch) if symbol > 1
    )


def config_dimensions(config: Mapping[str, Any]) -> Iterator[int]:
    """All integers of a model config, nested ones included."""
    for value in config.values():
        if isinstance(value, bool):
            continue
        if isinstance(value, int):
            yield abs(value)
        elif isinstance(value, Mapping):
            yield from config_dimensions(value)
