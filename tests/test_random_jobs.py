"""Whatever the command line says, it ends in a plan, in "no plan fits", or in one message: never in a traceback."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import huggingface_hub.constants
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.random_jobs import LEAVES, command_lines, settle

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 30.0
"""What the tests on every commit may take."""
MANY = 5_000
SLOWEST_SECONDS = 20.0
"""A job that takes longer than this without a trace hangs."""


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub is asked for the models that a random word names."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def settle_many(num_jobs: int, seconds: float, scratch: Path) -> Counter[str]:
    """Settles random jobs until there are so many, or the time is up."""
    outcomes: Counter[str] = Counter()
    deadline = time.monotonic() + seconds

    @settings(
        max_examples=num_jobs,
        deadline=None,
        database=None,
        derandomize=num_jobs < MANY,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(command_lines())
    def one(arguments: list[str]) -> None:
        if time.monotonic() > deadline:
            return
        began = time.monotonic()
        outcomes[settle(arguments, scratch)] += 1
        shutil.rmtree(scratch / "run", ignore_errors=True)
        assert time.monotonic() - began < SLOWEST_SECONDS, arguments

    one()
    return outcomes


def test_every_key_is_tried() -> None:
    assert {"training.global_batch_size", "planner.pin.zero_stage", "launch.options"} <= {
        name for name, _ in LEAVES
    }


@pytest.mark.usefixtures("offline")
def test_random_jobs_end_without_a_traceback(tmp_cwd: Path) -> None:
    outcomes = settle_many(400, SECONDS, tmp_cwd)
    assert outcomes["refused"] and outcomes["plan"], outcomes


@pytest.mark.thorough
@pytest.mark.usefixtures("offline")
def test_five_thousand_random_jobs_end_without_a_traceback(
    tmp_cwd: Path, pytestconfig: pytest.Config
) -> None:
    began = time.monotonic()
    outcomes = settle_many(MANY, 3600.0, tmp_cwd)
    assert sum(outcomes.values()) >= MANY * 0.9
    assert min(outcomes["refused"], outcomes["plan"], outcomes["no plan fits"]) > 20, outcomes
    if pytestconfig.getoption("write_outcomes"):
        write_outcomes(ROOT / "docs" / "accuracy", outcomes, time.monotonic() - began)


def write_outcomes(folder: Path, outcomes: Counter[str], seconds: float) -> Path:
    """Writes down what came of random jobs, of which none ended in a traceback; returns the file."""
    today = datetime.now(UTC).date().isoformat()
    document = {
        "date": today,
        "jobs": sum(outcomes.values()),
        "outcomes": dict(sorted(outcomes.items())),
        "seconds": round(seconds),
        "versions": {name: version(name) for name in ("hydra-core", "hypothesis", "pydantic")},
        "python": platform.python_version(),
    }
    file = folder / f"{today}-random-jobs.json"
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return file


def test_what_came_of_random_jobs_is_written_down(tmp_path: Path) -> None:
    file = write_outcomes(tmp_path, Counter({"plan": 3, "refused": 4}), 1.6)
    written = json.loads(file.read_text(encoding="utf-8"))
    assert file.name == f"{written['date']}-random-jobs.json"
    assert (written["jobs"], written["seconds"]) == (7, 2)
    assert written["outcomes"] == {"plan": 3, "refused": 4}
