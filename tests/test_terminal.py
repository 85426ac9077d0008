"""Proves that a terminal shows the same text as a pipe does, in colour; real pseudo-terminals, the real command."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.terminal import STYLES, waiting, write_text

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
TEXT = """\
memory    37.86 GiB usable, 2.00 GiB headroom, profile=experiment
no plan   2 bytes missing, [bold]not markup[/bold] :smile:
grade     squeezed: 1.00 MiB (0.1%) stay free
/a/path/of/more/than/eighty/cells/that/a/user/would/copy/from/the/terminal/in/one/piece/model.safetensors"""


def on_terminal(command: list[str], environment: dict[str, str]) -> tuple[str, int]:
    """What a command writes on a terminal of 80 columns that stands for its stdout and stderr, and its exit code."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "80", **environment},
    )
    os.close(theirs)
    written = bytearray()
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # what Linux says once the last writer is gone
            break
        if not part:
            break
        written += part
    os.close(ours)
    return written.decode().replace("\r\n", "\n"), child.wait()


def written_by(text: str, environment: dict[str, str]) -> str:
    program = "import sys; from launcher.terminal import write_text; write_text(sys.argv[1], sys.stdout)"
    shown, code = on_terminal([sys.executable, "-c", program, text], environment)
    assert code == 0, shown
    return shown


def test_a_terminal_shows_the_same_words_in_colour() -> None:
    shown = written_by(TEXT, {"TERM": "xterm-256color"})
    assert ESCAPES.sub("", shown) == TEXT + "\n"
    assert "\x1b[38;5;32m37.86 GiB\x1b[0m" in shown
    assert "\x1b[1;38;5;166mno plan\x1b[0m" in shown
    assert "\x1b[1mmemory\x1b[0m" in shown


@pytest.mark.parametrize(
    "environment", [{"TERM": "dumb"}, {"TERM": "xterm-256color", "NO_COLOR": "1"}, {"TERM": "xterm-color"}]
)
def test_a_terminal_without_colour_gets_none(environment: dict[str, str]) -> None:
    shown = written_by(TEXT, environment)
    assert "38;5" not in shown and "\x1b[3" not in shown and ";3" not in shown
    assert ESCAPES.sub("", written_by(TEXT, environment)) == TEXT + "\n"


def test_a_file_gets_plain_text(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        write_text(TEXT, file)
    assert (tmp_path / "out").read_text() == TEXT + "\n"


def test_waiting_is_silent_outside_a_terminal() -> None:
    stream = io.StringIO()
    with waiting("planning", stream) as stop:
        stop()
    assert stream.getvalue() == ""


def test_the_command_waits_and_answers_on_a_terminal(tmp_path: Path) -> None:
    """A plan on a terminal is the plan in a pipe; the line that said what was waited for is gone."""
    command = [str(Path(sys.executable).with_name("launch")), "action=plan", f"run_dir={tmp_path / 'run'}"]
    shown, code = on_terminal(command, {"TERM": "xterm-256color"})
    assert code == 0, shown
    assert "planning" in shown
    piped = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "\x1b" not in piped.stdout + piped.stderr
    plain = ESCAPES.sub("", shown)
    for line in piped.stdout.splitlines()[:-1]:
        assert line in plain


@pytest.mark.parametrize("name", ["amount", "bad", "good", "block"])
@pytest.mark.parametrize("background", [0.0, 1.0])
def test_colours_can_be_read_on_black_and_on_white(name: str, background: float) -> None:
    """WCAG 2.2's contrast, at least 3.5 to 1 (its minimum for large text and graphics is 3)."""
    colour = STYLES.styles[f"report.{name}"].color
    assert colour is not None
    light = luminance(*colour.get_truecolor())
    assert (max(light, background) + 0.05) / (min(light, background) + 0.05) >= 3.5


def luminance(*channels: int) -> float:
    """Relative luminance of an sRGB colour, as WCAG 2.2 defines it."""
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
