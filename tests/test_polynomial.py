"""Sizes as polynomials: what is factored must evaluate to what was there, at any shape."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from launcher.domain import Exponents
from launcher.planner.polynomial import (
    CONSTANT,
    TILES,
    TracedShape,
    evaluate,
    factor_dimension,
    factor_shape,
    largest_prime_factor,
    monomials,
    multiply,
    symbol_prime,
    with_stand_ins,
)

BATCH, LENGTH = 13, 227
SHAPE = TracedShape(BATCH, LENGTH, batch_is_symbol=True, length_is_symbol=True)
ONE_BATCH = TracedShape(1, 2503, batch_is_symbol=False, length_is_symbol=True)
FIXED = TracedShape(BATCH, LENGTH, batch_is_symbol=False, length_is_symbol=False)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (4096, {(0, 0, 0): 4096}),
        (BATCH, {(1, 0, 0): 1}),
        (8 * BATCH, {(1, 0, 0): 8}),
        (LENGTH, {(0, 1, 0): 1}),
        (3 * LENGTH, {(0, 1, 0): 3}),
        (BATCH * LENGTH, {(1, 1, 0): 1}),
        (LENGTH - 1, {(0, 1, 0): 1, (0, 0, 0): -1}),
        (BATCH * (LENGTH - 1), {(1, 1, 0): 1, (1, 0, 0): -1}),
        (LENGTH + 1, {(0, 1, 0): 1, (0, 0, 0): 1}),
        (1, {(0, 0, 0): 1}),
        (0, {(0, 0, 0): 0}),
    ],
)
def test_a_dimension_is_factored_as_by_hand(size: int, expected: dict[Exponents, int]) -> None:
    assert factor_dimension(size, SHAPE) == expected


def test_without_symbols_everything_is_a_constant() -> None:
    assert factor_shape((BATCH, LENGTH, 64), 2, FIXED) == {CONSTANT: BATCH * LENGTH * 64 * 2}


def test_a_batch_of_one_is_a_constant_and_its_length_a_symbol() -> None:
    assert factor_shape((1, 2503, 64), 2, ONE_BATCH) == {(0, 1, 0): 128}


def test_a_fixed_batch_is_a_constant_factor_of_the_length() -> None:
    shape = TracedShape(4, 1031, batch_is_symbol=False, length_is_symbol=True)
    assert factor_shape((4, 1031, 64), 2, shape) == {(0, 1, 0): 4 * 64 * 2}


def test_attention_scores_hold_the_length_twice() -> None:
    assert factor_shape((BATCH, 8, LENGTH, LENGTH), 2, SHAPE) == {(1, 2, 0): 16}


def test_shapes_and_not_byte_counts_are_factored() -> None:
    # 14336 = 2**11 * 7: a batch of 7 divides it, and as one number of bytes it would be taken for the batch.
    sevens = TracedShape(7, LENGTH, batch_is_symbol=True, length_is_symbol=True)
    assert factor_shape((LENGTH, 4096), 2, sevens) == {(0, 1, 0): 8192}
    assert symbol_prime(7, [14336], ()) != 7


def test_random_shapes_evaluate_to_their_size_at_the_traced_and_at_any_other_shape() -> None:
    rng = random.Random(0)
    for _ in range(500):
        constant = rng.choice((1, 2, 3, 64, 320, 864, 4096, 34000))
        batches, lengths, offset = rng.randint(0, 1), rng.randint(0, 2), rng.choice((0, -1, 1))

        def sizes(
            b: int,
            n: int,
            constant: int = constant,
            batches: int = batches,
            lengths: int = lengths,
            offset: int = offset,
        ) -> list[int]:
            return [constant, *[b] * batches, *[n + offset] * lengths]

        itemsize = rng.choice((1, 2, 4, 8))
        polynomial = factor_shape(sizes(BATCH, LENGTH), itemsize, SHAPE)
        for b, n in ((BATCH, LENGTH), (rng.randint(2, 64), rng.randint(16, 16384))):
            assert evaluate(polynomial, b, n) == math.prod(sizes(b, n)) * itemsize


def test_products_are_those_of_the_values() -> None:
    rng = random.Random(1)
    for _ in range(100):
        left, right = (
            {(rng.randint(0, 2), rng.randint(0, 2), step): rng.randint(-9, 9) for step in steps}
            for steps in ((0, -8, 0), (0, 8, -8))
        )
        b, n = rng.randint(1, 9), rng.randint(1, 99)
        assert evaluate(multiply(left, right), b, n) == evaluate(left, b, n) * evaluate(right, b, n)


def test_two_lengths_that_are_rounded_up_make_no_polynomial() -> None:
    for first, second in ((32, 32), (8, 32), (-8, 32)):
        with pytest.raises(NotImplementedError, match="rounded up to"):
            multiply({(0, 0, first): 1}, {(0, 0, second): 1})


def test_rounded_lengths_are_those_of_any_shape() -> None:
    shape = with_stand_ins(SHAPE, (4096, 64))
    rng = random.Random(3)
    for tile in TILES:
        rounded = factor_shape((BATCH, 4, shape.round_up(LENGTH, tile)), 4, shape)
        column = factor_shape((shape.unless_multiple(LENGTH, tile), shape.round_up(LENGTH, tile)), 2, shape)
        for length in (tile - 1, tile, tile + 1, 5 * tile, *(rng.randint(2, 9999) for _ in range(20))):
            up = math.ceil(length / tile) * tile
            assert evaluate(rounded, 3, length) == 3 * 4 * up * 4
            assert evaluate(column, 3, length) == (length * up * 2 if length % tile else 0)
            for sizes in (rounded, column):
                powers = monomials(tuple(sizes), np.array([3]), np.array([length]))
                assert powers @ list(sizes.values()) == [evaluate(sizes, 3, length)]


def test_only_the_length_has_stand_ins_and_what_does_not_vary_is_rounded() -> None:
    shape = with_stand_ins(SHAPE, (4096, 64))
    assert (shape.round_up(100, 32), shape.unless_multiple(100, 32)) == (128, 100)
    assert (shape.round_up(96, 32), shape.unless_multiple(96, 32)) == (96, 0)
    assert shape.round_up(BATCH * LENGTH, 32) == BATCH * LENGTH  # no stand-in is known for it
    assert (FIXED.round_up(LENGTH, 128), FIXED.unless_multiple(LENGTH, 128)) == (256, LENGTH)


@pytest.mark.parametrize(("number", "prime"), [(1, 1), (2, 2), (96, 3), (97, 97), (226, 113), (14336, 7)])
def test_largest_prime_factor(number: int, prime: int) -> None:
    assert largest_prime_factor(number) == prime


def test_a_symbol_and_its_neighbours_divide_no_dimension() -> None:
    rng = random.Random(2)
    for _ in range(50):
        dimensions = [rng.randint(2, 40000) for _ in range(6)]
        prime = symbol_prime(211, dimensions, taken=(5,))
        assert prime >= 211
        assert all(prime % divisor for divisor in range(2, prime))
        for size in dimensions:
            shape = TracedShape(5, prime, batch_is_symbol=False, length_is_symbol=True)
            assert factor_dimension(size, shape) == {CONSTANT: size}


def test_a_prime_whose_neighbour_is_made_of_the_models_primes_is_passed_over() -> None:
    # 211 is prime; 210 = 2 * 3 * 5 * 7, and a model with a factor 7 may have a dimension 210.
    assert symbol_prime(211, [14336]) != 211
    assert symbol_prime(211, [4096]) == 211
