"""Documents appear whole or not at all, also when power goes the moment after they were renamed."""

from __future__ import annotations

import os
import resource
import signal
import stat
from pathlib import Path

import pytest

from launcher.documents import append_lines, read_document, read_lines, write_bytes, write_document
from launcher.memory import StepShape


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced and renamed from now on, in order; all of it still happens."""
    steps: list[str] = []
    sync, rename = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        steps.append("sync folder" if is_folder else f"sync {os.fstat(descriptor).st_size} bytes")
        sync(descriptor)

    def replace(old: Path, new: Path) -> None:
        steps.append(f"rename to {Path(new).name}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return steps


def test_content_is_on_disk_before_its_name_is_and_then_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = recorded(monkeypatch)
    write_bytes(tmp_path / "plan.json", b"123")
    assert steps == ["sync 3 bytes", "rename to plan.json", "sync folder"]
    steps.clear()
    write_bytes(tmp_path / "trace.json", b"123", is_synced=False)
    assert steps == ["rename to trace.json"]
    assert (tmp_path / "plan.json").read_bytes() == (tmp_path / "trace.json").read_bytes() == b"123"


def test_a_document_that_does_not_fit_leaves_the_one_before_it(tmp_path: Path) -> None:
    file = tmp_path / "shape.json"
    write_document(file, StepShape(2, 64))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(OSError, match="File too large"):
            write_bytes(file, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert read_document(file, StepShape) == StepShape(2, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["shape.json"]


def test_lines_after_one_that_a_kill_left_torn_are_whole(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert list(read_lines(file)) == []
    append_lines(file, [{"step": 1}, {"step": 2, "text": "a\nb"}])
    with file.open("a") as stream:
        stream.write('{"step": 3, "lo')
    assert [line["step"] for line in read_lines(file)] == [1, 2]
    append_lines(file, [{"step": 3}])
    append_lines(file, [{"step": 4}])
    assert [line["step"] for line in read_lines(file)] == [1, 2, 3, 4]
    assert file.read_text().splitlines()[2:] == ['{"step": 3, "lo', '{"step": 3}', '{"step": 4}']
