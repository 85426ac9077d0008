"""The bill: moments, hills and the last step, on streams and timelines made by hand; the chart; the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from launcher.memory import Bill, Category, ModuleShare, Moment, Phase, Timeline, last_step
from launcher.planner.bill import build_bill
from launcher.planner.stream import CATEGORIES, PHASES, Stream
from launcher.report.bill import CHART_HEIGHT, CHART_WIDTH, bill_document, bill_text, chart
from launcher.report.plot import write_plot
from launcher.units import GIB, MIB

TRAIN, OPTIMIZER = Phase.TRAIN_STEP, Phase.OPTIMIZER_STEP


def made_bill() -> Bill:
    """A step whose highest moment is in its passes, and whose second hill is the optimizer's."""
    sizes = [100, 80, 300, 50]  # weights, activations, a score matrix, the optimizer's temporary
    events = [1, 2, 3, -3, -2, 4, -4]
    phases = [TRAIN] * 5 + [OPTIMIZER] * 2
    kinds = [Category.PARAMETERS, Category.ACTIVATIONS, Category.TEMPORARIES, Category.TEMPORARIES]
    return build_bill(
        Stream(
            sizes_bytes=np.array(sizes, dtype=np.int64) * MIB,
            categories=np.array([CATEGORIES.index(kind) for kind in kinds], dtype=np.int8),
            modules=np.array([1, 1, 2, 0], dtype=np.int32),
            module_names=("", "model.layers.0.mlp", "model.layers.0.attention"),
            operations=np.array([0, 0, 1, 2], dtype=np.int32),
            operation_names=("aten.empty", "aten.bmm", "aten._foreach_sqrt"),
            events=np.array(events, dtype=np.int64),
            phases=np.array([PHASES.index(phase) for phase in phases], dtype=np.int8),
            cuda_streams=np.zeros(len(sizes), dtype=np.int8),
        )
    )


def test_the_bill_names_both_hills_and_who_made_them() -> None:
    bill = made_bill()
    assert (bill.peak.phase, bill.peak.allocated_bytes) == (TRAIN, 480 * MIB)
    assert bill.peak.by_module == (
        ModuleShare("model.layers.0.attention", 300 * MIB, 1),
        ModuleShare("model.layers.0.mlp", 180 * MIB, 2),
    )
    assert bill.peak.by_category_bytes[Category.ACTIVATIONS] == 80 * MIB
    assert bill.next_highest is not None
    assert (bill.next_highest.phase, bill.next_highest.allocated_bytes) == (OPTIMIZER, 150 * MIB)
    text = bill_text(bill, None)
    assert "480.0 MiB" in text and "model.layers.0.attention" in text and "62.5 %" in text
    assert "330.0 MiB lower" in text and "(no module)" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_the_last_step_is_its_passes_and_the_optimizers_step() -> None:
    phases = [Phase.LOAD, TRAIN, TRAIN, OPTIMIZER, TRAIN, TRAIN, OPTIMIZER, Phase.SAVE]
    step = last_step([1, 2, 3, 4, 5, 6, 7, 8], phases)
    assert step == Timeline((5, 6, 7), (TRAIN, TRAIN, OPTIMIZER))
    with pytest.raises(ValueError, match="empty"):
        last_step([1], [TRAIN])


def test_a_long_step_is_shown_by_the_highest_of_each_part() -> None:
    step = last_step([*range(6000), 9], [TRAIN] * 6000 + [OPTIMIZER])
    assert len(step.allocated_bytes) == 600
    assert max(step.allocated_bytes) == 5999


def test_the_chart_is_as_high_as_its_highest_value() -> None:
    rows = chart(Timeline((GIB, 2 * GIB, 0), (TRAIN, TRAIN, OPTIMIZER)))
    assert len(rows) == CHART_HEIGHT + 1
    assert rows[0] == "  2.00 GiB  \u2588 "
    assert rows[CHART_HEIGHT - 1].endswith("0 \u2588\u2588 ")
    assert rows[-1].strip() == "|t|"
    wide = chart(Timeline(tuple(range(1, 601)), (TRAIN,) * 600))
    assert max(map(len, wide)) <= 11 + CHART_WIDTH


def test_document_and_picture(tmp_path: Path) -> None:
    bill = made_bill()
    document = bill_document(bill, bill.step)
    assert document["peak"]["allocated_bytes"] == 480 * MIB
    assert document["measured_step"]["allocated_bytes"] == bill.step.allocated_bytes
    file = tmp_path / "memory.png"
    write_plot(bill, bill.step, "a step", file)
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 5000


def test_a_moment_without_modules_is_shown() -> None:
    moment = Moment(TRAIN, 5, {Category.INPUTS: 5}, ())
    assert "5 B" in bill_text(Bill(moment, None, Timeline((5,), (TRAIN,))), None)
