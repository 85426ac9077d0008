"""The timeline as a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from launcher.memory import Bill, Timeline
from launcher.units import GIB


def write_plot(bill: Bill, measured: Timeline | None, title: str, file: Path) -> None:
    """Draws one optimizer step, predicted and (where it was) measured, as a PNG file."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for name, timeline in (("predicted", bill.step), ("measured", measured)):
        if timeline is not None:
            count = len(timeline.allocated_bytes)
            places = [100.0 * (i + 0.5) / count for i in range(count)]
            axes.plot(places, [value / GIB for value in timeline.allocated_bytes], label=name, linewidth=1)
    axes.set(title=title, xlabel="allocations of one optimizer step, %", ylabel="live tensors, GiB")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(file, format="png", dpi=120)
