"""How text is laid out: columns and hanging labels, at most 80 cells of a terminal wide, without any colour."""

from __future__ import annotations

import io
import sys
import textwrap
from collections.abc import Sequence

from rich.console import Console, JustifyMethod, OverflowMethod
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

WIDTH = 80
GAP = 2
"""Cells between two columns."""


def aligned(
    rows: Sequence[Sequence[str]], num_words: int = 1, gives_way: int = 0, *, is_cut: bool = False
) -> list[str]:
    """Columns of text, a line for each row: `num_words` left-aligned, the others, which are figures, right-aligned.

    Where they would be wider than 80 cells, the column `gives_way` goes on in further lines, or is cut to one.
    """
    console = _console()
    table = _table(rows, num_words, gives_way, "ellipsis" if is_cut else "fold")
    lines = console.render_lines(table, pad=False)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


def fits_width(rows: Sequence[Sequence[str]]) -> bool:
    """Whether these columns need no more than 80 cells."""
    console = _console()
    return Measurement.get(console, console.options.update(width=sys.maxsize), _table(rows)).maximum <= WIDTH


def _table(
    rows: Sequence[Sequence[str]], num_words: int = 1, gives_way: int = 0, overflow: OverflowMethod = "fold"
) -> Table:
    count = max(map(len, rows))
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, GAP // 2))
    for column in range(count):
        side: JustifyMethod = "left" if column < num_words else "right"
        table.add_column(justify=side, no_wrap=column != gives_way, overflow=overflow)
    for row in rows:
        table.add_row(*(Text(row[column] if column < len(row) else "") for column in range(count)))
    return table


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
