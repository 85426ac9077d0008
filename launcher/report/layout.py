"""How text is laid out: columns and hanging labels, at most 80 cells of a terminal wide, without any colour."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, JustifyMethod, OverflowMethod
from rich.table import Table
from rich.text import Text

WIDTH = 80
LEAST = 12
"""Cells that a column keeps which gives way."""
GAP = 2
"""Cells between two columns."""


def aligned(
    rows: Sequence[Sequence[str]], num_words: int = 1, gives_way: int = 0, *, is_cut: bool = False
) -> list[str]:
    """Columns of text, a line for each row: `num_words` left-aligned, the others, which are figures, right-aligned.

    Where they would be wider than 80 cells, the column `gives_way` goes on in further lines, or is cut to one. It keeps
    12 cells; figures that leave it less make the lines longer, and none is lost.
    """
    widths = _widths(rows)
    needed = sum(widths) - widths[gives_way] + min(LEAST, widths[gives_way]) + GAP * (len(widths) - 1)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, GAP // 2))
    for column, width in enumerate(widths):
        side: JustifyMethod = "left" if column < num_words else "right"
        if column == gives_way:
            way: OverflowMethod = "ellipsis" if is_cut else "fold"
            table.add_column(justify=side, overflow=way, min_width=min(LEAST, width))
        else:
            table.add_column(justify=side, no_wrap=True, min_width=width)
    for row in rows:
        table.add_row(*(Text(row[column] if column < len(row) else "") for column in range(len(widths))))
    console = _console()
    lines = console.render_lines(table, console.options.update(width=max(WIDTH, needed)), pad=False)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


def fits_width(rows: Sequence[Sequence[str]]) -> bool:
    """Whether these columns need no more than 80 cells."""
    widths = _widths(rows)
    return sum(widths) + GAP * (len(widths) - 1) <= WIDTH


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """Cells that each column needs."""
    count = max(map(len, rows))
    return [max(cell_len(row[column]) for row in rows if column < len(row)) for column in range(count)]


def wrapped(label: str, text: str) -> str:
    """A label and a text, wrapped to the width under the text's own column; no word is broken."""
    room = WIDTH - len(label) - 1
    lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
    return (f"{label} " + f"\n{' ' * (len(label) + 1)}".join(lines)).rstrip()


def _console() -> Console:
    """What measures and breaks text: the same on every terminal, and none at all."""
    return Console(
        file=io.StringIO(),
        width=WIDTH,
        height=WIDTH,
        color_system=None,
        force_jupyter=False,
        legacy_windows=False,
    )
