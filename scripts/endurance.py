"""Jobs that are killed at random moments, resumed, and compared with an undisturbed one: bit for bit.

Each job trains a small random model with dropout on shuffled text, with a checkpoint a step, and gets SIGKILL somewhere:
in the rehearsal, in a step, or while a checkpoint is written; the worker alone, the launcher alone, or every process.
Then `launch resume=<run dir>` goes on.

    python -m scripts.endurance                     20 jobs; prints the table
    python -m scripts.endurance --write             also writes docs/accuracy/<date>-endurance.json
    python -m scripts.endurance --jobs 3 --seed 7
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
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil

from launcher.checkpoints import PARTIAL, last_checkpoint, step_of
from launcher.run_paths import RunPaths
from scripts.small_text import VOCABULARY, write_small_model

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = (sys.executable, "-m", "launcher.cli")
STEPS = 12
MOMENTS = ("rehearsal", "step", "save")
VICTIMS = ("all", "worker", "launcher")
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate")
TIMEOUT_SECONDS = 600.0
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
    """What it was doing: one of `MOMENTS`."""
    victim: str
    """Who got the signal: one of `VICTIMS`."""
    resumed_from: int
    """Steps in the checkpoint that it went on from; 0: from the beginning."""
    num_torn: int
    """Checkpoints that were passed over."""
    is_same: bool
    """Whether it ended with the weights of the undisturbed run."""


def command(folder: Path, run_dir: Path, rehearses: bool, hardware: str) -> list[str]:
    """The command line of the job."""
    job = [
        f"model.path={folder}",
        f"data.path={folder / 'train.jsonl'}",
        "data.format=text",
        "data.max_length=128",
        "data.packing=true",
        "method.dropout=0.1",
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
    """Digest of the trained adapter."""
    return hashlib.sha256((run_dir / "model" / "adapter_model.safetensors").read_bytes()).hexdigest()


def strike(child: subprocess.Popen[bytes], paths: RunPaths, moment: str, victim: str, chance: float) -> bool:
    """Waits for a moment of a job and kills; False when the job was quicker."""
    act = paths.rehearsal if moment == "rehearsal" else paths
    deadline = time.monotonic() + TIMEOUT_SECONDS
    wanted = 0 if moment == "rehearsal" else 1 + int(chance * (STEPS - 2))
    while time.monotonic() < deadline:
        if child.poll() is not None:
            return False
        if act.pid(0).exists():
            last = last_checkpoint(paths.checkpoints) if moment != "rehearsal" else None
            if moment == "rehearsal" or (last is not None and step_of(last) >= wanted):
                break
        time.sleep(0.01)
    if moment == "save":
        while not any((paths.checkpoints / PARTIAL).glob("*/*")) and child.poll() is None:
            pass
    else:
        time.sleep(chance * (6.0 if moment == "rehearsal" else 0.3))
    if child.poll() is not None:
        return False
    kill(child, act, victim)
    return True


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


def endure(folder: Path, number: int, chances: random.Random, wanted: str, hardware: str) -> Kill:
    """Runs one job, kills it, resumes it, and compares."""
    moment, victim = MOMENTS[number % len(MOMENTS)], chances.choice(VICTIMS)
    paths, log = RunPaths(folder / f"run-{number}"), folder / f"log-{number}"
    child = start(command(folder, paths.root, moment == "rehearsal", hardware), log)
    if not strike(child, paths, moment, victim, chances.random()):
        raise SystemExit(
            f"job {number} ended before it was killed\n{log.read_text(encoding='utf-8')[-2000:]}"
        )
    last = last_checkpoint(paths.checkpoints)
    if child.returncode != 0 or not (paths.model / "adapter_model.safetensors").exists():
        end(start([*LAUNCHER, f"resume={paths.root}"], log), log)
    torn = len(list(paths.checkpoints.glob("torn-*")))
    return Kill(moment, victim, 0 if last is None else step_of(last), torn, digest(paths.root) == wanted)


def endure_all(
    folder: Path, numbers: Iterable[int], chances: random.Random, hardware: str = "cpu"
) -> list[Kill]:
    """Runs an undisturbed job in a folder, then those of some numbers; prints the table."""
    text = "the planner reads the trace and the trace reads the step. "
    write_small_model(folder, ARCHITECTURE, text * 12, 60)
    log = folder / "log"
    end(start(command(folder, folder / "undisturbed", rehearses=False, hardware=hardware), log), log)
    wanted, kills = digest(folder / "undisturbed"), []
    print("| killed in | who | went on from step | torn | same weights |\n|---|---|--:|--:|---|")
    for number in numbers:
        found = endure(folder, number, chances, wanted, hardware)
        kills.append(found)
        same = "yes" if found.is_same else "NO"
        row = (found.moment, found.victim, found.resumed_from, found.num_torn, same)
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    return kills


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hardware", default="cpu", help="`auto` for a GPU of this machine")
    parser.add_argument("--write", action="store_true", help="write docs/accuracy/<date>-endurance.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="endurance-") as name:
        kills = endure_all(Path(name), range(options.jobs), random.Random(options.seed), options.hardware)
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
