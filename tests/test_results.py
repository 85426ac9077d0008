"""Results have their place when they are whole: failures and kills in the middle of their writing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from launcher.checkpoints import PARTIAL, damage, set_torn_aside
from launcher.worker.checkpoints import place_whole

WHOLE = {"adapter_model.safetensors": b"w" * 4096, "tokenizer.json": b"{}"}


def written(folder: Path, files: dict[str, bytes] = WHOLE, then: Callable[[], None] = lambda: None) -> None:
    """Writes as the libraries do: they make the folder; `then` comes after the first file."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
        then()


def fail() -> None:
    raise OSError(5, "Input/output error")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "seal.json"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "model"


def partial_of(place: Path) -> Path:
    return place.parent / "checkpoints" / PARTIAL


def test_a_whole_model_has_its_place_and_a_seal(place: Path) -> None:
    for files in (WHOLE, {**WHOLE, "tokenizer.json": b"[]"}):  # the second one takes the place of the first
        place_whole(place, partial(written, files=files), partial_of(place), is_main=True)
        assert contents(place) == files and damage(place) == ""
        assert not partial_of(place).exists()


@pytest.mark.parametrize("is_there", [False, True])
def test_a_failed_write_leaves_what_was_there(is_there: bool, place: Path) -> None:
    if is_there:
        written(place)
    with pytest.raises(OSError, match="Input/output error"):
        place_whole(place, lambda folder: written(folder, WHOLE, fail), partial_of(place), is_main=True)
    assert (contents(place) == WHOLE) if is_there else not place.exists()
    assert not partial_of(place).exists()


def test_a_kill_leaves_no_half_model(place: Path) -> None:
    pid = os.fork()
    if not pid:
        try:
            kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            place_whole(place, lambda folder: written(folder, WHOLE, kill), partial_of(place), is_main=True)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert not place.exists()
    assert (partial_of(place) / "model" / "adapter_model.safetensors").exists(), "it was killed in the middle"
    set_torn_aside(place.parent / "checkpoints")  # as a start does
    assert not partial_of(place).exists()
