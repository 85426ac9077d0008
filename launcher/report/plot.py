"""Pictures of a plan, as PNG files: its bill, a step over time, and what fits."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from launcher.memory import Bill, Category, Timeline
from launcher.report.findings import Findings
from launcher.report.tables import plan_words
from launcher.units import GIB, MIB, format_bytes
from launcher.whatif import WhatIf

COLOURS: Mapping[Category, str] = {
    Category.PARAMETERS: "#0072b2",
    Category.BUFFERS: "#8a8f98",
    Category.GRADIENTS: "#cc79a7",
    Category.OPTIMIZER_STATE: "#e69f00",
    Category.ACTIVATIONS: "#009e73",
    Category.LOGITS_AND_LOSS: "#d55e00",
    Category.TEMPORARIES: "#56b4e9",
    Category.INPUTS: "#f0e442",
    Category.WORKSPACES: "#b8bdc6",
}
"""Those of the page, told apart by people of every kind of colour vision (Okabe and Ito, 2008)."""
OVER = "#b34700"
DOTS_PER_INCH = 120
TITLE_WIDTH = 120
"""Characters of a title's line on a picture 9 inches wide."""


def write_plot(bill: Bill, measured: Timeline | None, title: str, file: Path) -> None:
    """Draws one optimizer step, predicted and (where it was) measured, as a PNG file."""
    file.write_bytes(_step(bill, measured, title))


def pictures(findings: Findings) -> Mapping[str, bytes]:
    """All pictures of a plan by name, PNG."""
    return {"bill": draw_bill(findings), "step": draw_step(findings), "fits": draw_fits(findings)}


def data_url(png: bytes) -> str:
    """A picture as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def draw_step(findings: Findings) -> bytes:
    """One optimizer step, predicted and (where it was) measured."""
    return _step(findings.bill, findings.measured, _title(findings))


def draw_bill(findings: Findings) -> bytes:
    """The peak of every phase, stacked by category, beside the memory of the device."""
    estimate = findings.estimate
    figure = Figure(figsize=(9, 1.6 + 0.42 * len(estimate.phases)), layout="constrained")
    axes = figure.subplots()
    names = [peak.phase.value.replace("_", " ") for peak in estimate.phases]
    scale, unit = _unit(findings.capacity_bytes, estimate.peak_device_bytes)
    left = [0.0] * len(names)
    for category, colour in COLOURS.items():
        sizes = [peak.by_category_bytes.get(category, 0) / scale for peak in estimate.phases]
        if any(sizes):
            label = category.value.replace("_", " ")
            axes.barh(names, sizes, left=left, color=colour, edgecolor="white", linewidth=0.5, label=label)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
    for place, (total, peak) in enumerate(zip(left, estimate.phases, strict=True)):
        axes.annotate(
            format_bytes(peak.allocated_bytes),
            (total, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    if findings.capacity_bytes < 4 * estimate.peak_device_bytes:
        axes.axvline(findings.capacity_bytes / scale, color=OVER)
        axes.axvline((findings.capacity_bytes - findings.headroom_bytes) / scale, color=OVER, linestyle="--")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    _write_title(axes, _title(findings))
    axes.set_xlabel(f"live tensors at the peak of each phase, {unit}")
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, ncols=5, loc="outside lower center")
    return _png(figure)


def draw_fits(findings: Findings) -> bytes:
    """The map of micro batch and length: bytes of the device, and whether they fit."""
    what_if = findings.what_if
    budget = what_if.budget_bytes(findings.capacity_bytes)
    rows = what_if.by_split()
    figure = Figure(figsize=(1.6 + 0.72 * len(what_if.lengths), 1.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    blues = LinearSegmentedColormap.from_list("share", ["#eef5fa", "#8fc1e3"])
    scale, unit = unit_of(what_if)
    for row, points in enumerate(rows.values()):
        for column, point in enumerate(points):
            size = None if point.estimate is None else point.estimate.peak_device_bytes
            fits = size is not None and size <= budget
            colour = "white" if size is None else blues(size / budget) if fits else "#fdf0e6"
            axes.fill_between([column, column + 1], row, row + 1, facecolor=colour, edgecolor="white", linewidth=2,
                              hatch=None if fits else "///")  # fmt: skip
            mark = "" if size is None else "✓" if fits else "✗"
            text = "?" if size is None else f"{size / scale:.{2 if size < 10 * scale else 1}f} {mark}"
            box = None if fits else {"facecolor": "white", "edgecolor": "none", "pad": 1}
            written = axes.text(column + 0.5, row + 0.5, text, bbox=box, ha="center", va="center", fontsize=8)
            written.set_color("black" if fits else OVER)
    axes.set_xticks(
        [i + 0.5 for i in range(len(what_if.lengths))],
        [str(length) for length in what_if.lengths],
        fontsize=8,
    )
    axes.set_yticks([i + 0.5 for i in range(len(rows))],
                    [f"{s.micro_batch_size} x {s.gradient_accumulation_steps}" for s in rows], fontsize=8)  # fmt: skip
    axes.set(
        xlabel="tokens per sequence",
        ylabel="micro batch x accumulation",
        xlim=(0, len(what_if.lengths)),
        ylim=(len(rows), 0),
    )
    words = f"{unit} on a device with {format_bytes(findings.capacity_bytes)}: {findings.title}"
    _write_title(axes, words, 14 * len(what_if.lengths))
    return _png(figure)


def unit_of(what_if: WhatIf) -> tuple[int, str]:
    """The unit of the map: its bytes and its name."""
    known = (point.estimate.peak_device_bytes for point in what_if.points if point.estimate is not None)
    return _unit(4 * min(known, default=GIB))


def _step(bill: Bill, measured: Timeline | None, title: str) -> bytes:
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    scale, unit = _unit(max(bill.step.allocated_bytes))
    for name, timeline, style in (("predicted", bill.step, "-"), ("measured", measured, "--")):
        if timeline is not None:
            count = len(timeline.allocated_bytes)
            places = [100.0 * (i + 0.5) / count for i in range(count)]
            values = [value / scale for value in timeline.allocated_bytes]
            axes.plot(
                places, values, style, label=name, linewidth=1, color="#0072b2" if style == "-" else OVER
            )
    _write_title(axes, title)
    axes.set(xlabel="allocations of one optimizer step, %", ylabel=f"live tensors, {unit}", xlim=(0, 100))
    axes.set_ylim(bottom=0)
    _mark_phases(axes, [phase.value.replace("_", " ") for phase in bill.step.phases])
    if measured is not None:
        axes.legend(loc="best")
    return _png(figure)


def _mark_phases(axes: Axes, phases: Sequence[str]) -> None:
    begin = 0
    for name, group in groupby(phases):
        place = 100.0 * begin / len(phases)
        length = len(list(group))
        if begin:
            axes.axvline(place, color="#5c6570", linewidth=0.8, linestyle=":")
        if length > len(phases) / 10:
            axes.text(
                place + 0.5, 0.02, name, transform=axes.get_xaxis_transform(), fontsize=8, color="#5c6570"
            )
        begin += length


def _title(findings: Findings) -> str:
    return f"{findings.title}: {plan_words(findings.plan)}"


def _write_title(axes: Axes, text: str, width: int = TITLE_WIDTH) -> None:
    """A title of several lines, in which `$` is no formula."""
    axes.set_title(textwrap.fill(text, width), fontsize=9).set_parse_math(False)


def _unit(*sizes_bytes: int) -> tuple[int, str]:
    return (GIB, "GiB") if max(sizes_bytes) >= GIB else (MIB, "MiB")


def _png(figure: Figure) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DOTS_PER_INCH)
    return drawn.getvalue()
