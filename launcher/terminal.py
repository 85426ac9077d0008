"""Text on the terminal: colour where a person looks at one, and not a byte of it in a file or a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.theme import Theme

STYLES = Theme(
    {
        "report.label": "bold",
        "report.amount": "color(32)",
        "report.bad": "bold color(166)",
        "report.good": "color(32)",
        "report.block": "color(32)",
    },
    inherit=False,
)
"""Blue and orange, which the usual kinds of colour blindness tell apart; contrast of 3.9 or more on black and on white.

No colour says what the words beside it don't.
"""


class ReportHighlighter(RegexHighlighter):
    """Finds what a report's reader looks for: labels, amounts of memory, and what is wrong."""

    base_style = "report."
    highlights = (
        r"(?m)^(?P<label>[a-z]+(?: [a-z]+)?) {2,}(?=\S)",
        r"(?P<amount>(?<![\w.])\d+(?:\.\d+)? (?:[KMGT]i)?B\b)",
        r"(?m)^(?P<bad>(?:error|configuration):)",
        r"(?m)^(?P<bad>no plan)\b",
        r"(?P<bad>\b(?:squeezed|out of memory|over the budget)\b)",
        r"(?m)^grade +(?P<good>comfortable)\b",
        r"(?P<block>[\u2581-\u2588]+)",
    )


def write_text(text: str, stream: TextIO) -> None:
    """Writes lines to stdout or stderr: as they are, with colour where the stream is a terminal that has any.

    `NO_COLOR` and `FORCE_COLOR` of the environment are heeded. Nothing is broken or cut at the terminal's width. A
    terminal of 16 colours shows labels in bold and no colour: which blue and which orange it has is its own affair.
    """
    console = Console(
        file=stream, theme=STYLES, highlighter=ReportHighlighter(), markup=False, emoji=False, soft_wrap=True
    )
    console.no_color |= console.color_system == "standard"
    if console.is_terminal:
        console.print(text)
    else:
        stream.write(text + "\n")
    stream.flush()


@contextmanager
def waiting(words: str, stream: TextIO) -> Iterator[Callable[[], None]]:
    """Says on a terminal what is being waited for, and for how long by now; nothing elsewhere.

    Gives what takes the line away, to be called before anything else is written; leaving does too.
    """
    console = Console(file=stream, theme=STYLES)
    columns = SpinnerColumn("line"), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as progress:
        progress.add_task(words, total=None)
        yield progress.stop
