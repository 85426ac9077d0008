"""A real memory limit in each phase of a job in turn: does the job still end with the right loss curve?

Each job is shaped so that one phase takes more than all that was before it, once at least. It runs once without a
limit, watched by the kernel's account of the worker (VmData); then again with RLIMIT_DATA between what came before
that visit of the phase and what the visit took. A phase that never takes more (a save) gets its limit when it begins,
between what there is then and what it takes on top, as if another process had taken the rest. What the launcher can
make smaller it makes smaller and goes on; what it can't ends with exit code 4 and that phase's bill, and `launch
resume=<run dir>` without the limit goes on from there: the table says which. Either way the losses must be those of
the first run. A phase that no limit can meet, or that did not run out of memory under it, is not right, and the exit
code is 1.

    python -m scripts.memory_limits                     every phase; prints the table
    python -m scripts.memory_limits --write             also writes docs/accuracy/<date>-memory-limits.json
    python -m scripts.memory_limits --phases merge
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from launcher.checkpoints import last_checkpoint
from launcher.documents import read_document
from launcher.memory import Phase
from launcher.run_paths import RunPaths
from launcher.run_record import RunRecord
from launcher.units import MIB
from scripts.endurance import LAUNCHER, LIBRARIES, ROOT, start
from scripts.small_text import VOCABULARY, write_small_model

STEPS = 4
SHORT, LONG = 40, 1500
"""Bytes of short and long texts; a byte is a token."""
TIMEOUT_SECONDS = 900.0
POLL_SECONDS = 0.001
LEAST_BYTES = 16 * MIB
"""A phase that takes less above what came before it can't be met by a limit: the C library keeps as much in reserve."""
LEAST_INSIDE_BYTES = 1 * MIB
"""The same for a limit that is set when the phase begins: then the reserve is in use."""
CLOSE = 1e-4
"""Losses of two plans may differ so much: sums in another order."""
ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
EAGER = "planner.pin.attention=eager"
"""Attention scores are kept: eight heads x 1,500 x 1,500 floats a layer and text."""


@dataclass(frozen=True)
class Trial:
    """A job shaped so that one phase takes the most."""

    phase: Phase
    """Which one."""
    arguments: tuple[str, ...] = ()
    """What is special about it."""
    lengths: tuple[int, ...] = (SHORT,) * 16
    """Bytes of its texts."""
    held_out: tuple[int, ...] = ()
    """Bytes of the texts that it is evaluated on."""
    stops_first: bool = False
    """Whether it is interrupted after its first checkpoint, and the limit meets its resume."""
    is_met_inside: bool = False
    """Whether the limit is set when the phase begins, for it never takes more than what came before."""


TRIALS = (
    Trial(Phase.LOAD),
    Trial(Phase.RESUME, ("method=full",), stops_first=True),
    Trial(Phase.TRAIN_STEP, (EAGER,), lengths=(SHORT,) * 6 + (LONG,) + (SHORT,) * 9),
    Trial(  # the first step makes the states; a smaller plan would meet them in the next backward pass
        Phase.OPTIMIZER_STEP,
        ("method=full", "planner.pin.micro_batch_size=1", "planner.pin.activation_checkpointing=none"),
    ),
    Trial(
        Phase.EVALUATION,
        (EAGER, "evaluation=held_out", "evaluation.steps=2", "evaluation.batch_size=4"),
        held_out=(LONG,) * 4,
    ),
    Trial(
        Phase.GENERATION,
        (
            "generation=samples",
            "generation.prompt_length=768",
            "generation.max_new_tokens=8",
            "generation.num_prompts=32",
            "generation.batch_size=32",
            "evaluation=held_out",
            "evaluation.steps=2",
            "evaluation.batch_size=1",
        ),
        held_out=(900,) * 32,
    ),
    Trial(Phase.SAVE, ("method=full", "training.optimizer=sgd"), is_met_inside=True),
    Trial(Phase.MERGE, ("method.merge=true", "method.rank=4")),
)


@dataclass(frozen=True)
class Visit:
    """One stay of a worker in a phase, by VmData."""

    phase: Phase
    """Which one."""
    before_bytes: int
    """The highest up to then; 0 where there was nothing before."""
    entry_bytes: int
    """What there was when it began."""
    highest_bytes: int
    """The highest in it."""

    def rise_bytes(self, is_met_inside: bool) -> int:
        """What it takes more than what there was: ever before it, or when it began."""
        return self.highest_bytes - (self.entry_bytes if is_met_inside else self.before_bytes)


@dataclass(frozen=True)
class Outcome:
    """What came of one phase under a limit."""

    phase: Phase
    """Which phase."""
    before_bytes: int
    """What the worker had (VmData, without a limit) before that visit of the phase: at most, or when it began."""
    phase_bytes: int
    """Its highest VmData in the visit."""
    limit_bytes: int | None
    """RLIMIT_DATA of the workers; None where the phase takes too little for a limit to meet it."""
    is_met_inside: bool = False
    """Whether the limit was set when the phase began, and not from the beginning on."""
    tripped: tuple[str, ...] = ()
    """Phases in which memory ran out."""
    changes: tuple[str, ...] = ()
    """What the launcher changed, in order."""
    exit_code: int | None = None
    """The launcher's exit code under the limit."""
    resumed: bool = False
    """Whether the limit had to be lifted for the job to end."""
    loss_difference: float | None = None
    """Largest difference of a step's loss from the run without a limit."""

    @property
    def is_right(self) -> bool:
        """Whether memory ran out where it should, and nowhere else, and the job ended with the right losses."""
        is_close = self.loss_difference is not None and self.loss_difference <= CLOSE
        return set(self.tripped) == {self.phase.value} and is_close


def command(trial: Trial, folder: Path, run_dir: Path) -> list[str]:
    """The command line of a trial's job."""
    texts = write_texts(folder / f"{trial.phase.value}.jsonl", trial.lengths)
    job = [
        f"model.path={folder}",
        f"data.path={texts}",
        "data.format=text",
        "data.max_length=1536",
        "data.packing=false",
        "training.global_batch_size=4",
        f"training.max_steps={STEPS}",
        "training.save_steps=1",
        "training.save_total_limit=2",
        "training.precision=fp32",
        "training.report_to=[]",
        "hardware=cpu",
        "hardware.memory_bytes=1000000000000",
        f"trace_cache={folder / 'traces'}",
        f"run_dir={run_dir}",
        "launch.rehearse=false",
        "launch.max_replans=4",
        *trial.arguments,
    ]
    if trial.held_out:
        job.append(f"evaluation.path={write_texts(folder / 'held_out.jsonl', trial.held_out)}")
    return [*LAUNCHER, *job]


def write_texts(file: Path, lengths: Sequence[int]) -> Path:
    """Texts of so many bytes, the end of a text counted."""
    rows = [{"text": (f"{number} " * length)[: length - 1]} for number, length in enumerate(lengths)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def data_bytes(pid: int) -> int:
    """VmData of a process: what RLIMIT_DATA limits. 0 when it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmData:"):
                return int(line.split()[1]) << 10
    return 0


def watch(
    child: subprocess.Popen[bytes], paths: RunPaths, limit_bytes: int | None, limits_in: Phase | None
) -> list[Visit]:
    """Follows a launcher to its end: the worker's stays in phases. Its workers get the limit as they appear.

    Args:
        child: The launcher.
        paths: Its run directory.
        limit_bytes: The limit; None: none.
        limits_in: The phase at whose beginning the first worker gets it, and no other one; None: all get it, at once.
    """
    visits: list[Visit] = []
    limited, deadline = 0, time.monotonic() + TIMEOUT_SECONDS
    while child.poll() is None:
        if time.monotonic() > deadline:
            raise SystemExit(f"{paths.root} did not end within {TIMEOUT_SECONDS:.0f} s")
        with suppress(OSError, ValueError):  # no worker yet, or no more
            pid = int(paths.pid(0).read_text(encoding="ascii"))
            phase = Phase(paths.phase(0).read_text(encoding="ascii"))
            is_due = pid != limited if limits_in is None else not limited and phase is limits_in
            if limit_bytes is not None and is_due:
                resource.prlimit(pid, resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
                limited = pid
            if size := data_bytes(pid):
                note(visits, phase, size)
        time.sleep(POLL_SECONDS)
    return visits


def note(visits: list[Visit], phase: Phase, size: int) -> None:
    """Adds a reading to the stay that lasts, or begins another."""
    if visits and visits[-1].phase is phase:
        visits[-1] = replace(visits[-1], highest_bytes=max(size, visits[-1].highest_bytes))
    else:
        before_bytes = max((visit.highest_bytes for visit in visits), default=0)
        visits.append(Visit(phase, before_bytes, size, size))


def run(
    arguments: list[str],
    paths: RunPaths,
    log: Path,
    limit_bytes: int | None = None,
    limits_in: Phase | None = None,
) -> tuple[int, list[Visit]]:
    """Runs a launcher: its exit code, and the worker's stays in phases."""
    child = start(arguments, log)
    visits = watch(child, paths, limit_bytes, limits_in)
    return child.returncode, visits


def stop_after_first_checkpoint(arguments: list[str], paths: RunPaths, log: Path) -> None:
    """Starts a job and interrupts it when it has a checkpoint."""
    child = start(arguments, log)
    while child.poll() is None and last_checkpoint(paths.checkpoints) is None:
        time.sleep(POLL_SECONDS)
    child.send_signal(signal.SIGINT)
    child.wait(TIMEOUT_SECONDS)


def losses(paths: RunPaths) -> dict[int, float]:
    """Loss of each step; of a step that was trained twice the last one."""
    lines = map(json.loads, paths.metrics.read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def attempt(trial: Trial, folder: Path) -> Outcome:
    """Runs a trial without and with its limit, and compares."""
    free, tight = (RunPaths(folder / f"{trial.phase.value}-{name}") for name in ("free", "tight"))
    log = folder / f"{trial.phase.value}.log"
    arguments = {paths: command(trial, folder, paths.root) for paths in (free, tight)}
    if trial.stops_first:
        for paths in (free, tight):
            stop_after_first_checkpoint(arguments[paths], paths, log)
            arguments[paths] = [*LAUNCHER, f"resume={paths.root}"]
    code, visits = run(arguments[free], free, log)
    if code:
        raise SystemExit(log.read_text(encoding="utf-8", errors="replace")[-4000:])
    inside = trial.is_met_inside
    stays = [visit for visit in visits if visit.phase is trial.phase]
    met = max(stays, key=lambda visit: visit.rise_bytes(inside))
    before_bytes = met.entry_bytes if inside else met.before_bytes
    before_bytes = before_bytes or base_bytes(folder, met.highest_bytes)
    outcome = Outcome(trial.phase, before_bytes, met.highest_bytes, None, inside)
    if met.highest_bytes - before_bytes < (LEAST_INSIDE_BYTES if inside else LEAST_BYTES):
        return outcome
    limit = (before_bytes + met.highest_bytes) // 2
    code, _ = run(arguments[tight], tight, log, limit, trial.phase if inside else None)
    record = read_document(tight.record, RunRecord)
    tripped = [replan.phase.value if replan.phase else "unknown" for replan in record.replans]
    if code and record.outcome.phase is not None:
        tripped.append(record.outcome.phase.value)
    outcome = replace(
        outcome,
        limit_bytes=limit,
        tripped=tuple(tripped),
        changes=tuple(replan.change for replan in record.replans),
        exit_code=code,
        resumed=code == 4,
    )
    if code == 4:
        code, _ = run([*LAUNCHER, f"resume={tight.root}"], tight, log)
    if code:
        raise SystemExit(log.read_text(encoding="utf-8", errors="replace")[-4000:])
    expected, found = losses(free), losses(tight)
    if expected.keys() != found.keys():
        raise SystemExit(f"steps {sorted(found)} were trained, not {sorted(expected)}")
    return replace(outcome, loss_difference=max(abs(found[step] - expected[step]) for step in expected))


def base_bytes(folder: Path, loading_bytes: int) -> int:
    """What a worker has before it loads: its highest while loading, less the weights."""
    return loading_bytes - sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--phases", nargs="*", type=Phase, default=[trial.phase for trial in TRIALS])
    parser.add_argument("--write", action="store_true", help="write docs/accuracy/<date>-memory-limits.json")
    options = parser.parse_args()
    outcomes = []
    print(
        "| phase | before, MiB | phase, MiB | limit, MiB | exit | ran out in | what was changed | loss off by |"
    )
    print("|---|--:|--:|--:|--:|---|---|--:|")
    with tempfile.TemporaryDirectory(prefix="memory-limits-") as name:
        folder = Path(name)
        write_small_model(folder, ARCHITECTURE, "text", 1)
        for trial in TRIALS:
            if trial.phase in options.phases:
                outcomes.append(attempt(trial, folder))
                print(row(outcomes[-1]), flush=True)
    if options.write:
        now = datetime.now(UTC).date().isoformat()
        document = {
            "date": now,
            "versions": {name: version(name) for name in LIBRARIES},
            "python": sys.version.split()[0],
            "phases": [asdict(outcome) for outcome in outcomes],
        }
        file = ROOT / "docs" / "accuracy" / f"{now}-memory-limits.json"
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    unmet = [outcome.phase.value for outcome in outcomes if not outcome.tripped]
    wrong = [outcome.phase.value for outcome in outcomes if outcome.tripped and not outcome.is_right]
    if unmet or wrong:
        raise SystemExit(
            f"never ran out of memory: {', '.join(unmet) or 'none'}; not as it should be: {', '.join(wrong) or 'none'}"
        )


def row(outcome: Outcome) -> str:
    """One line of the table."""
    cells = [
        outcome.phase.value,
        f"{outcome.before_bytes / MIB:.0f}",
        f"{outcome.phase_bytes / MIB:.0f}",
        "none meets it" if outcome.limit_bytes is None else f"{outcome.limit_bytes / MIB:.0f}",
        "" if outcome.exit_code is None else str(outcome.exit_code),
        ", ".join(outcome.tripped) or "nothing",
        "; ".join(outcome.changes)
        or ("nothing can be; went on without the limit" if outcome.resumed else ""),
        "" if outcome.loss_difference is None else f"{outcome.loss_difference:.1e}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
