"""Run directories get their own names, records come newest first, and only real runs are continued."""

from __future__ import annotations

import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from launcher.checkpoints import damage, last_checkpoint, publish, seal, set_torn_aside
from launcher.documents import to_json, write_document
from launcher.errors import ConfigError
from launcher.job import Attention, Checkpointing, JobSpec, Loss, Method, Optimizer, Precision
from launcher.memory import (
    Category,
    HeldMemory,
    MeasuredPhase,
    MemoryEstimate,
    MemoryMeasurement,
    Phase,
    PhasePeak,
    StepShape,
)
from launcher.plan import Plan
from launcher.run import ledger_file
from launcher.run.ledger import (
    find_records,
    new_run_dir,
    note_replan,
    previous_run,
    read_replans,
    write_record,
)
from launcher.run.ledger_file import LOCAL, NAME, file_system, read_rows
from launcher.run_paths import RunPaths
from launcher.run_record import Replan, RunRecord, Status, WorkerOrder, WorkerOutcome

NOW = datetime(2026, 11, 3, 9, 5, 7, tzinfo=UTC)
PLAN = Plan(
    method=Method.LORA,
    rank=8,
    max_length=64,
    micro_batch_size=2,
    gradient_accumulation_steps=1,
    activation_checkpointing=Checkpointing.NONE,
    attention=Attention.SDPA,
    loss=Loss.PLAIN,
    optimizer=Optimizer.ADAMW_TORCH_FUSED,
    precision=Precision.FP32,
)
ESTIMATE = MemoryEstimate(
    phases=(PhasePeak(Phase.TRAIN_STEP, 10, {Category.PARAMETERS: 10}),),
    resident_bytes={Category.PARAMETERS: 10},
    context_bytes=3,
)
RECORD = RunRecord(
    run_dir="runs/a",
    recipe="tiny",
    model="models/tiny",
    hardware="cpu",
    started="2026-11-03T09:05:07+00:00",
    plan=PLAN,
    predicted=ESTIMATE,
    predicted_as_run=None,
    measured=MemoryMeasurement(
        rank=0,
        meter="cpu",
        phases=(MeasuredPhase(Phase.TRAIN_STEP, 11, None, None),),
        resident_bytes={Category.PARAMETERS: 10},
        shapes=(StepShape(2, 64),),
    ),
    outcome=WorkerOutcome(Status.DONE, "", 3, 2.0, 1.0, 4.5, 100.0, None, 1),
    versions={"torch": "2.13.0"},
)
ORDER = WorkerOrder(job=JobSpec(), plan=PLAN, predicted=ESTIMATE, weights="models/tiny", converted="")


def make_record(root: Path, started: str) -> RunRecord:
    """Writes a record that differs by its start."""
    record = replace(RECORD, run_dir=str(root), started=started)
    write_record(RunPaths(root), record)
    return record


# ------------------------------------------------------------------------------------------------------ names


def test_a_run_dir_is_named_by_utc_time_and_recipe(tmp_path: Path) -> None:
    assert new_run_dir(tmp_path, "llama_lora", NOW) == tmp_path / "20261103T090507Z-llama_lora"
    elsewhere = NOW.astimezone(timezone(timedelta(hours=9)))
    assert new_run_dir(tmp_path, "llama_lora", elsewhere).name == "20261103T090507Z-llama_lora"


def test_a_name_that_is_taken_is_not_given_again(tmp_path: Path) -> None:
    first = new_run_dir(tmp_path, "x", NOW)
    first.mkdir()
    second = new_run_dir(tmp_path, "x", NOW)
    second.mkdir()
    third = new_run_dir(tmp_path, "x", NOW)
    assert [path.name.rpartition("-")[2] for path in (first, second, third)] == ["x", "2", "3"]
    assert not third.exists()


@pytest.mark.parametrize(
    ("recipe", "ending"), [("", "Z-job"), ("a/b c", "Z-a-b-c"), ("../..", "Z-job"), ("größe", "Z-größe")]
)
def test_a_recipe_cannot_leave_the_folder(recipe: str, ending: str, tmp_path: Path) -> None:
    path = new_run_dir(tmp_path, recipe, NOW)
    assert path.parent == tmp_path
    assert path.name.endswith(ending)


# ---------------------------------------------------------------------------------------------------- records


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    record = make_record(tmp_path / "a", RECORD.started)
    assert find_records(tmp_path / "a").records == (record,)


def test_records_come_newest_first_whatever_their_zone(tmp_path: Path) -> None:
    oldest = make_record(tmp_path / "c", "2026-11-03T09:00:00+00:00")
    middle = make_record(tmp_path / "a", "2026-11-03T18:30:00.5+09:00")
    newest = make_record(tmp_path / "b", "2026-11-03T10:00:00Z")
    found = find_records(tmp_path)
    assert found.records == (newest, middle, oldest)
    assert found.notes == ()


@pytest.mark.parametrize("damage", ["", "{", '{"run_dir": "x"}', "\xff"])
def test_a_damaged_record_is_noted_and_left_out(damage: str, tmp_path: Path) -> None:
    good = make_record(tmp_path / "good", RECORD.started)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "record.json").write_bytes(damage.encode("latin-1"))
    found = find_records(tmp_path)
    assert found.records == (good,)
    assert len(found.notes) == 1
    assert str(tmp_path / "bad" / "record.json") in found.notes[0]
    assert "\n" not in found.notes[0]


def test_a_start_that_is_no_time_is_noted(tmp_path: Path) -> None:
    make_record(tmp_path / "a", "yesterday")
    found = find_records(tmp_path)
    assert found.records == ()
    assert "yesterday" in found.notes[0]


def test_a_run_without_a_record_is_noted_and_other_folders_are_not(tmp_path: Path) -> None:
    write_document(RunPaths(tmp_path / "unfinished").worker, ORDER)
    write_document(RunPaths(tmp_path / ".x.12.partial").worker, ORDER)
    (tmp_path / "notes").mkdir()
    (tmp_path / "file.txt").write_text("")
    found = find_records(tmp_path)
    assert found.records == ()
    assert len(found.notes) == 1
    assert "unfinished" in found.notes[0]


def test_no_folder_no_runs(tmp_path: Path) -> None:
    assert find_records(tmp_path / "runs").records == ()


# ----------------------------------------------------------------------------------------------------- ledger

WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
from launcher.documents import from_json
from launcher.run.ledger import write_record
from launcher.run_paths import RunPaths
from launcher.run_record import RunRecord
record = from_json(RunRecord, sys.stdin.read())
print("ready", flush=True)
number = 0
while number < int(sys.argv[3]):
    root = Path(sys.argv[1]) / f"{sys.argv[2]}-{number}"
    write_record(RunPaths(root), replace(record, run_dir=str(root)))
    number += 1
"""


def writer(folder: Path, name: str, num_records: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), name, str(num_records)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    child.stdin.write(to_json(RECORD))
    child.stdin.close()
    return child


def test_eight_launches_write_at_once(tmp_path: Path) -> None:
    children = [writer(tmp_path, f"writer{number}", 10) for number in range(8)]
    assert [child.wait(120) for child in children] == [0] * 8
    for child in children:
        child.stdout.close()  # type: ignore[union-attr]  # it is a pipe
    assert len(read_rows(tmp_path)) == 80
    found = find_records(tmp_path)
    assert len(found.records) == 80 and found.notes == ()


def test_a_kill_in_the_middle_of_a_write_loses_nothing_that_was_written(tmp_path: Path) -> None:
    for number in range(3):
        child = writer(tmp_path, f"killed{number}", 1_000_000)
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        time.sleep(0.2 + 0.05 * number)
        child.kill()
        child.wait()
        child.stdout.close()
    rows = read_rows(tmp_path)
    on_disk = {str(path.parent) for path in tmp_path.glob("*/record.json")}
    missing = on_disk - {row.run_dir for row in rows}
    assert len(rows) > 10 and len(missing) <= 3, "of each writer at most the record that was on its way"
    assert {record.run_dir for record in find_records(tmp_path).records} == on_disk
    assert {row.run_dir for row in read_rows(tmp_path)} == on_disk, "what was missing has been taken in"


def test_the_ledger_remembers_runs_whose_directories_are_gone(tmp_path: Path) -> None:
    record = make_record(tmp_path / "a", RECORD.started)
    shutil.rmtree(tmp_path / "a")
    assert find_records(tmp_path).records == (record,)


def test_an_older_schema_is_taken_over(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / NAME)) as connection:
        connection.execute("create table runs (run_dir text, record text, remark text)")
        connection.execute("insert into runs values ('/gone', ?, 'old')", (to_json(RECORD),))
        connection.commit()
    record = make_record(tmp_path / "a", "2027-01-01T00:00:00+00:00")
    assert find_records(tmp_path).records == (record, RECORD)


def test_a_newer_schema_is_left_alone(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / NAME)) as connection:
        connection.execute("pragma user_version=99")
        connection.commit()
    before = (tmp_path / NAME).read_bytes()
    record = make_record(tmp_path / "a", RECORD.started)
    found = find_records(tmp_path)
    assert found.records == (record,) and "schema 99" in found.notes[0]
    assert (tmp_path / NAME).read_bytes() == before


def test_a_damaged_ledger_is_set_aside_and_made_anew(tmp_path: Path) -> None:
    record = make_record(tmp_path / "a", RECORD.started)
    for file in tmp_path.glob(NAME + "*"):
        file.unlink()
    (tmp_path / NAME).write_bytes(b"no database" * 1000)
    found = find_records(tmp_path)
    assert found.records == (record,) and "set aside" in found.notes[0]
    assert [row.run_dir for row in read_rows(tmp_path)] == [str(tmp_path / "a")]
    assert find_records(tmp_path).notes == ()


def limited_writer(folder: Path, name: str, limit_bytes: int) -> subprocess.CompletedProcess[str]:
    """Writes forty records in a process whose files may be so long: what writes more fails, as on a full disk."""
    command = [sys.executable, "-c", WRITER, str(folder), name, "40"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    return subprocess.run(
        command, input=to_json(RECORD), capture_output=True, text=True, check=False, preexec_fn=limit
    )


def test_a_ledger_that_may_grow_no_more_costs_no_run(tmp_path: Path) -> None:
    done = limited_writer(tmp_path, "full", 40 << 10)
    assert done.returncode == 0, done.stderr
    assert 0 < len(read_rows(tmp_path)) < 40
    found = find_records(tmp_path)
    assert len(found.records) == len(read_rows(tmp_path)) == 40 and found.notes == ()


@pytest.fixture
def unwritable() -> Iterator[Callable[[Path], None]]:
    """Makes a file or a folder one that can't be written, for root too."""
    mounted: list[Path] = []

    def protect(place: Path) -> None:
        if os.geteuid() != 0:
            place.chmod(0o500 if place.is_dir() else 0o400)
            return
        for options in (["--bind"], ["-o", "remount,bind,ro"]):
            command = ["mount", *options, str(place), str(place)]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                pytest.skip("root writes everywhere but in what is mounted, and may not mount")
            if options == ["--bind"]:
                mounted.append(place)

    yield protect
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_ledger_that_cannot_be_written_is_read_and_left_alone(
    what: str, tmp_path: Path, unwritable: Callable[[Path], None]
) -> None:
    folder = tmp_path / "runs"
    gone = make_record(folder / "gone", RECORD.started)
    shutil.rmtree(folder / "gone")
    record = replace(RECORD, run_dir=str(folder / "a"), started="2027-01-01T00:00:00+00:00")
    write_document(RunPaths(folder / "a").record, record)
    before = (folder / NAME).read_bytes()
    unwritable(folder if what == "folder" else folder / NAME)
    found = find_records(folder)
    assert found.records == (record, gone) and found.notes == ()
    if what == "file":
        newest = make_record(folder / "b", "2027-02-01T00:00:00+00:00")
        assert find_records(folder).records == (newest, record, gone)
    assert (folder / NAME).read_bytes() == before
    assert list(folder.glob("*.damaged*")) == []


def test_a_ledger_that_others_hold_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make_record(tmp_path / "a", RECORD.started)
    monkeypatch.setattr(ledger_file, "BUSY_SECONDS", 0.1)
    with closing(sqlite3.connect(tmp_path / NAME)) as holder:
        holder.execute("pragma locking_mode=exclusive")
        holder.execute("begin exclusive")
        found = find_records(tmp_path)
    assert found.records == (record,) and "only runs whose directories are there" in found.notes[0]
    assert (tmp_path / NAME).is_file() and list(tmp_path.glob("*.damaged*")) == []


def test_a_ledger_of_several_machines_is_not_written_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one that was, when nobody else was known to write it."""
    first = make_record(tmp_path / "a", RECORD.started)
    assert file_system(tmp_path / "not" / "there") == file_system(tmp_path) in LOCAL, (
        "else this test is of no use"
    )
    assert file_system(Path("/proc/self")) == "proc"
    for local, mode in ((LOCAL, "wal"), (frozenset(), "delete")):
        monkeypatch.setattr(ledger_file, "LOCAL", local)
        second = make_record(tmp_path / "b", "2027-01-01T00:00:00+00:00")
        with closing(sqlite3.connect(tmp_path / NAME)) as connection:
            assert connection.execute("pragma journal_mode").fetchone() == (mode,)
        assert find_records(tmp_path).records == (second, first)


# ----------------------------------------------------------------------------------------------------- resume


def make_checkpoint(paths: RunPaths, steps: int, finished: bool = True) -> None:
    """Makes a folder that looks like a checkpoint of the trainer."""
    folder = paths.checkpoints / f"checkpoint-{steps}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    if finished:
        seal(folder)


def test_a_run_with_a_checkpoint_gives_back_its_order(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    write_document(paths.worker, ORDER)
    make_checkpoint(paths, 5)
    assert previous_run(tmp_path) == ORDER


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_a_folder_that_is_no_run_cannot_be_continued(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=f"{name}` is not a run directory"):
        previous_run(tmp_path / name)


def test_a_run_without_a_checkpoint_begins_anew_unless_it_is_done(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    write_document(paths.worker, ORDER)
    (paths.checkpoints / "checkpoint-last").mkdir(parents=True)
    assert previous_run(tmp_path) == ORDER
    write_record(paths, RECORD)
    assert RECORD.outcome.status is Status.DONE
    with pytest.raises(ConfigError, match="is done, and holds no whole checkpoint"):
        previous_run(tmp_path)
    make_checkpoint(paths, 3)
    assert previous_run(tmp_path) == ORDER


def test_torn_checkpoints_are_passed_over(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    write_document(paths.worker, ORDER)
    make_checkpoint(paths, 10, finished=False)
    assert last_checkpoint(paths.checkpoints) is None
    for steps in (7, 8, 9):
        make_checkpoint(paths, steps)
    assert previous_run(tmp_path) == ORDER
    (paths.checkpoints / "checkpoint-9" / "trainer_state.json").write_text("[]")  # as long as it was
    (paths.checkpoints / ".partial" / "checkpoint-11").mkdir(parents=True)
    notes = set_torn_aside(paths.checkpoints)
    assert [note.partition(":")[0] for note in notes] == [
        "passing over checkpoint-10",
        "passing over checkpoint-9",
        "removed torn-checkpoint-9",
    ]
    assert "not written to the end" in notes[0] and "does not match its digest" in notes[1]
    left = sorted(path.name for path in paths.checkpoints.iterdir())
    assert left == ["checkpoint-7", "checkpoint-8", "torn-checkpoint-10"]
    assert last_checkpoint(paths.checkpoints) == paths.checkpoints / "checkpoint-8"
    assert set_torn_aside(paths.checkpoints) == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "rng_state.pth").unlink(), "rng_state.pth is missing"),
        (lambda folder: (folder / "rng_state.pth").write_text("12"), "has 2 bytes, not 3"),
        (lambda folder: (folder / "seal.json").write_text("{"), "can't be read"),
        (lambda folder: (folder / "seal.json").unlink(), "not written to the end"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_said(
    change: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    (tmp_path / "rng_state.pth").write_text("123")
    seal(tmp_path)
    assert damage(tmp_path) == ""
    change(tmp_path)
    assert words in damage(tmp_path, digests=False)


def test_a_checkpoint_takes_its_place_at_once(tmp_path: Path) -> None:
    for text in ("first", "second"):  # a run that went back comes to the same step again
        partial = tmp_path / ".partial" / "checkpoint-3"
        partial.mkdir(parents=True)
        (partial / "state").write_text(text)
        seal(partial)
        place = publish(partial, tmp_path)
        assert (place / "state").read_text() == text and damage(place) == ""
        assert not partial.exists()


@pytest.mark.parametrize("is_sealed", [True, False])
def test_a_kill_between_two_checkpoints_of_one_step_loses_neither(is_sealed: bool, tmp_path: Path) -> None:
    """What a kill leaves between the two renames of `publish`."""
    for name in ("checkpoint-3", "replaced-checkpoint-3"):
        folder = tmp_path / ".partial" / name
        folder.mkdir(parents=True)
        (folder / "state").write_text(name)
        if is_sealed or name != "checkpoint-3":
            seal(folder)
    assert set_torn_aside(tmp_path) == ()
    last = last_checkpoint(tmp_path)
    assert last == tmp_path / "checkpoint-3" and damage(last) == ""
    assert (last / "state").read_text() == ("checkpoint-3" if is_sealed else "replaced-checkpoint-3")
    assert not (tmp_path / ".partial").exists()


@pytest.mark.parametrize("left", [b"", b'{"job": {}}', b"\xff\0", b"[1"])
def test_a_damaged_order_is_named_with_what_is_still_whole(left: bytes, tmp_path: Path) -> None:
    """A power loss may leave a file empty."""
    paths = RunPaths(tmp_path)
    make_checkpoint(paths, 5)
    paths.worker.write_bytes(left)
    with pytest.raises(ConfigError, match=r"worker.json` can't be read: .*; checkpoint-5 is whole") as caught:
        previous_run(tmp_path)
    assert "\n" not in caught.value.message and "job.json" in caught.value.hint


def test_a_damaged_record_keeps_nobody_from_going_on(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    write_document(paths.worker, ORDER)
    paths.record.write_bytes(b"")
    assert previous_run(tmp_path) == ORDER


def test_recoveries_are_added_up_and_damage_costs_no_more_than_them(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    held = HeldMemory(100, None, None, 200, {Category.PARAMETERS: 60})
    first = Replan(
        Phase.EVALUATION, "can't allocate", False, PLAN, PLAN, "evaluation.batch_size 4 -> 2", 3, held
    )
    second = replace(first, phase=None, held=None, from_step=5)
    assert read_replans(paths) == ()
    note_replan(paths, first)
    note_replan(paths, second)
    assert read_replans(paths) == (first, second)
    paths.replans.write_bytes(b"")
    assert read_replans(paths) == ()
    note_replan(paths, first)
    assert read_replans(paths) == (first,)
