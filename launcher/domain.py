"""The shapes for which what was learned from a trace holds, and the monomials in which it is written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Domain:
    """The shapes for which a trace holds: batch and length within inclusive bounds, tokens on one side of a line."""

    batch_min: int
    """Fewest sequences."""
    batch_max: int | None
    """Most sequences; None: no bound."""
    length_min: int
    """Fewest tokens per sequence."""
    length_max: int | None
    """Most tokens per sequence; None: no bound."""
    tokens_min: int
    """Fewest tokens that the loss sees, batch x (length - `unseen`)."""
    tokens_max: int | None
    """Most such tokens; None: no bound."""
    unseen: int = 1
    """Tokens of a sequence that the loss doesn't see: the last one predicts nothing, and Liger sees it all the same."""

    def contains(self, batch: int, length: int) -> bool:
        """Whether a shape lies in the domain."""
        tokens = batch * (length - self.unseen)
        return (
            self.batch_min <= batch <= (self.batch_max or batch)
            and self.length_min <= length <= (self.length_max or length)
            and self.tokens_min <= tokens <= (self.tokens_max or tokens)
        )

    def last_length(self, batch: int, longest: int) -> int:
        """The greatest length up to `longest` that the regime holds for a batch; the shape before it must lie within."""
        last = longest if self.length_max is None else min(longest, self.length_max)
        return last if self.tokens_max is None else min(last, self.tokens_max // batch + self.unseen)


Exponents = tuple[int, int, int]
"""Of a monomial `batch**i * length**j * s(length)`: `i`, `j`, and the step `s`, which is 1 for 0. Kernels that round
lengths up to a tile need the two others: for a tile `t`, what is missing to its next multiple, `-length % t`; for `-t`,
1 where anything is missing, else 0."""


def monomial(exponents: Exponents, batch: int, length: int) -> int:
    """The value of a monomial at a batch and a length."""
    i, j, step = exponents
    missing = -length % abs(step) if step else 1
    value: int = batch**i * length**j * (min(missing, 1) if step < 0 else missing)
    return value
