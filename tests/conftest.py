"""What every test shares: a clean environment, an empty working folder, a path that breaks careless code."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from launcher.run.render import heap_environment

NO_SKIP = os.environ.get("LAUNCHER_NO_SKIP", "").split()
"""Files whose tests must not skip, as `test_slurm`: `.ci/run` names those that it has made runnable."""
UNCLEAN = ("ACCELERATE_", "DEEPSPEED_", "FSDP_", "HYDRA_", "LAUNCHER_", "TRL_", "WANDB_")
"""Beginnings of variables that would steer the libraries under test."""
UNCLEAN_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest -n 0 -m thorough tests/test_random_jobs.py --write-outcomes` keeps what came of the random jobs."""
    parser.addoption(
        "--write-outcomes", action="store_true", help="write docs/accuracy/<date>-random-jobs.json"
    )


def pytest_configure() -> None:
    """One thread a process: three tests run at a time, and threads that share cores wait for each other by turning."""
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of few tests come first: those train for real, and one that began last would keep a single core busy."""
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (sizes[item.path], item.path))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skip where none may be is a failure, with the reason."""
    report = yield
    if report.skipped and item.path.stem in NO_SKIP:
        report.outcome = "failed"
        report.longrepr = f"LAUNCHER_NO_SKIP has {item.path.stem}, and it skips: {report.longreprtext}"
    return report


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the caller's shell steers a test."""
    for name in list(os.environ):
        if name.startswith(UNCLEAN) or name in UNCLEAN_NAMES:
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def small_heap() -> Iterator[None]:
    """What was there before a test is not searched for garbage in it: half a million objects of the libraries."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random Llama, a byte-level tokenizer and a JSONL file of texts."""
    from tests.tiny_job import write_tiny_model  # torch reads the number of threads as it is imported

    folder = tmp_path_factory.mktemp("tiny model")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace cache that the tests of a file share."""
    return tmp_path_factory.mktemp("traces")


@pytest.fixture
def tmp_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def nasty_path(tmp_path: Path) -> Path:
    """A folder whose name has all that breaks formatted command lines."""
    folder = tmp_path / 'a b\'s "c", [d] {e} (f) $g=h'
    folder.mkdir()
    return folder


@pytest.fixture(scope="session", autouse=True)
def interrupts_arrive() -> None:
    """A shell starts background jobs with interrupts ignored, `nohup` with hang-ups; children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


SPARE_BYTES = 252 << 20
"""What a process that has imported the libraries holds and can do without, by trial (torch 2.13+cpu: 1,404 MiB, and the
jobs of test_recovery.py run out within 1,152 MiB where they should)."""
IMPORTED = """
from launcher.libraries import OPTIONAL_LIBRARIES, hide_libraries
hide_libraries(OPTIONAL_LIBRARIES)
from launcher.worker.__main__ import TRAIN_MODULE, import_for_good
import_for_good(TRAIN_MODULE)
status = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData")))
"""
"""Prints the private memory of a process that has imported what a worker does: a build of torch for CUDA holds half a
gibibyte more."""


@pytest.fixture(scope="session")
def limit_bytes() -> int:
    """Private memory that a process may hold, so that `long_job` of test_recovery.py runs out of it where it should."""
    settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **heap_environment({})}
    child = subprocess.run(
        [sys.executable, "-c", IMPORTED],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **settings},
    )
    return int(child.stdout.split()[-1]) - SPARE_BYTES


@pytest.fixture
def port() -> int:
    """A port that is free, and the next one too."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            number = int(first.getsockname()[1])
            try:
                with socket.create_server(("127.0.0.1", number + 1)):
                    return number
            except OSError:
                continue
