"""Sizes as polynomials in batch and length.

A polynomial is a mapping from the exponents of a monomial to its integer coefficient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from launcher.domain import Exponents, monomial

Polynomial = Mapping[Exponents, int]

CONSTANT: Exponents = (0, 0, 0)
TILES = (8, 32, 128)
"""What CUDA's attention kernels round lengths to."""


@dataclass(frozen=True)
class TracedShape:
    """The shape that a trace ran at, and which of its two variables are symbols.

    A symbol must be a prime that divides none of the model's own dimensions, or a dimension of the model is
    taken for it.
    """

    batch: int
    """Sequences."""
    length: int
    """Tokens per sequence."""
    batch_is_symbol: bool
    """False: the batch is fixed, and only the length may vary."""
    length_is_symbol: bool
    """False: the length is fixed too, and every size is a constant."""
    rounded: tuple[tuple[int, int], ...] = ()
    """Tiles, each with the prime that stands for the length rounded up to it."""
    ragged: tuple[tuple[int, int], ...] = ()
    """Tiles, each with the prime that stands for the length where it is no multiple of it, and for 0 where it is."""

    def round_up(self, size: int, tile: int) -> int:
        """A size rounded up to a tile, or its stand-in; a multiple of a symbol that has none stays as it is."""
        if self.length_is_symbol and size == self.length:
            return dict(self.rounded).get(tile, size)
        if self.varies(size):
            return size
        return -(-size // tile) * tile

    def unless_multiple(self, size: int, tile: int) -> int:
        """0 for a multiple of a tile; any other size itself, or its stand-in."""
        if self.length_is_symbol and size == self.length:
            return dict(self.ragged).get(tile, 0)
        return 0 if self.varies(size) or size % tile == 0 else size

    def varies(self, size: int) -> bool:
        """Whether a size is a multiple of a symbol."""
        return any(pair != CONSTANT for pair in factor_dimension(size, self))


def with_stand_ins(shape: TracedShape, dimensions: Iterable[int]) -> TracedShape:
    """Gives a shape whose length is a symbol the primes that stand for its rounded lengths.

    Args:
        shape: The shape.
        dimensions: The model's own dimensions, which none of the primes may divide.
    """
    known = [size for size in dimensions if size > 1]
    primes: list[int] = []
    candidate = shape.length + 2  # neither the length nor its neighbours, which are symbols too
    while len(primes) < 2 * len(TILES):
        is_prime = largest_prime_factor(candidate) == candidate
        if is_prime and candidate != shape.batch and all(size % candidate for size in known):
            primes.append(candidate)
        candidate += 1
    rounded, ragged = primes[: len(TILES)], primes[len(TILES) :]
    return replace(
        shape, rounded=tuple(zip(TILES, rounded, strict=True)), ragged=tuple(zip(TILES, ragged, strict=True))
    )


def multiply(left: Polynomial, right: Polynomial) -> dict[Exponents, int]:
    """The product of two polynomials.

    Raises:
        NotImplementedError: When two steps meet whose product is none.
    """
    product: dict[Exponents, int] = {}
    for (i, j, first), a in left.items():
        for (k, m, second), b in right.items():
            exponents = (i + k, j + m, _step_product(first, second))
            product[exponents] = product.get(exponents, 0) + a * b
    return product


def _step_product(first: int, second: int) -> int:
    if first == 0 or second == 0:
        return first + second
    if first + second == 0:
        return abs(first)  # where nothing is missing, nothing times 0 is nothing too
    if first == second < 0:
        return first
    raise NotImplementedError(
        f"a size that is a product of lengths rounded up to {abs(first)} and {abs(second)}"
    )


def monomials(exponents: Sequence[Exponents], batches: ArrayLike, lengths: ArrayLike) -> NDArray[np.float64]:
    """The monomials at many shapes.

    Args:
        exponents: Which monomials.
        batches: Sequences; shape (shapes,), or a number.
        lengths: Tokens per sequence; shape (shapes,), or a number.

    Returns:
        Shape (shapes, monomials), or (monomials,) for numbers.
    """
    powers = np.array(exponents, dtype=np.float64)
    batch, length = np.asarray(batches)[..., None], np.asarray(lengths)[..., None]
    values: NDArray[np.float64] = batch ** powers[:, 0] * length ** powers[:, 1]
    for column in np.flatnonzero(powers[:, 2]):
        step = powers[column, 2]
        missing = -length[..., 0] % abs(step)
        values[..., column] *= missing if step > 0 else np.sign(missing)
    return values


def factor_dimension(size: int, shape: TracedShape) -> dict[Exponents, int]:
    """Writes one dimension as a polynomial: `c`, `c*batch`, or `c*batch**i*(length+k)` with k in -1, 0, 1.

    Length - 1 is the number of predicted tokens of a sequence, length + 1 that of cumulative sums. The length may also
    be a rounded one.
    """
    if not shape.length_is_symbol or size <= 1:
        return {CONSTANT: size}
    for tile, prime in shape.rounded:
        if size % prime == 0:
            rest, power = _take_batch(size // prime, shape)
            return {(power, 1, 0): rest, (power, 0, tile): rest}
    for tile, prime in shape.ragged:
        if size % prime == 0:
            rest, power = _take_batch(size // prime, shape)
            return {(power, 1, -tile): rest}
    for offset in (0, -1, 1):
        base = shape.length + offset
        if base > 1 and size % base == 0:
            rest, power = _take_batch(size // base, shape)
            polynomial = {(power, 1, 0): rest}
            if offset:
                polynomial[power, 0, 0] = offset * rest
            return polynomial
    rest, power = _take_batch(size, shape)
    return {(power, 0, 0): rest}


def _take_batch(size: int, shape: TracedShape) -> tuple[int, int]:
    if shape.batch_is_symbol and size % shape.batch == 0:
        return size // shape.batch, 1
    return size, 0


def factor_shape(sizes: Sequence[int], itemsize: int, shape: TracedShape) -> dict[Exponents, int]:
    """Writes the bytes of a dense tensor as a polynomial."""
    polynomial: dict[Exponents, int] = {CONSTANT: itemsize}
    for size in sizes:
        polynomial = multiply(polynomial, factor_dimension(size, shape))
    return polynomial


def evaluate(polynomial: Polynomial, batch: int, length: int) -> int:
    """The value of a polynomial at a batch and a length."""
    return sum(coefficient * monomial(pair, batch, length) for pair, coefficient in polynomial.items())


def symbol_prime(minimum: int, dimensions: Iterable[int], taken: Iterable[int] = ()) -> int:
    """The smallest prime from `minimum` on that can stand for the length.

    Neither it nor its neighbours (length - 1 and length + 1 are factored too) may divide a dimension of the
    model or a product of such dimensions. A neighbour is not prime, so its largest prime factor decides.

    Args:
        minimum: Lower bound, at least 2.
        dimensions: The model's own dimensions.
        taken: Primes in use for another symbol.
    """
    known = [size for size in dimensions if size > 1]
    used = set(taken)
    candidate = max(2, minimum)
    while True:
        telling = [candidate, largest_prime_factor(candidate - 1), largest_prime_factor(candidate + 1)]
        free = telling[0] == largest_prime_factor(candidate) and not used.intersection(telling)
        if free and all(size % factor for size in known for factor in telling):
            return candidate
        candidate += 1


def largest_prime_factor(number: int) -> int:
    """The largest prime that divides a number; 1 for 1."""
    largest, rest, divisor = 1, number, 2
    while divisor * divisor <= rest:
        while rest % divisor == 0:
            largest, rest = divisor, rest // divisor
        divisor += 1
    return max(largest, rest)
