"""Sizes as polynomials in batch and length.

A polynomial is a mapping from exponents `(i, j)` to the integer coefficient of `batch**i * length**j`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Exponents = tuple[int, int]
Polynomial = Mapping[Exponents, int]

CONSTANT: Exponents = (0, 0)


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


def multiply(left: Polynomial, right: Polynomial) -> dict[Exponents, int]:
    """The product of two polynomials."""
    product: dict[Exponents, int] = {}
    for (i, j), a in left.items():
        for (k, m), b in right.items():
            product[i + k, j + m] = product.get((i + k, j + m), 0) + a * b
    return product


def factor_dimension(size: int, shape: TracedShape) -> dict[Exponents, int]:
    """Writes one dimension as a polynomial: `c`, `c*batch`, or `c*batch**i*(length+k)` with k in -1, 0, 1.

    Length - 1 is the number of predicted tokens of a sequence, length + 1 that of cumulative sums.
    """
    if not shape.length_is_symbol or size <= 1:
        return {CONSTANT: size}
    for offset in (0, -1, 1):
        base = shape.length + offset
        if base > 1 and size % base == 0:
            rest, power = _take_batch(size // base, shape)
            polynomial = {(power, 1): rest}
            if offset:
                polynomial[power, 0] = offset * rest
            return polynomial
    rest, power = _take_batch(size, shape)
    return {(power, 0): rest}


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
    return sum(c * batch**i * length**j for (i, j), c in polynomial.items())


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
