"""The meter's account, fed by hand: what is held, what it was for, and when it was most."""

from __future__ import annotations

from launcher.memory import Category, Phase, Region
from launcher.worker.account import Account


def test_what_survives_its_region_is_an_activation_and_marks_count_for_all_time() -> None:
    account = Account(Phase.TRAIN_STEP)
    account.take(1, 100)  # a weight, marked later
    account.enter_region(Region.BACKBONE)
    account.take(2, 10)
    account.take(3, 7)
    account.give_back(3, 7)
    account.enter_region(Region.HEAD)
    account.take(4, 50)
    account.enter_region(Region.BACKWARD)
    account.give_back(4, 50)
    account.take(5, 20)  # becomes a gradient
    account.enter_region(Region.RECOMPUTE)
    account.take(6, 40)
    account.enter_region(Region.BACKWARD)
    account.give_back(6, 40)
    account.mark([1], Category.PARAMETERS)
    account.mark([5], Category.GRADIENTS)
    account.mark([5], Category.INPUTS)  # the first word counts
    account.enter_phase(Phase.OPTIMIZER_STEP)
    account.give_back(2, 10)
    account.take(7, 1)
    peaks = account.peaks()
    assert peaks[Phase.TRAIN_STEP].allocated_bytes == 170
    assert peaks[Phase.TRAIN_STEP].by_category_bytes == {
        Category.PARAMETERS: 100,
        Category.ACTIVATIONS: 10 + 40,
        Category.GRADIENTS: 20,
    }
    assert account.totals[-1] == 121
    assert peaks[Phase.OPTIMIZER_STEP].by_category_bytes == {
        Category.PARAMETERS: 100,
        Category.ACTIVATIONS: 10,
        Category.GRADIENTS: 20,
    }


def test_of_equal_moments_the_first_is_the_peak() -> None:
    account = Account(Phase.TRAIN_STEP)
    account.enter_region(Region.HEAD)
    account.take(1, 5)
    account.give_back(1, 5)
    account.enter_region(Region.BACKWARD)
    account.take(1, 5)
    assert account.peaks()[Phase.TRAIN_STEP].by_category_bytes == {Category.LOGITS_AND_LOSS: 5}


def test_a_phase_begins_outside_of_every_region() -> None:
    account = Account(Phase.TRAIN_STEP)
    account.enter_region(Region.HEAD)
    account.enter_phase(Phase.SAVE)
    account.take(1, 5)
    assert account.peaks()[Phase.SAVE].by_category_bytes == {Category.TEMPORARIES: 5}


def test_an_address_that_is_taken_again_was_given_back() -> None:
    account = Account(Phase.TRAIN_STEP)
    first = account.take(1, 5)
    second = account.take(1, 7)
    account.drop(first)  # late news of the first one
    assert account.totals[-1] == 7
    account.drop(second)
    account.drop(second)
    account.give_back(1, 7)
    account.give_back(99, 7)  # nobody knows of it
    assert account.totals[-1] == 0
    account.take(None, 3, Category.GRADIENTS)
    assert account.totals[-1] == 3


def test_buckets_of_which_nobody_knows_the_address_count_once() -> None:
    """Of two buckets one is a block that gradients look into; the other is released from an unknown address."""
    account = Account(Phase.TRAIN_STEP)
    account.take(1, 40)
    account.take(2, 64)
    account.mark([1], Category.PARAMETERS)  # as large as a bucket, and none
    account.hold_buckets([64, 40])
    assert account.totals[-1] == 40 + 64 + 40
    account.take(3, 8)
    account.give_back(77, 40)
    account.give_back(78, 40)
    assert account.totals[-1] == 40 + 64 + 8
    peak = account.peaks()[Phase.TRAIN_STEP]
    assert peak.by_category_bytes == {
        Category.PARAMETERS: 40,
        Category.GRADIENTS: 64 + 40,
        Category.TEMPORARIES: 8,
    }
