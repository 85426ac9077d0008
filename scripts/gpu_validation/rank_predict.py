"""Predictions for jobs of several ranks, in CPU processes beside the card; and who asks for them.

    python -m scripts.gpu_validation.rank_predict <order.json> <folder>

leaves one document per job in the folder, as each is ready. No torch here: the tracers are child processes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from launcher.documents import read_document, write_document
from launcher.job import JobSpec
from launcher.libraries import OPTIONAL_LIBRARIES, unneeded_libraries
from launcher.memory import MemoryEstimate
from launcher.plan import Plan
from launcher.planner.forecast import Forecaster
from launcher.planner.trace_cache import TraceCache
from launcher.planner.tracer import Tracer
from scripts.gpu_validation.processes import Child

MODULE = "scripts.gpu_validation.rank_predict"
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class RankSubject:
    """What is predicted: a plan and the facts of the hardware, and nothing that was measured."""

    name: str
    job: JobSpec
    plan: Plan


@dataclass(frozen=True)
class RankOrder:
    """All that is to be predicted, most urgent first."""

    subjects: tuple[RankSubject, ...]


@dataclass(frozen=True)
class RankAnswer:
    """What the predicting process says of one job."""

    estimate: MemoryEstimate | None
    message: str = ""
    """Why there is no estimate."""
    seconds: float = 0.0
    """What predicting took; the first one of a kind waits for the libraries."""


def answer_file(folder: Path, name: str) -> Path:
    """Where the answer for a job lies."""
    return folder / f"{name}.prediction.json"


def predict_all(order: RankOrder, folder: Path) -> None:
    """Predicts one job after another.

    Jobs that need the same optional libraries share their tracers, as each takes seconds to import them.
    """
    with ExitStack() as stack:
        tracers: dict[tuple[str, ...], Tracer] = {}
        for subject in order.subjects:
            unneeded = unneeded_libraries(subject.plan)
            needed = tuple(name for name in OPTIONAL_LIBRARIES if name not in unneeded)
            if needed not in tracers:
                tracers[needed] = stack.enter_context(Tracer(needed))
            write_document(answer_file(folder, subject.name), _answer(subject, tracers[needed]))


def _answer(subject: RankSubject, tracer: Tracer) -> RankAnswer:
    began = time.perf_counter()
    try:
        estimate = Forecaster(subject.job, tracer, TraceCache(None)).estimate(subject.plan, exact=True)
    except Exception as failure:  # one job that can't be predicted must not cost the others theirs
        return RankAnswer(None, f"{type(failure).__name__}: {failure}"[:1000])
    return RankAnswer(estimate, seconds=round(time.perf_counter() - began, 2))


class RankPredictor:
    """Predicts beside the ranks.

    Args:
        subjects: In the order in which they will be asked for.
        environment: The whole environment, with no device in sight.
        folder: For its order, log and answers.
    """

    def __init__(self, subjects: Sequence[RankSubject], environment: Mapping[str, str], folder: Path) -> None:
        order = folder / "predict.json"
        write_document(order, RankOrder(tuple(subjects)))
        self._folder = folder
        self._child = Child(MODULE, [str(order), str(folder)], environment, folder)

    def answer(self, name: str, seconds: float) -> RankAnswer | None:
        """The answer for a job; None when there is none in time."""
        deadline, file = time.monotonic() + seconds, answer_file(self._folder, name)
        while True:
            has_ended = self._child.process.poll() is not None
            if file.exists():
                return read_document(file, RankAnswer)
            if has_ended:
                return RankAnswer(None, f"predicting ended: {self._child.last_words()}")
            if time.monotonic() > deadline:
                return None
            time.sleep(POLL_SECONDS)

    def __enter__(self) -> RankPredictor:
        return self

    def __exit__(self, *failure: object) -> None:
        self._child.end()


def main(argv: list[str]) -> None:
    """Entry point."""
    predict_all(read_document(Path(argv[1]), RankOrder), Path(argv[2]))


if __name__ == "__main__":
    main(sys.argv)
