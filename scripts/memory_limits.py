"""A real memory limit in each phase of a job in turn: does the job still end with the right loss curve?

Each job is shaped so that one phase takes more than all that was before it, once at least. It runs once without a
limit, watched by the kernel's account of each rank (VmData); then again with RLIMIT_DATA between what came before that
visit of the phase and what the visit took. Where the launcher can make the phase smaller, the same job made as small
is watched too, the limit lies between the two, and the job has to end under it. What nothing makes smaller ends with
exit code 4 and that phase's bill, and `launch resume=<run dir>` without the limit goes on from the last whole
checkpoint: the table says which. Either way the losses must be those of the first run. A phase that no limit can meet,
or that did not run out of memory under it, is not right, and the exit code is 1.

A save on one process takes next to nothing, so the saves are those of two ranks over gloo, of which rank 0 gathers all
weights: ZeRO 3 in each checkpoint, FSDP2 when the trained model is saved. Rank 0 alone gets the limit, as if another
process had taken the rest: when its third save begins, or its last checkpoint's.

    python -m scripts.memory_limits                     every phase; prints the table
    python -m scripts.memory_limits --write             also writes docs/accuracy/<date>-memory-limits.json
    python -m scripts.memory_limits --phases merge save-fsdp2
                                                        these alone; --write puts them among those of the same day
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launcher.checkpoints import last_checkpoint, step_of
from launcher.documents import read_document, read_lines, write_text
from launcher.memory import Phase
from launcher.plan import Plan
from launcher.run_paths import RunPaths
from launcher.run_record import RunRecord
from launcher.units import MIB
from scripts.endurance import LAUNCHER, LIBRARIES, ROOT, start
from scripts.small_text import VOCABULARY, write_small_model

STEPS = 4
SHORT, LONG = 40, 1500
"""Bytes of short and long texts; a byte is a token."""
TIMEOUT_SECONDS = 900.0
POLL_SECONDS = 0.002
LEAST_BYTES = 16 * MIB
"""A phase that takes less above what came before it can't be met by a limit: the C library keeps as much in reserve."""
CLOSE = 1e-4
"""Losses of two plans may differ so much: sums in another order."""
LONGEST_APART_SECONDS = 30.0
"""When one rank has ended for want of memory the others must have ended so much later."""
KEPT = ("method", "rank", "max_length", "optimizer", "precision", "global_batch_size")
"""What no plan that the launcher turns to may change."""
ACCOUNT = {"MALLOC_MMAP_THRESHOLD_": str(256 << 10), "MALLOC_TRIM_THRESHOLD_": str(256 << 10)}
"""Lets glibc give back what is released. By default it keeps blocks of up to 32 MiB for the next ones
(M_MMAP_THRESHOLD is raised by what is released, mallopt(3)), and VmData depends on what came before."""
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
DEEP = {**ARCHITECTURE, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16}
"""What ranks share: a layer is a sixteenth, so that what a step gathers is little beside what a save does."""
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
    smaller: tuple[str, ...] = ()
    """What the launcher may come to, in as many tries as it has: the job ends so under the limit. Empty: nothing."""
    engine: str = ""
    """What trains on two ranks; empty: one process."""
    met_stay: int = 0
    """As which stay in the phase begins the rank that takes most gets the limit, which meets it there or in a later one;
    0: the limit meets the highest, all have it from their beginning on."""

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return f"{self.phase.value}-{self.engine}" if self.engine else self.phase.value

    @property
    def num_ranks(self) -> int:
        """Processes."""
        return 2 if self.engine else 1


def two_ranks(*pins: str) -> tuple[str, ...]:
    """Arguments of a job that trains all weights on two ranks."""
    plain = ("micro_batch_size=1", "activation_checkpointing=none")  # neither makes a save smaller
    return ("method=full", "hardware.num_devices=2", *(f"planner.pin.{pin}" for pin in (*pins, *plain)))


TRIALS = (
    Trial(Phase.LOAD),
    Trial(Phase.RESUME, ("method=full",), stops_first=True),
    Trial(
        Phase.TRAIN_STEP,
        (EAGER,),
        lengths=(SHORT,) * 6 + (LONG,) + (SHORT,) * 9,
        smaller=("planner.pin.activation_checkpointing=full",),
    ),
    Trial(  # the first step makes the states; a smaller plan would meet them in the next backward pass
        Phase.OPTIMIZER_STEP,
        ("method=full", "planner.pin.micro_batch_size=1", "planner.pin.activation_checkpointing=none"),
    ),
    Trial(
        Phase.EVALUATION,
        (EAGER, "evaluation=held_out", "evaluation.steps=2", "evaluation.batch_size=4"),
        held_out=(LONG,) * 4,
        smaller=("evaluation.batch_size=1",),
    ),
    Trial(
        Phase.GENERATION,
        (
            "generation=samples",
            "generation.prompt_length=384",
            "generation.max_new_tokens=8",
            "generation.num_prompts=32",
            "generation.batch_size=32",
            "evaluation=held_out",
            f"evaluation.steps={STEPS}",
            "evaluation.batch_size=1",
        ),
        held_out=(450,) * 32,
        smaller=("generation.batch_size=4",),
    ),
    # as the second save begins the meter ends, whose own account may be what there is no room for
    Trial(Phase.SAVE, two_ranks("engine=deepspeed", "zero_stage=3"), engine="zero3", met_stay=3),
    # each rank saves its part in checkpoints, four of them; what the trained model takes comes right after the last one
    Trial(Phase.SAVE, two_ranks("engine=fsdp2"), engine="fsdp2", met_stay=STEPS),
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

    def rise_bytes(self, from_entry: bool) -> int:
        """What it takes more than what there was: ever before it, or when it began."""
        return self.highest_bytes - (self.entry_bytes if from_entry else self.before_bytes)


@dataclass(frozen=True)
class Limit:
    """What workers may hold."""

    num_bytes: int
    """RLIMIT_DATA."""
    phase: Phase | None = None
    """In which one rank's first worker gets it, and no other one; None: all workers have it from their beginning on."""
    stay: int = 1
    """As which stay in the phase begins."""
    rank: int = 0
    """Which rank."""


@dataclass(frozen=True)
class Seen:
    """What was seen of a launcher's workers."""

    visits: tuple[tuple[Visit, ...], ...]
    """Of each rank: its stays in phases, over all its workers."""
    apart_seconds: float
    """From the end of one rank to that of the last one, at most over all times that they were started; 0 of one rank."""

    @property
    def highest_bytes(self) -> int:
        """The highest of all ranks."""
        return max(visit.highest_bytes for visits in self.visits for visit in visits)


@dataclass(frozen=True)
class Met:
    """Where a limit meets a job."""

    rank: int
    """The rank that takes most there."""
    before_bytes: int
    """What there was before, of this rank or another; when the phase began, where the limit is set there."""
    phase_bytes: int
    """Its highest there."""


@dataclass(frozen=True)
class Outcome:
    """What came of one phase under a limit."""

    phase: Phase
    """Which phase."""
    before_bytes: int
    """What a worker had (VmData, without a limit) before that visit of the phase: at most, or when it began."""
    phase_bytes: int
    """Its highest VmData in the visit; where the limit is set as one begins, in that and the following ones."""
    limit_bytes: int | None
    """RLIMIT_DATA of the workers; None where the phase takes too little for a limit to meet it."""
    engine: str = ""
    """What trained on two ranks; empty: one process."""
    met_stay: int = 0
    """As which stay in the phase began one rank got the limit; 0: all had it from their beginning on."""
    smaller_bytes: int | None = None
    """The highest VmData of the same job, made as small as the launcher may; None where nothing makes it smaller."""
    tripped: tuple[str, ...] = ()
    """Phases in which memory ran out."""
    said: tuple[str, ...] = ()
    """What the worker, or the kernel, said of each."""
    changes: tuple[str, ...] = ()
    """What the launcher changed, in order."""
    keeps_job: bool = True
    """Whether all plans had the same `KEPT`."""
    went_on_from: tuple[int, ...] = ()
    """Steps of the checkpoints that it went on from, in order; 0: from the beginning."""
    apart_seconds: float | None = None
    """From the end of one rank to that of the last one, at most; None of one process."""
    exit_code: int | None = None
    """The launcher's exit code under the limit."""
    shows_bill: bool = False
    """Whether that phase's bill was shown."""
    resumed: bool = False
    """Whether the limit had to be lifted for the job to end."""
    loss_difference: float | None = None
    """Largest difference of a step's loss from the run without a limit."""

    @property
    def is_right(self) -> bool:
        """Whether memory ran out where it should, and nowhere else, and the job ended as it should, its losses right.

        What was seen to fit ends under the limit. What ends with exit code 4 shows the bill. Ranks end together.
        """
        is_close = self.loss_difference is not None and self.loss_difference <= CLOSE
        ends_well = self.exit_code == 0 or (
            self.exit_code == 4 and self.shows_bill and self.smaller_bytes is None
        )
        ends_together = self.apart_seconds is None or self.apart_seconds <= LONGEST_APART_SECONDS
        is_met = set(self.tripped) == {self.phase.value}
        return is_met and is_close and ends_well and ends_together and self.keeps_job


def command(trial: Trial, folder: Path, model: Path, run_dir: Path, changes: Sequence[str] = ()) -> list[str]:
    """The command line of a trial's job."""
    texts = write_texts(folder / f"{trial.name}.jsonl", trial.lengths)
    job = [
        f"model.path={model}",
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
    ]
    if trial.held_out:
        job.append(f"evaluation.path={write_texts(folder / 'held_out.jsonl', trial.held_out)}")
    replaced = {change.partition("=")[0] for change in changes}
    kept = [argument for argument in trial.arguments if argument.partition("=")[0] not in replaced]
    return [*LAUNCHER, *job, *kept, *changes]


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


@dataclass
class Rank:
    """One rank as it is followed."""

    visits: list[Visit] = field(default_factory=list)
    """Its stays in phases."""
    pid: int = 0
    """Its worker; 0 while there is none."""
    limited: int = 0
    """The worker that has the limit."""
    gone_at: float | None = None
    """When its worker was seen to have ended."""

    def look(self, paths: RunPaths, rank: int, limit: Limit | None) -> None:
        """Notes what the worker has now, and gives it the limit when that is due."""
        with suppress(OSError, ValueError):  # no worker yet, or no more
            pid = int(paths.pid(rank).read_text(encoding="ascii"))
            size = data_bytes(pid)
            if size and pid != self.pid:
                self.pid, self.gone_at = pid, None
            elif not size and pid == self.pid and self.gone_at is None:
                self.gone_at = time.monotonic()
            phase = Phase(paths.phase(rank).read_text(encoding="ascii"))
            if size:
                note(self.visits, phase, size)
            if limit is not None and self._is_due(limit, pid, rank, phase):
                resource.prlimit(pid, resource.RLIMIT_DATA, (limit.num_bytes, limit.num_bytes))
                self.limited = pid

    def _is_due(self, limit: Limit, pid: int, rank: int, phase: Phase) -> bool:
        if limit.phase is None:
            return pid != self.limited
        stays = sum(visit.phase is limit.phase for visit in self.visits)
        return not self.limited and rank == limit.rank and phase is limit.phase and stays >= limit.stay


def watch(child: subprocess.Popen[bytes], paths: RunPaths, num_ranks: int, limit: Limit | None) -> Seen:
    """Follows a launcher to its end. Its workers get the limit as they appear.

    Args:
        child: The launcher.
        paths: Its run directory.
        num_ranks: Processes that train.
        limit: The limit; None: none.
    """
    ranks = [Rank() for _ in range(num_ranks)]
    apart_seconds, deadline = 0.0, time.monotonic() + TIMEOUT_SECONDS
    while child.poll() is None:
        if time.monotonic() > deadline:
            raise SystemExit(f"{paths.root} did not end within {TIMEOUT_SECONDS:.0f} s")
        for number, rank in enumerate(ranks):
            rank.look(paths, number, limit)
        gone = [rank.gone_at for rank in ranks if rank.gone_at is not None]
        if len(gone) == num_ranks:
            apart_seconds = max(apart_seconds, max(gone) - min(gone))
        time.sleep(POLL_SECONDS)
    return Seen(tuple(tuple(rank.visits) for rank in ranks), apart_seconds)


def note(visits: list[Visit], phase: Phase, size: int) -> None:
    """Adds a reading to the stay that lasts, or begins another."""
    if visits and visits[-1].phase is phase:
        visits[-1] = replace(visits[-1], highest_bytes=max(size, visits[-1].highest_bytes))
    else:
        before_bytes = max((visit.highest_bytes for visit in visits), default=0)
        visits.append(Visit(phase, before_bytes, size, size))


def run(
    arguments: list[str], paths: RunPaths, log: Path, num_ranks: int, limit: Limit | None = None
) -> tuple[int, Seen]:
    """Runs a launcher: its exit code, and what was seen of its workers."""
    child = start(arguments, log)
    seen = watch(child, paths, num_ranks, limit)
    return child.returncode, seen


def require_end(code: int, log: Path, wanted: Sequence[int] = (0,)) -> None:
    """Ends the script with what a launcher said last, when it did not end with one of these exit codes."""
    if code not in wanted:
        raise SystemExit(log.read_text(encoding="utf-8", errors="replace")[-4000:])


def stop_after_first_checkpoint(arguments: list[str], paths: RunPaths, log: Path) -> None:
    """Starts a job and interrupts it when it has a checkpoint."""
    child = start(arguments, log)
    while child.poll() is None and last_checkpoint(paths.checkpoints) is None:
        time.sleep(POLL_SECONDS)
    child.send_signal(signal.SIGINT)
    child.wait(TIMEOUT_SECONDS)
    last = last_checkpoint(paths.checkpoints)
    if last is None or step_of(last) >= STEPS:
        raise SystemExit(f"{paths.root} was not interrupted: its last checkpoint is {last}")


def losses(paths: RunPaths) -> dict[int, float]:
    """Loss of each step; of a step that was trained twice the last one."""
    return {line["step"]: line["loss"] for line in read_lines(paths.metrics) if "loss" in line}


def meeting(trial: Trial, seen: Seen, model: Path) -> Met:
    """Where a limit would meet a job, by what was seen of it without one."""

    def choose(visits: Sequence[Visit]) -> Visit:
        stays = [visit for visit in visits if visit.phase is trial.phase]
        if trial.met_stay:  # the limit stays: any of those that follow may be the one that it meets
            first, *others = stays[trial.met_stay - 1 :]
            return replace(first, highest_bytes=max(visit.highest_bytes for visit in (first, *others)))
        return max(stays, key=lambda visit: visit.rise_bytes(from_entry=False))

    chosen = [choose(visits) for visits in seen.visits]
    rank = max(range(len(chosen)), key=lambda number: chosen[number].highest_bytes)
    met = chosen[rank]
    if trial.met_stay:
        return Met(rank, met.entry_bytes, met.highest_bytes)
    others = [
        visit.highest_bytes for visits in (*seen.visits[:rank], *seen.visits[rank + 1 :]) for visit in visits
    ]
    before_bytes = max(met.before_bytes or base_bytes(model, met.highest_bytes), *others, 0)
    return Met(rank, before_bytes, met.highest_bytes)


def attempt(trial: Trial, folder: Path, model: Path) -> Outcome:
    """Runs a trial without and with its limit, and compares."""
    free, small, tight = (RunPaths(folder / f"{trial.name}-{name}") for name in ("free", "small", "tight"))
    log, ranks = folder / f"{trial.name}.log", trial.num_ranks
    arguments = {paths: command(trial, folder, model, paths.root) for paths in (free, tight)}
    if trial.stops_first:
        for paths in (free, tight):
            stop_after_first_checkpoint(arguments[paths], paths, log)
            arguments[paths] = [*LAUNCHER, f"resume={paths.root}"]
    code, seen = run(arguments[free], free, log, ranks)
    require_end(code, log)
    met, smaller_bytes = meeting(trial, seen, model), None
    if trial.smaller:
        code, seen = run(command(trial, folder, model, small.root, trial.smaller), small, log, ranks)
        require_end(code, log)
        smaller_bytes = seen.highest_bytes
    outcome = Outcome(
        trial.phase, met.before_bytes, met.phase_bytes, None, trial.engine, trial.met_stay, smaller_bytes
    )
    floor_bytes = max(met.before_bytes, smaller_bytes or 0)
    if met.phase_bytes - floor_bytes < LEAST_BYTES:
        return outcome
    limit_bytes = (floor_bytes + met.phase_bytes) // 2
    limit = Limit(limit_bytes, trial.phase if trial.met_stay else None, trial.met_stay, met.rank)
    code, seen = run(arguments[tight], tight, log, ranks, limit)
    require_end(code, log, (0, 4))
    outcome = under_limit(replace(outcome, limit_bytes=limit_bytes, exit_code=code), tight, log)
    if ranks > 1:
        outcome = replace(outcome, apart_seconds=seen.apart_seconds)
    if code:
        code, _ = run([*LAUNCHER, f"resume={tight.root}"], tight, log, ranks)
        require_end(code, log)
    expected, found = losses(free), losses(tight)
    if expected.keys() != found.keys():
        raise SystemExit(f"steps {sorted(found)} were trained, not {sorted(expected)}")
    return replace(outcome, loss_difference=max(abs(found[step] - expected[step]) for step in expected))


def under_limit(outcome: Outcome, paths: RunPaths, log: Path) -> Outcome:
    """What the launcher made of a limit, by its record, its checkpoints, and what it showed."""
    record = read_document(paths.record, RunRecord)
    tripped = [replan.phase.value if replan.phase else "unknown" for replan in record.replans]
    said = [replan.message for replan in record.replans]
    went_on_from = [replan.from_step for replan in record.replans]
    plans = [*(plan for replan in record.replans for plan in (replan.failed, replan.taken)), record.plan]
    if outcome.exit_code:
        ended = record.outcome
        tripped.append(ended.phase.value if ended.phase else "unknown")
        said.append(ended.message.partition("\n")[0])
        last = last_checkpoint(paths.checkpoints)
        went_on_from.append(0 if last is None else step_of(last))
    return replace(
        outcome,
        tripped=tuple(tripped),
        said=tuple(line.replace(socket.gethostname(), "here") for line in said),
        changes=tuple(replan.change for replan in record.replans),
        keeps_job=len(set(map(kept_knobs, plans))) == 1,
        went_on_from=tuple(went_on_from),
        shows_bill=f"predicted at most in {outcome.phase.value}:"
        in log.read_text(encoding="utf-8", errors="replace"),
        resumed=outcome.exit_code == 4,
    )


def kept_knobs(plan: Plan) -> tuple[object, ...]:
    """What of a plan no other one may change."""
    return tuple(getattr(plan, name) for name in KEPT)


def base_bytes(folder: Path, loading_bytes: int) -> int:
    """What a worker has before it loads: its highest while loading, less the weights."""
    return loading_bytes - sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def document_of(outcomes: Mapping[str, Outcome], file: Path, date: str) -> dict[str, Any]:
    """What the data file is to hold: these outcomes, and those of other trials of the same day and libraries.

    Args:
        outcomes: By the trial's name.
        file: The data file, if there is one.
        date: The day.
    """
    document: dict[str, Any] = {
        "date": date,
        "versions": {name: version(name) for name in (*LIBRARIES, "deepspeed")},
        "python": sys.version.split()[0],
    }
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    is_alike = all(earlier.get(name) == value for name, value in document.items())
    known = {phase.get("name"): phase for phase in earlier["phases"]} if is_alike else {}
    known |= {name: {"name": name, **asdict(outcome)} for name, outcome in outcomes.items()}
    return {**document, "phases": [known[trial.name] for trial in TRIALS if trial.name in known]}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = sorted({name for trial in TRIALS for name in (trial.name, trial.phase.value)})
    parser.add_argument("--phases", nargs="*", choices=names, default=names)
    parser.add_argument("--write", action="store_true", help="write docs/accuracy/<date>-memory-limits.json")
    options = parser.parse_args()
    os.environ.update(ACCOUNT)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background ignores it, and so would launchers
    outcomes: dict[str, Outcome] = {}
    print(
        "| phase | before, MiB | smaller, MiB | phase, MiB | limit, MiB | exit | ran out in | what was changed "
        "| went on from | loss off by |"
    )
    print("|---|--:|--:|--:|--:|--:|---|---|---|--:|")
    with tempfile.TemporaryDirectory(prefix="memory-limits-") as name:
        folder = Path(name)
        for model, architecture in (("model", ARCHITECTURE), ("deep", DEEP)):
            write_small_model(folder / model, architecture, "text", 1)
        for trial in TRIALS:
            if {trial.name, trial.phase.value} & set(options.phases):
                outcome = attempt(trial, folder, folder / ("deep" if trial.engine else "model"))
                outcomes[trial.name] = outcome
                print(row(trial.name, outcome), flush=True)
                if options.write:  # after each: all of them take half an hour
                    date = datetime.now(UTC).date().isoformat()
                    file = ROOT / "docs" / "accuracy" / f"{date}-memory-limits.json"
                    write_text(file, json.dumps(document_of(outcomes, file, date), indent=1) + "\n")
    unmet = [name for name, outcome in outcomes.items() if not outcome.tripped]
    wrong = [name for name, outcome in outcomes.items() if outcome.tripped and not outcome.is_right]
    if unmet or wrong:
        raise SystemExit(
            f"never ran out of memory: {', '.join(unmet) or 'none'}; not as it should be: {', '.join(wrong) or 'none'}"
        )


def row(name: str, outcome: Outcome) -> str:
    """One line of the table."""
    cells = [
        name,
        f"{outcome.before_bytes / MIB:.0f}",
        "" if outcome.smaller_bytes is None else f"{outcome.smaller_bytes / MIB:.0f}",
        f"{outcome.phase_bytes / MIB:.0f}",
        "none meets it" if outcome.limit_bytes is None else f"{outcome.limit_bytes / MIB:.0f}",
        "" if outcome.exit_code is None else str(outcome.exit_code),
        ", ".join(outcome.tripped) or "nothing",
        "; ".join(outcome.changes)
        or ("nothing can be; went on without the limit" if outcome.resumed else ""),
        ", ".join(map(str, outcome.went_on_from)),
        "" if outcome.loss_difference is None else f"{outcome.loss_difference:.1e}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
