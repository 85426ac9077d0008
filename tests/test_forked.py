"""Processes that are forked from one that has imported: answers, failures, and that nothing is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import psutil
import pytest

from launcher.errors import UnsupportedByPlanner
from launcher.planner.forked import ForkedPool

PREPARED: list[str] = []
SECONDS = 30.0


def prepare(word: str) -> None:
    PREPARED.append(f"{word} in {os.getpid()}")


def answer(number: int) -> tuple[int, list[str], int]:
    return number + 1, PREPARED, os.getpid()


def refuse(what: str) -> None:
    raise UnsupportedByPlanner(f"no {what}", "another")


def die() -> None:
    os._exit(3)


def sleep(marker: str) -> int:
    """Starts a child of its own, as a trace with an engine does, and waits."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", marker])
    return child.wait()


@pytest.fixture
def pool() -> Iterator[ForkedPool]:
    opened = ForkedPool(2, prepare, "once")
    yield opened
    opened.close()


def marked(marker: str) -> list[psutil.Process]:
    """Processes with a word in their command line."""
    return [
        process for process in psutil.process_iter(["cmdline"]) if marker in (process.info["cmdline"] or [])
    ]


def wait_for(number: int, marker: str) -> None:
    """Waits until so many processes carry the word."""
    deadline = time.monotonic() + SECONDS
    while len(marked(marker)) != number and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(marked(marker)) == number


def test_what_was_prepared_once_is_there_in_every_process(pool: ForkedPool) -> None:
    found = [future.result(SECONDS) for future in [pool.submit(answer, number) for number in range(20)]]
    assert [number for number, _, _ in found] == list(range(1, 21))
    ((prepared,),) = {tuple(words) for _, words, _ in found}
    workers = {process for _, _, process in found}
    assert 1 <= len(workers) <= 2 and prepared.startswith("once in ")
    assert int(prepared.split()[-1]) not in {*workers, os.getpid()}


def test_a_failure_is_the_askers_and_the_next_question_is_answered(pool: ForkedPool) -> None:
    failed = pool.submit(refuse, "way")
    with pytest.raises(UnsupportedByPlanner, match="no way"):
        failed.result(SECONDS)
    assert pool.submit(answer, 1).result(SECONDS)[0] == 2


def test_a_process_that_dies_fails_what_waits_and_what_comes(pool: ForkedPool) -> None:
    futures = [pool.submit(die), *(pool.submit(sleep, "forked-dies") for _ in range(3))]
    for future in futures:
        with pytest.raises(BrokenProcessPool):
            future.result(SECONDS)
    with pytest.raises(BrokenProcessPool):
        pool.submit(answer, 1).result(SECONDS)
    wait_for(0, "forked-dies")


def test_closing_ends_what_works_and_its_children(pool: ForkedPool) -> None:
    futures = [pool.submit(sleep, "forked-closed") for _ in range(3)]
    wait_for(2, "forked-closed")
    pool.close()
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(SECONDS)
    wait_for(0, "forked-closed")


ASKER = """
import sys, time
from launcher.planner.forked import ForkedPool
from tests.test_forked import prepare, sleep
if __name__ == "__main__":
    pool = ForkedPool(2, prepare, "once")
    pool.submit(sleep, "forked-asker")
    print("asked", flush=True)
    time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT, None])
def test_nothing_is_left_when_the_asker_ends(ending: signal.Signals | None, tmp_path: Path) -> None:
    script = tmp_path / "asker.py"
    script.write_text(ASKER)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    seconds = "600" if ending else "0"
    asker = subprocess.Popen(
        [sys.executable, script, seconds], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert asker.stdout is not None
    assert asker.stdout.readline() == b"asked\n"
    if ending is not None:
        wait_for(1, "forked-asker")
        asker.send_signal(ending)
    assert asker.wait(SECONDS) == {signal.SIGKILL: -9, signal.SIGINT: -2, None: 0}[ending]
    wait_for(0, "forked-asker")
    assert not [process for process in psutil.process_iter(["cmdline"]) if str(script) in str(process.info)]
