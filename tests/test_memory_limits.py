"""scripts/memory_limits.py calls a phase right only when memory ran out there. Its runs are not repeated here."""

from __future__ import annotations

from dataclasses import replace

from launcher.memory import Phase
from scripts.memory_limits import Outcome, Visit, note


def test_a_phase_that_never_ran_out_of_memory_is_not_right() -> None:
    met = Outcome(
        Phase.SAVE, 1, 3, 2, tripped=("save", "save"), exit_code=4, resumed=True, loss_difference=0.0
    )
    assert met.is_right
    assert not replace(met, tripped=()).is_right
    assert not replace(met, tripped=(), limit_bytes=None).is_right
    assert not replace(met, tripped=("save", "train_step")).is_right
    assert not replace(met, loss_difference=0.1).is_right
    assert not replace(met, loss_difference=None).is_right


def test_each_stay_in_a_phase_knows_what_was_before_it() -> None:
    """The first optimizer step makes the states; the second backward pass has them and more."""
    visits: list[Visit] = []
    step, update = Phase.TRAIN_STEP, Phase.OPTIMIZER_STEP
    for phase, size in ((step, 5), (step, 4), (update, 4), (update, 8), (step, 8), (step, 9), (update, 8)):
        note(visits, phase, size)
    assert visits == [
        Visit(step, 0, 5, 5),
        Visit(update, 5, 4, 8),
        Visit(step, 8, 8, 9),
        Visit(update, 9, 8, 8),
    ]
    assert [visit.rise_bytes(False) for visit in visits if visit.phase is update] == [3, -1]
    assert [visit.rise_bytes(True) for visit in visits if visit.phase is update] == [4, 0]
