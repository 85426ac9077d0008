"""Jobs that are killed at random moments, resumed, and compared with an undisturbed one: bit for bit.

Each job trains adapters of a small random model with dropout on shuffled text, with a checkpoint a step, merges them,
and gets SIGKILL somewhere: in the rehearsal, in a step, while a checkpoint is written, sealed, renamed or an older one
removed, or while the trained and the merged model are written; the worker alone, the launcher alone, or every process.
How far into a save or the results is drawn at random, out of the time that the undisturbed job took for them. Then
`launch resume=<run dir>` goes on.

    python -m scripts.endurance                     20 jobs; prints the table
    python -m scripts.endurance --write             also writes docs/accuracy/<date>-endurance.json
    python -m scripts.endurance --jobs 3 --seed 7
    python -m scripts.endurance --moments results --jobs 1
    python -m scripts.endurance --hardware auto     on a GPU of this machine
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil

from launcher.checkpoints import PARTIAL, SEAL, last_checkpoint, step_of
from launcher.run_paths import RunPaths
from scripts.small_text import VOCABULARY, write_small_model

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = (sys.executable, "-m", "launcher.cli")
STEPS = 12
MOMENTS = ("rehearsal", "step", "save", "results")
VICTIMS = ("all", "worker", "launcher")
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate")
TIMEOUT_SECONDS = 600.0
POLL_SECONDS = 0.001
REHEARSAL_SECONDS, STEP_SECONDS = 6.0, 0.3
"""How far into a rehearsal or a step a kill comes at most."""
TRIES = 3
"""A job that ends before it is killed is started again so often at most."""
ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "attention_dropout": 0.1,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Kill:
    """One job that was killed."""

    moment: str
    """What it was to do: one of `MOMENTS`."""
    under_way: str
    """What it did: of a save or the results how far they were."""
    victim: str
    """Who got the signal: one of `VICTIMS`."""
    resumed_from: int
    """Steps in the checkpoint that it went on from; 0: from the beginning."""
    num_torn: int
    """Checkpoints that were passed over."""
    is_same: bool
    """Whether it ended with the weights of the undisturbed run."""


@dataclass(frozen=True)
class Durations:
    """What the undisturbed job took."""

    save_seconds: float
    """From the first file of a checkpoint to the removal of an older one; the slowest."""
    results_seconds: float
    """From the first file of the trained model to the worker's outcome."""


def command(folder: Path, run_dir: Path, rehearses: bool, hardware: str) -> list[str]:
    """The command line of the job."""
    job = [
        f"model.path={folder}",
        f"data.path={folder / 'train.jsonl'}",
        "data.format=text",
        "data.max_length=128",
        "data.packing=true",
        "method.dropout=0.1",
        "method.merge=true",
        "training.global_batch_size=4",
        f"training.max_steps={STEPS}",
        "training.save_steps=1",
        "training.save_total_limit=2",
        "training.precision=fp32",
        "training.report_to=[]",
        "planner.pin.micro_batch_size=2",
        f"hardware={hardware}",
        f"trace_cache={folder / 'traces'}",
        f"run_dir={run_dir}",
        f"launch.rehearse={str(rehearses).lower()}",
    ]
    return [*LAUNCHER, *job]


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a launcher in a session of its own."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    with log.open("ab") as stream:
        return subprocess.Popen(
            arguments, stdout=stream, stderr=stream, start_new_session=True, env=environment
        )


def end(child: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for a good end."""
    if child.wait(TIMEOUT_SECONDS):
        raise SystemExit(log.read_text(encoding="utf-8", errors="replace")[-4000:])


def digest(run_dir: Path) -> str:
    """Digest of the trained adapter and of the merged model."""
    files = [
        run_dir / "model" / "adapter_model.safetensors",
        *sorted((run_dir / "merged").glob("*.safetensors")),
    ]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def follow(child: subprocess.Popen[bytes], paths: RunPaths) -> Durations:
    """Follows a job to its end: how long a save takes at most, and how long its results."""
    longest, save_began, results_began = 0.0, 0.0, 0.0
    while child.poll() is None:
        now, is_saving = time.monotonic(), _is_saving(paths)
        if is_saving and not save_began:
            save_began = now
        elif save_began and not (paths.checkpoints / PARTIAL).exists():
            longest, save_began = max(longest, now - save_began), 0.0
        if not results_began and _results_began(paths):
            results_began = now
        if results_began and paths.outcome(0).exists():
            return Durations(longest, now - results_began)
        time.sleep(POLL_SECONDS)
    return Durations(longest, time.monotonic() - results_began if results_began else 0.0)


def strike(
    child: subprocess.Popen[bytes],
    paths: RunPaths,
    moment: str,
    victim: str,
    chance: float,
    durations: Durations,
) -> str:
    """Waits for a moment of a job and kills; returns what was under way then, or nothing when the job was quicker.

    Args:
        child: The launcher.
        paths: Its run directory.
        moment: One of `MOMENTS`.
        victim: One of `VICTIMS`.
        chance: From 0 to 1: which step, and how far into what begins there.
        durations: How long what begins there takes.
    """
    act = paths.rehearsal if moment == "rehearsal" else paths
    wanted = 1 + int(chance * (STEPS - 2))
    begins: dict[str, Callable[[], bool]] = {
        "rehearsal": act.pid(0).exists,
        "step": lambda: _last_step(paths) >= wanted,
        "save": lambda: _last_step(paths) >= wanted and _is_saving(paths),
        "results": lambda: _results_began(paths),
    }
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not begins[moment]():
        if child.poll() is not None or time.monotonic() > deadline:
            return ""
        time.sleep(POLL_SECONDS)
    seconds = {"rehearsal": REHEARSAL_SECONDS, "step": STEP_SECONDS, "save": durations.save_seconds}
    fraction = chance * (STEPS - 2) % 1.0  # what is left of the chance when it has chosen a step
    time.sleep(
        (chance if moment == "rehearsal" else fraction) * seconds.get(moment, durations.results_seconds)
    )
    if child.poll() is not None:
        return ""
    under_way = under_way_in(paths, moment)
    kill(child, act, victim)
    return under_way


def under_way_in(paths: RunPaths, moment: str) -> str:
    """How far a save, or the results, are: by what lies on the disk."""
    if moment == "results":
        return "merged model" if paths.model.exists() else "model"
    if moment != "save":
        return moment
    partial = paths.checkpoints / PARTIAL
    written = [file.name for file in partial.glob("checkpoint-*/*")]
    if SEAL in written:
        return "sealed, not renamed"
    return "writing" if written else "renamed" if partial.exists() else "rotation, or after it"


def _is_saving(paths: RunPaths) -> bool:
    return any((paths.checkpoints / PARTIAL).glob("checkpoint-*/*"))


def _results_began(paths: RunPaths) -> bool:
    return paths.model.exists() or (paths.checkpoints / PARTIAL / paths.model.name).exists()


def _last_step(paths: RunPaths) -> int:
    last = last_checkpoint(paths.checkpoints)
    return 0 if last is None else step_of(last)


def kill(child: subprocess.Popen[bytes], act: RunPaths, victim: str) -> None:
    """SIGKILL for the worker, the launcher, or all that descends from the launcher."""
    family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
    if victim == "launcher":
        family = family[:1]
    elif victim == "worker":
        worker = int(act.pid(0).read_text(encoding="ascii"))
        family = [process for process in family if process.pid == worker]
    for process in family:
        with suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)
    child.wait(TIMEOUT_SECONDS)


def endure(
    folder: Path, number: int, chances: random.Random, wanted: str, durations: Durations, hardware: str
) -> Kill:
    """Runs one job, kills it, resumes it, and compares."""
    moment, victim = MOMENTS[number % len(MOMENTS)], chances.choice(VICTIMS)
    for attempt in range(TRIES):
        paths, log = RunPaths(folder / f"run-{number}-{attempt}"), folder / f"log-{number}-{attempt}"
        child = start(command(folder, paths.root, moment == "rehearsal", hardware), log)
        if under_way := strike(child, paths, moment, victim, chances.random(), durations):
            break
    else:
        raise SystemExit(
            f"job {number} ended before it was killed\n{log.read_text(encoding='utf-8')[-2000:]}"
        )
    last = last_checkpoint(paths.checkpoints)
    if child.returncode != 0 or not paths.record.exists():
        end(start([*LAUNCHER, f"resume={paths.root}"], log), log)
    torn = len(list(paths.checkpoints.glob("torn-*")))
    return Kill(
        moment, under_way, victim, 0 if last is None else step_of(last), torn, digest(paths.root) == wanted
    )


def endure_all(
    folder: Path, numbers: Iterable[int], chances: random.Random, hardware: str = "cpu"
) -> list[Kill]:
    """Runs an undisturbed job in a folder, then those of some numbers; prints the table."""
    text = "the planner reads the trace and the trace reads the step. "
    write_small_model(folder, ARCHITECTURE, text * 12, 60)
    log = folder / "log"
    child = start(command(folder, folder / "undisturbed", rehearses=False, hardware=hardware), log)
    durations = follow(child, RunPaths(folder / "undisturbed"))
    end(child, log)
    wanted, kills = digest(folder / "undisturbed"), []
    print(
        f"a save takes {durations.save_seconds:.3f} s at most, the results {durations.results_seconds:.3f} s"
    )
    print(
        "| killed in | under way | who | went on from step | torn | same weights |\n|---|---|---|--:|--:|---|"
    )
    for number in numbers:
        found = endure(folder, number, chances, wanted, durations, hardware)
        kills.append(found)
        same = "yes" if found.is_same else "NO"
        row = (found.moment, found.under_way, found.victim, found.resumed_from, found.num_torn, same)
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    return kills


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--moments", nargs="*", choices=MOMENTS, default=MOMENTS, help="all by default, in turn"
    )
    parser.add_argument("--hardware", default="cpu", help="`auto` for a GPU of this machine")
    parser.add_argument("--write", action="store_true", help="write docs/accuracy/<date>-endurance.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="endurance-") as name:
        wanted = [MOMENTS.index(moment) for moment in options.moments]
        numbers = [
            wanted[at % len(wanted)] + len(MOMENTS) * (at // len(wanted)) for at in range(options.jobs)
        ]
        kills = endure_all(Path(name), numbers, random.Random(options.seed), options.hardware)
    now = datetime.now(UTC)
    if options.write:
        document = {
            "date": now.date().isoformat(),
            "seed": options.seed,
            "hardware": options.hardware,
            "versions": {name: version(name) for name in LIBRARIES},
            "kills": [asdict(found) for found in kills],
        }
        file = ROOT / "docs" / "accuracy" / f"{now.date().isoformat()}-endurance.json"
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if not all(found.is_same for found in kills):
        raise SystemExit("not all jobs ended with the same weights")


if __name__ == "__main__":
    main()
