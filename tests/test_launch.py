"""Run directories are written whole, and no end of the training process leaves anything running.

The training process is played by small Python programs; each gets the run directory as `run`.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from launcher.checkpoints import seal
from launcher.cluster import Cluster, LaunchSpec
from launcher.documents import read_document, to_json, write_text
from launcher.errors import DataError, Interrupted, LauncherError, LaunchError, WorkerOutOfMemory
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import Attention, Checkpointing, Engine, JobSpec, Loss, Method, Optimizer, Precision
from launcher.memory import Category, MemoryEstimate, Phase, PhasePeak
from launcher.plan import Plan
from launcher.run import endings, launch, node, supervise
from launcher.run.endings import left_nothing, log_tail, raise_for_outcome
from launcher.run.launch import (
    complete_run,
    discard_run,
    launch_worker,
    prepare_run,
    require_unused,
    rewrite_run,
)
from launcher.run.lock import sole_launcher, works_on
from launcher.run_paths import RunPaths
from launcher.run_record import WORKER_MARK, Status, WorkerOrder, WorkerOutcome
from tests.tiny_job import tiny_order

DONE = WorkerOutcome(Status.DONE, "", 3, 2.0, 1.0, 4.5, 100.0, 0.5, 1)
ORDER = WorkerOrder(
    job=JobSpec(hardware=HardwareSpec(name="cpu", kind=DeviceKind.CPU), launch=LaunchSpec(rehearse=False)),
    plan=Plan(
        method=Method.FULL,
        rank=0,
        max_length=64,
        micro_batch_size=2,
        gradient_accumulation_steps=1,
        activation_checkpointing=Checkpointing.NONE,
        attention=Attention.SDPA,
        loss=Loss.PLAIN,
        optimizer=Optimizer.SGD,
        precision=Precision.FP32,
    ),
    predicted=MemoryEstimate((PhasePeak(Phase.TRAIN_STEP, 1, {Category.INPUTS: 1}),), {}, 0),
    weights="",
    converted="",
)
PROGRAM = f"""
import os, pathlib, signal, subprocess, sys, time
run = pathlib.Path(sys.argv[1])
def report(line):
    sys.stderr.write({WORKER_MARK!r} + line + "\\n")
    sys.stderr.flush()
def here():
    (run / "worker.rank0.pid").write_text(str(os.getpid()))
def end(outcome={to_json(DONE)!r}):
    (run / "outcome.rank0.json").write_text(outcome)
(run / "group").write_text(str(os.getpgid(0)))
"""
INTERRUPTED = replace(DONE, status=Status.INTERRUPTED, message="stopped after step 3; a checkpoint was saved")


@dataclass
class Stage:
    """A prepared run, and what was shown of it."""

    paths: RunPaths
    monkeypatch: pytest.MonkeyPatch
    shown: list[str] = field(default_factory=list)
    on_line: Callable[[str], None] = lambda line: None

    def play(self, program: str, grace_seconds: float = 30.0) -> WorkerOutcome:
        """Launches a program as the worker."""
        command = (sys.executable, "-c", PROGRAM + textwrap.dedent(program), str(self.paths.root))
        return self.launch(command, grace_seconds)

    def launch(self, command: tuple[str, ...], grace_seconds: float = 30.0) -> WorkerOutcome:
        """Launches a command as the worker, and checks that nothing of its group remains."""
        self.monkeypatch.setattr(node, "worker_command", lambda paths, plan, node: command)
        try:
            return launch_worker(self.paths, ORDER, self._show, grace_seconds)
        finally:
            if (self.paths.root / "group").exists():
                assert members(int((self.paths.root / "group").read_text())) == []

    def _show(self, line: str) -> None:
        self.shown.append(line)
        self.on_line(line)


def members(group: int) -> list[str]:
    """The processes of a group, without those that have ended and wait to be collected."""
    table = subprocess.run(
        ["ps", "-A", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True
    )
    rows = [line.split(None, 2) for line in table.stdout.splitlines()]
    return [" ".join(row) for row in rows if row[0] == str(group) and not row[1].startswith("Z")]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """A run directory with a name that needs quoting, and an interrupt that is heeded."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    paths = RunPaths(tmp_path / "it's a run\n日本")
    prepare_run(paths, ORDER, {"plan": 1})
    yield Stage(paths, monkeypatch)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, previous)


def interrupt(number: int = signal.SIGINT) -> None:
    """What the terminal does to this process."""
    os.kill(os.getpid(), number)


# ----------------------------------------------------------------------------------------- the run directory


def test_a_run_directory_appears_whole(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "runs" / "one")
    prepare_run(paths, ORDER, {"plan": {"rank": 0}})
    names = {"job.json", "plan.json", "worker.json", "accelerate.yaml", "command.sh"}
    assert {file.name for file in paths.root.iterdir()} == names
    assert [folder.name for folder in paths.root.parent.iterdir()] == ["one"]
    assert read_document(paths.worker, WorkerOrder) == ORDER
    assert read_document(paths.job, JobSpec) == ORDER.job
    assert os.access(paths.command, os.X_OK)
    assert str(paths.accelerate_config) in paths.command.read_text()


def test_an_empty_folder_is_filled_and_stays_itself(tmp_path: Path) -> None:
    inode = tmp_path.stat().st_ino
    prepare_run(RunPaths(tmp_path), ORDER, {})
    assert RunPaths(tmp_path).worker.exists()
    assert tmp_path.stat().st_ino == inode


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    require_unused(tmp_path)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(LaunchError, match="is not empty"):
        require_unused(tmp_path)
    with pytest.raises(LaunchError, match="is not empty") as caught:
        prepare_run(RunPaths(tmp_path), ORDER, {})
    assert "resume=" in caught.value.hint
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(LaunchError, match="can't be written"):
            prepare_run(RunPaths(root), ORDER, {})


@pytest.mark.parametrize("exists", [True, False])
def test_what_fails_halfway_leaves_nothing(
    exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> str:
        raise OSError("no space left on device")

    monkeypatch.setattr(launch, "accelerate_config", full)
    root = tmp_path / "run"
    if exists:
        root.mkdir()
    with pytest.raises(LaunchError, match="no space left"):
        prepare_run(RunPaths(root), ORDER, {})
    assert list(tmp_path.rglob("*")) == ([root] if exists else [])


def test_of_two_launches_for_one_folder_one_is_refused(tmp_path: Path) -> None:
    """Each finds the folder empty, or not there, and none has the other's files."""
    program = """
        import json, sys, time
        from pathlib import Path
        from launcher.documents import from_json
        from launcher.errors import LaunchError
        from launcher.run.launch import prepare_run
        from launcher.run_paths import RunPaths
        from launcher.run_record import WorkerOrder
        order = from_json(WorkerOrder, sys.stdin.read())
        time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
        try:
            prepare_run(RunPaths(Path(sys.argv[1])), order, {})
        except LaunchError as failure:
            sys.exit(failure.message)
    """
    begin = str(time.time() + 4)
    for name in ("there", "new"):
        if name == "there":
            (tmp_path / name).mkdir()
        command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / name), begin]
        pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        racers = [subprocess.Popen(command, **pipes) for _ in range(3)]  # type: ignore[call-overload]
        said = [racer.communicate(to_json(ORDER))[1] for racer in racers]
        assert sorted(racer.returncode for racer in racers) == [0, 1, 1], said
        assert read_document(RunPaths(tmp_path / name).worker, WorkerOrder) == ORDER
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_run_directory_has_one_launcher(stage: Stage) -> None:
    """tests/test_end_to_end.py has two `launch` commands in one; the lock goes with its process, however that ends."""
    program = """
        import sys, time
        from pathlib import Path
        from launcher.run.lock import sole_launcher
        from launcher.run_paths import RunPaths
        with sole_launcher(RunPaths(Path(sys.argv[1]))):
            print("held", flush=True)
            time.sleep(300)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(stage.paths.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(LaunchError, match=f"another launch, process {holder.pid}"),
            sole_launcher(stage.paths),
        ):
            pass
        holder.kill()
    with sole_launcher(stage.paths):
        assert stage.play("end()") == DONE


def test_what_follows_from_an_order_is_made_again(stage: Stage) -> None:
    """Power may go while a run is rewritten for its next plan; the order is written last."""
    paths, document = stage.paths, {"plan": 1}
    wanted = {file: file.read_bytes() for file in (paths.plan, paths.accelerate_config)}
    untouched = paths.plan.stat().st_mtime_ns
    complete_run(paths, ORDER, document)
    assert paths.plan.stat().st_mtime_ns == untouched
    paths.plan.write_bytes(b"")
    paths.accelerate_config.write_text("num_processes: 7\n")
    complete_run(paths, ORDER, document)
    assert {file: file.read_bytes() for file in wanted} == wanted


def test_a_rewriting_that_ends_anywhere_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file of two machines under DeepSpeed, with a rehearsal, may be the last that was written."""

    def files(root: Path) -> dict[str, bytes]:
        return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}

    network = LaunchSpec(Cluster.MANUAL, "10.0.0.1")
    rehearsing = (
        tiny_order(tmp_path, Engine.DEEPSPEED, 2, num_nodes=2, launch=network),
        tiny_order(tmp_path, Engine.NONE, num_devices=1),
    )
    old, new = (
        replace(order, job=replace(order.job, launch=replace(order.job.launch, rehearse=True)))
        for order in rehearsing
    )
    written = write_text
    for first, second in ((old, new), (new, old)):
        for survivor in range(20):
            paths, left = RunPaths(tmp_path / "run"), [survivor]

            def write(file: Path, text: str, left: list[int] = left) -> None:
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
                written(file, text)

            prepare_run(paths, first, {"of": 1})
            monkeypatch.setattr(launch, "write_text", write)
            try:
                rewrite_run(paths, second, {"of": 2})
            except KeyboardInterrupt:
                is_over = False
            else:
                is_over = True
            monkeypatch.setattr(launch, "write_text", written)
            order = read_document(paths.worker, WorkerOrder)
            document = {"of": 2 if order == second else 1}
            complete_run(paths, order, document)
            found = files(paths.root)
            shutil.rmtree(paths.root)
            prepare_run(paths, order, document)
            assert found == files(paths.root), survivor
            shutil.rmtree(paths.root)
            if is_over:
                break
        assert is_over and survivor > 5


def test_a_lock_that_can_not_be_had_is_one_message(stage: Stage) -> None:
    """As in a folder that is read-only; this can't be written for root either."""
    stage.paths.lock.unlink(missing_ok=True)
    stage.paths.lock.mkdir()
    with pytest.raises(LaunchError, match="can't be written") as caught, sole_launcher(stage.paths):
        pass
    assert caught.value.exit_code == 6 and str(stage.paths.lock) in caught.value.message


def test_workers_of_a_launcher_that_is_gone_are_ended(stage: Stage) -> None:
    """The lock went with the launcher that was killed; its worker trains on."""
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", str(stage.paths.root)])
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    stage.paths.pid(0).write_text(str(orphan.pid))
    while not works_on(orphan.pid, stage.paths.root):  # a program's arguments are there a moment after it
        time.sleep(0.01)
    assert stage.play("end()") == DONE
    orphan.wait(10)
    assert stage.shown == [f"ending process {orphan.pid}: the launcher that started it is gone"]
    stage.paths.pid(0).write_text(str(other.pid))  # numbers are given again
    assert stage.play("end()") == DONE and other.poll() is None
    other.kill()
    other.wait()


# ------------------------------------------------------------------------------------------------ good ends


def test_the_outcome_is_read_and_only_the_workers_own_lines_are_shown(stage: Stage) -> None:
    program = """
        here()
        print("noise on stdout"); report("reading data")
        sys.stderr.write("\\r 10%|#   | 1/10"); report("step 1/2  loss 2.0"); report("ünï")
        os.write(1, b"bytes \\xff\\xfe that are no text\\n")
        os.write(2, b"last words without an end")
        end()
    """
    assert stage.play(program) == DONE
    assert stage.shown == ["reading data", "step 1/2  loss 2.0", "ünï"]
    log = stage.paths.log.read_bytes()
    for part in (
        b"noise on stdout\n",
        b"10%|#",
        b"\xff\xfe",
        b"last words without an end",
        b"reading data\n",
    ):
        assert part in log


def test_much_output_passes(stage: Stage) -> None:
    program = """
        for number in range(20000):
            print("x" * 200)
            if number % 1000 == 0: report(str(number))
        print("y" * 3_000_000, end="")
        sys.stdout.flush(); end()
    """
    stage.play(program)
    assert stage.shown == [str(number) for number in range(0, 20000, 1000)]
    assert stage.paths.log.stat().st_size > 20000 * 201 + 3_000_000


def test_an_outcome_counts_whatever_the_exit_code(stage: Stage) -> None:
    failed = replace(DONE, status=Status.DATA_ERROR, message="no examples\n\nhint: look at data.path")
    outcome = stage.play(f"end({to_json(failed)!r}); sys.exit(5)")
    assert outcome == failed


def test_what_an_earlier_run_left_does_not_count(stage: Stage) -> None:
    stage.paths.outcome(0).write_text(to_json(DONE))
    stage.paths.pid(0).write_text("1")
    stage.paths.log.write_text("from before\n")
    with pytest.raises(LaunchError) as caught:
        stage.play("print('from now'); sys.exit(3)")
    assert "exit code 3" in caught.value.message
    assert "from now" in caught.value.message
    assert "from before" not in caught.value.message
    assert stage.paths.log.read_text().startswith("from before\n")
    assert not stage.paths.pid(0).exists()


@pytest.mark.parametrize("ignores", [False, True])
def test_a_grandchild_is_not_left_behind(
    ignores: bool, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "TERM_GRACE_SECONDS", 1.0)
    program = f"""
        if {ignores}: signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(["sleep", "300"])  # holds the pipe open
        report("started"); end()
    """
    began = time.monotonic()
    assert stage.play(program) == DONE
    assert stage.shown == ["started"]
    assert time.monotonic() - began < 20


# ------------------------------------------------------------------------------------------------- bad ends


def test_a_failure_shows_the_end_of_the_log(stage: Stage) -> None:
    with pytest.raises(LaunchError) as caught:
        stage.play(
            "report('own line')\nfor n in range(30): print('line', n)\nraise ValueError('no such thing')"
        )
    message, hint = caught.value.message, caught.value.hint
    assert "exit code 1" in message
    assert "no such thing" in message
    assert "line 29" in message
    assert "line 9\n" not in message
    assert str(stage.paths.log) in hint


def test_a_kill_is_named_with_its_likely_cause(stage: Stage) -> None:
    with pytest.raises(LaunchError) as caught:
        stage.play("os.kill(os.getpid(), signal.SIGKILL)")
    assert "signal SIGKILL" in caught.value.message
    assert "out-of-memory killer" in caught.value.hint


def test_a_kill_below_accelerate_is_named_too(stage: Stage) -> None:
    program = """
        command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
        raise subprocess.CalledProcessError(subprocess.run(command).returncode, command)
    """  # as accelerate's launcher does
    with pytest.raises(LaunchError) as caught:
        stage.play(program)
    assert "signal SIGKILL" in caught.value.message
    assert "out-of-memory killer" in caught.value.hint


THROWS = """
import ctypes
ctypes.CDLL("libstdc++.so.6")._Znwm(ctypes.c_size_t(1 << 62))  # operator new; nobody catches what it throws
"""


@pytest.mark.parametrize("below", [False, True])
def test_a_process_that_aborts_for_want_of_memory_is_out_of_memory(below: bool, stage: Stage) -> None:
    """Python never learns of it. Below accelerate its launcher's own traceback follows."""
    program = THROWS
    if below:
        program = f"""
        command = [sys.executable, "-c", {program!r}]
        raise subprocess.CalledProcessError(subprocess.run(command).returncode, command)
        """
    with pytest.raises(WorkerOutOfMemory) as caught:
        stage.play(program)
    assert "signal SIGABRT" in caught.value.message and caught.value.exit_code == 4


BITSANDBYTES_FULL = "Error out of memory at line 380 in file /src/csrc/pythonInterface.cpp"
"""bitsandbytes issue 726, and `strings` of libbitsandbytes_cuda128.so (0.50.2): `Error %s at line %d in file %s`."""


@pytest.mark.parametrize(("what", "exit_code"), [("out of memory", 4), ("invalid argument", 6)])
def test_a_library_that_exits_for_want_of_memory_is_out_of_memory(
    what: str, exit_code: int, stage: Stage
) -> None:
    said = BITSANDBYTES_FULL.replace("out of memory", what)
    with pytest.raises(LauncherError, match="exit code 1") as caught:
        stage.play(f"print({said!r}, flush=True)\nos._exit(1)")
    assert caught.value.exit_code == exit_code and said in caught.value.message


@pytest.mark.parametrize(
    ("said", "ended", "exit_code"),
    [
        ("terminate called after throwing an instance of 'std::bad_alloc'", -6, 4),
        ("memory allocation of 4096 bytes failed", -6, 4),
        ("terminate called after throwing an instance of 'std::logic_error'", -6, 6),
        (BITSANDBYTES_FULL, 1, 4),
        ("ImportError: no such module", 1, 6),
    ],
)
def test_of_several_ranks_the_one_that_ended_says_why(
    said: str, ended: int, exit_code: int, tmp_path: Path
) -> None:
    """torchrun's report, as torch 2.13 words it, of a rank that a thread of gloo's ended."""
    paths, plan = RunPaths(tmp_path), replace(ORDER.plan, engine=Engine.DDP, num_devices=2)
    paths.log.write_text(
        f"[rank 1] {said}\n"
        "[rank 0] RuntimeError: Connection closed by peer\n"
        "Root Cause (first observed failure):\n[0]:\n  time      : 2026-11-27_05:00:00\n"
        f"  host      : here\n  rank      : 1 (local_rank: 1)\n  exitcode  : {ended} (pid: 12)\n"
    )
    how = "exit code 1" if ended == 1 else "signal SIGABRT"
    with pytest.raises(LauncherError, match=f"rank 1 on host here ended with {how}") as caught:
        endings.read_outcome(paths, plan, supervise.Ending(1, False, 0))
    assert caught.value.exit_code == exit_code and said in caught.value.message
    if isinstance(caught.value, WorkerOutOfMemory):
        assert pickle.loads(pickle.dumps(caught.value)).rank == 1


def test_a_process_that_aborts_for_another_reason_is_not(stage: Stage) -> None:
    with pytest.raises(LaunchError, match="signal SIGABRT") as caught:
        stage.play("os.abort()")
    assert caught.value.exit_code == 6


def test_a_segmentation_fault_is_named(stage: Stage) -> None:
    with pytest.raises(LaunchError, match="signal SIGSEGV"):
        stage.play("os.kill(os.getpid(), signal.SIGSEGV)")


def test_a_command_that_is_not_there(stage: Stage) -> None:
    with pytest.raises(LaunchError, match="can't be started"):
        stage.launch(("/no/such/python",))


def test_a_damaged_outcome_is_an_error(stage: Stage) -> None:
    with pytest.raises(LaunchError, match="can't be read"):
        stage.play("end('{')")


def test_an_error_in_this_process_ends_the_other(stage: Stage) -> None:
    def fail(line: str) -> None:
        raise BrokenPipeError("nobody reads this")

    stage.on_line = fail
    with pytest.raises(BrokenPipeError):
        stage.play("report('hello'); time.sleep(300)")


# ------------------------------------------------------------------------------------------------ interrupts


SAVES = f"""
    def save(number, frame):
        report("saving"); time.sleep(0.5); end({to_json(INTERRUPTED)!r}); sys.exit(130)
    signal.signal(signal.SIGINT, save)
    here(); report("training"); time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_interrupt_lets_the_worker_save(number: int, stage: Stage) -> None:
    stage.on_line = lambda line: interrupt(number) if line == "training" else None
    ended = Status.TERMINATED if number == signal.SIGTERM else Status.INTERRUPTED
    assert stage.play(SAVES) == replace(INTERRUPTED, status=ended)
    assert stage.shown == ["training", "saving"]


def test_an_interrupt_that_is_raised_counts_as_one(stage: Stage) -> None:
    def press(line: str) -> None:
        if line == "training":
            raise KeyboardInterrupt

    stage.on_line = press
    assert stage.play(SAVES) == INTERRUPTED


def test_an_interrupt_that_arrives_twice_at_once_counts_once(stage: Stage) -> None:
    def press(line: str) -> None:
        if line == "training":
            interrupt()
            interrupt(signal.SIGTERM)

    stage.on_line = press
    assert stage.play(SAVES) == INTERRUPTED


def test_only_the_worker_is_interrupted_not_its_parent(stage: Stage) -> None:
    program = f"""
        worker = subprocess.Popen([sys.executable, "-c", {(PROGRAM + textwrap.dedent(SAVES))!r}, str(run)])
        try: worker.wait()
        except KeyboardInterrupt: report("the parent was interrupted")
    """
    stage.on_line = lambda line: interrupt() if line == "training" else None
    assert stage.play(program) == INTERRUPTED
    assert stage.shown == ["training", "saving"]


def test_before_there_is_a_worker_the_whole_group_is_interrupted(stage: Stage) -> None:
    stage.on_line = lambda line: interrupt()
    with pytest.raises(Interrupted) as caught:
        stage.play("report('importing'); time.sleep(300)")
    assert "no checkpoint" in caught.value.hint


def test_a_process_of_somebody_else_is_not_interrupted(stage: Stage) -> None:
    stranger = subprocess.Popen(["sleep", "300"])
    try:
        stage.on_line = lambda line: interrupt()
        program = f"(run / 'worker.rank0.pid').write_text('{stranger.pid}'); report('hello'); time.sleep(300)"
        with pytest.raises(Interrupted):
            stage.play(program)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


STUBBORN = """
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)
    subprocess.Popen(["sleep", "300"])
    here(); report("training"); time.sleep(300)
"""


def test_the_end_of_the_grace_ends_a_worker_that_ignores_everything(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "TERM_GRACE_SECONDS", 0.5)
    stage.on_line = lambda line: interrupt()
    with pytest.raises(Interrupted):
        stage.play(STUBBORN, grace_seconds=0.5)


def test_the_second_interrupt_does_not_wait(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "TERM_GRACE_SECONDS", 0.5)
    (stage.paths.checkpoints / "checkpoint-3").mkdir(parents=True)
    (stage.paths.checkpoints / "checkpoint-3" / "trainer_state.json").write_text("{}")
    seal(stage.paths.checkpoints / "checkpoint-3")

    def press(line: str) -> None:
        interrupt()
        threading.Timer(2 * supervise.REPEAT_SECONDS, interrupt).start()

    stage.on_line = press
    began = time.monotonic()
    with pytest.raises(Interrupted) as caught:
        stage.play(STUBBORN, grace_seconds=300.0)
    assert time.monotonic() - began < 20
    assert f"resume={stage.paths.root}" in caught.value.hint


def test_another_thread_can_launch(stage: Stage) -> None:
    results: list[WorkerOutcome] = []
    thread = threading.Thread(target=lambda: results.append(stage.play("end()")))
    thread.start()
    thread.join()
    assert results == [DONE]


# -------------------------------------------------------------------------------------------------- outcomes


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (Status.INTERRUPTED, Interrupted),
        (Status.OUT_OF_MEMORY, WorkerOutOfMemory),
        (Status.DATA_ERROR, DataError),
        (Status.FAILED, LaunchError),
    ],
)
def test_each_bad_end_has_its_error(status: Status, kind: type[LauncherError], tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    with pytest.raises(kind) as caught:
        raise_for_outcome(replace(DONE, status=status, message="what happened"), paths)
    assert type(caught.value) is kind
    assert caught.value.message == "what happened"
    assert str(paths.log) in caught.value.hint


def test_the_workers_own_hint_is_kept(tmp_path: Path) -> None:
    outcome = replace(DONE, status=Status.DATA_ERROR, message=str(DataError("row 3 is empty", "look at it")))
    with pytest.raises(DataError) as caught:
        raise_for_outcome(outcome, RunPaths(tmp_path))
    assert caught.value.message == "row 3 is empty"
    assert caught.value.hint == "look at it"  # the log says no more, and may be gone


def test_a_good_end_is_good_only_with_as_many_processes_as_planned(tmp_path: Path) -> None:
    raise_for_outcome(DONE, RunPaths(tmp_path))
    with pytest.raises(LaunchError, match="2 processes took part"):
        raise_for_outcome(replace(DONE, world_size=2), RunPaths(tmp_path))


def test_the_tail_of_a_log_shows_what_was_last_seen(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert log_tail(log) == ()
    log.write_bytes(b"early\n\r 1%\r 2%\r 99%\n\nw\xff\r\n" + b"z" * endings.LOG_TAIL_BYTES + b"\nlast")
    assert log_tail(log)[-1] == "last"
    assert len(log_tail(log)) == 2
    log.write_bytes(b"early\n\r 1%\r 2%\r 99%\n\nw\xff\r\n")
    assert log_tail(log) == ("early", " 99%", "w\ufffd")
    assert log_tail(log, len(b"early\n")) == (" 99%", "w\ufffd")


# ------------------------------------------------------------------------------------ nothing half-done


def test_a_run_that_trained_is_never_discarded(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    prepare_run(paths, ORDER, {})
    bad = replace(DONE, status=Status.DATA_ERROR, steps=0)
    assert left_nothing(bad, paths)
    assert not left_nothing(replace(bad, steps=1), paths) and not left_nothing(DONE, paths)
    paths.metrics.write_text("{}\n")
    assert not left_nothing(bad, paths)
    paths.metrics.unlink()
    checkpoint = paths.checkpoints / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    seal(checkpoint)
    assert not left_nothing(bad, paths)


def test_a_discarded_run_leaves_a_folder_only_where_there_was_one(tmp_path: Path) -> None:
    made, given = RunPaths(tmp_path / "made"), RunPaths(tmp_path / "given")
    given.root.mkdir()
    given.root.chmod(0o2750)
    for paths in (made, given):
        prepare_run(paths, ORDER, {})
        paths.checkpoints.mkdir()
        discard_run(paths, keep_folder=paths is given)
    assert not made.root.exists()
    assert list(given.root.iterdir()) == [] and given.root.stat().st_mode & 0o7777 == 0o2750
    prepare_run(given, ORDER, {})
