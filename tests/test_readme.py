"""The README is true: its commands compose and run, its links resolve, and CI runs its test command."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.config import load_job
from launcher.job import Action

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every line of the README's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


LAUNCHES = [command for command in commands() if command.startswith("launch ")]


def test_the_readme_shows_commands() -> None:
    assert len(LAUNCHES) >= 5
    assert sum("pip install" in command for command in commands()) == 2


@pytest.mark.parametrize("command", LAUNCHES)
def test_launch_command_runs(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)[1:]
    if words != ["--help"]:
        assert load_job(words).action in (Action.PLAN, Action.REPORT, Action.MEMORY)
    child = subprocess.run(
        [sys.executable, "-m", "launcher.cli", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    if "output=json" in words:
        assert json.loads(child.stdout)["feasible"] is True


def test_the_first_command_runs_the_default_job() -> None:
    first = commands()[0]
    assert first.endswith("&& .venv/bin/launch")
    assert load_job([]).recipe == "smollm_lora"


def test_ci_runs_the_readmes_test_command() -> None:
    """`.ci/run` reads the command out of the README instead of repeating it."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in script
    (command,) = [line for line in commands() if "'.[dev]'" in line]
    assert command.endswith("pytest")


def test_links_resolve() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert len(pages) >= 3
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_file_map_names_every_module() -> None:
    shown = README[README.index("launcher/\n") :]
    modules = sorted(path.name for path in (ROOT / "launcher").glob("*.py") if path.name != "__init__.py")
    assert [name for name in modules if name not in shown] == []


def test_exit_codes_are_the_contracts() -> None:
    from launcher import errors

    kinds: list[type[errors.LauncherError]] = [*errors.LauncherError.__subclasses__(), errors.Terminated]
    codes = {kind.exit_code for kind in kinds}
    listed = re.search(r"Exit codes: (.*?)\. `output", README, flags=re.DOTALL)
    assert listed is not None
    assert codes | {0} == {int(code) for code in re.findall(r"\d+", listed.group(1))}
