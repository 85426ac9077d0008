"""Six peers' recipes and our plans of the same trainings, scaled down and trained on this machine's CPU.

The model has the recipe's architecture: four layers, widths an eighth, and a vocabulary so much smaller that logits and
hidden states keep their proportion; sequences are a thirty-second as long, every row full. Method, rank, targets, update,
micro batches and global batch are the recipe's, in fp32. `theirs` is pinned to the peer's settings. `ours` is what the
planner takes in a memory that stands to what theirs hold as the card's does (5 % of the card and both contexts left out).

Both are trained by the real command. The first steps, which the meter slows down, don't count; then the two workers take
turns, one stopped while the other trains, so that a slow moment of the machine falls on both. The step in which a worker
was stopped doesn't count either. Beside wall seconds stand seconds of CPU, which other processes of the machine move
less. One thread each: two threads wait for each other wherever a core is shared.

    OMP_NUM_THREADS=1 python -m scripts.peers_measured             prints what was measured
    OMP_NUM_THREADS=1 python -m scripts.peers_measured --write     also writes docs/accuracy/<date>-peers-measured.json
    OMP_NUM_THREADS=1 python -m scripts.peers_measured --only ms-swift --write
                                                                   this one alone, put among those of the same day
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launcher.config import load_job
from launcher.documents import from_json, read_document, read_lines, to_json
from launcher.job import JobSpec
from launcher.planner.tracer import Tracer
from launcher.planning import plan_job, resolve
from launcher.run_paths import RunPaths
from launcher.run_record import RunRecord
from launcher.units import MIB
from scripts.endurance import LAUNCHER, start
from scripts.peers import LIBRARIES, RECIPES, ROOT, Outcome, Recipe, newest, outcome_of
from scripts.small_text import write_small_model

MEASURED = (
    "LLaMA-Factory 0.9.3 llama3_lora_sft",
    "Axolotl qwen3/8b-lora-fused-attn",
    "LLaMA-Factory 0.9.3 llama3_lora_sft_otfq",
    "alignment-handbook zephyr-7b-beta qlora",
    "ms-swift full/train",
    "TRL trl sft, full",
)
"""Two of each method."""
LAYERS, WIDTH, LENGTH, HEADS = 4, 8, 32, 4
"""Layers that are left; by what widths, lengths and numbers of heads are divided."""
WARM_STEPS, TURNS, COUNTED = 3, 3, 2
"""Steps before the first that counts (two run under the meter); turns of each worker; steps that count in a turn."""
TIMEOUT_SECONDS = 900.0
POLL_SECONDS = 0.02
ROOMY_BYTES = 1 << 40
"""A memory in which everything fits."""


@dataclass(frozen=True)
class Side:
    """One side's settings, trained."""

    settings: str
    """Micro batch x accumulation, checkpointing, loss."""
    predicted_seconds: float
    """Of a step; from another CPU's rates where this one is not calibrated with one thread."""
    step_seconds: tuple[float, ...]
    """Wall time of each step that counts."""
    cpu_seconds: tuple[float, ...]
    """What the worker computed in each of them, on any core."""
    predicted_bytes: int
    """Highest bytes of live tensors."""
    measured_bytes: int
    """The same by the meter."""


@dataclass(frozen=True)
class Pair:
    """One recipe, both ways."""

    recipe: str
    """Its name in the table of predictions."""
    model: Mapping[str, Any]
    """The small model's config."""
    length: int
    """Tokens per sequence."""
    memory_bytes: int
    """What the planner had for `ours`, context included."""
    theirs: Side
    """With the peer's settings."""
    ours: Side
    """With the plan that the planner took."""


@dataclass(frozen=True)
class Findings:
    """A data file."""

    date: str
    """When it was measured."""
    threads: int
    """Threads of each worker."""
    versions: Mapping[str, str]
    """Of libraries."""
    load_average: tuple[float, ...]
    """Of the machine, before each pair: processes that wanted a core."""
    pairs: tuple[Pair, ...]
    """What was measured."""


def small_architecture(large: Mapping[str, Any]) -> dict[str, Any]:
    """A model of the same architecture with a few hundredths of its weights."""
    layers = int(large["num_hidden_layers"])
    kept = {key: value for key, value in large.items() if not key.endswith("_token_id")}
    head = int(large.get("head_dim") or large["hidden_size"] // large["num_attention_heads"])
    return kept | {
        "num_hidden_layers": LAYERS,
        "hidden_size": large["hidden_size"] // WIDTH,
        "intermediate_size": large["intermediate_size"] // WIDTH,
        "num_attention_heads": large["num_attention_heads"] // HEADS,
        "num_key_value_heads": large["num_key_value_heads"] // HEADS,
        "head_dim": head * HEADS // WIDTH,
        "vocab_size": large["vocab_size"] * LAYERS // (layers * WIDTH),
    }


def small_job(recipe: Recipe, folder: Path) -> list[str]:
    """The recipe's training with the small model, as a command line: of no memory yet, and nothing pinned."""
    replaced = ("recipe", "model", "hardware", "data.max_length", "data.packing", "planner.headroom")
    same = [part for part in recipe.job if part.partition("=")[0] not in replaced]
    return [
        *same,
        f"model.path={folder}",
        f"data.path={folder / 'train.jsonl'}",
        "data.format=text",
        f"data.max_length={recipe.length // LENGTH}",
        "data.packing=true",
        f"training.max_steps={WARM_STEPS + TURNS * (1 + COUNTED)}",
        "training.precision=fp32",
        "training.report_to=[]",
        "hardware=cpu",
        "planner.headroom=0",
        "launch.rehearse=false",
    ]


def scaled_memory_bytes(card: JobSpec, theirs_on_card: Outcome, theirs_bytes: int, context_bytes: int) -> int:
    """A memory that stands to the small training as the card does to the large one.

    Args:
        card: The recipe's job.
        theirs_on_card: What the peer's settings come to on the card, context included.
        theirs_bytes: What they come to on the CPU, without context.
        context_bytes: Of the CPU.
    """
    hardware = card.hardware
    room = 0.95 * hardware.memory_bytes - hardware.context_bytes
    held = theirs_on_card.peak_bytes - hardware.context_bytes
    return context_bytes + round(theirs_bytes * room / held)


@dataclass
class Worker:
    """A launched training that is stopped and goes on."""

    child: subprocess.Popen[bytes]
    """The launcher."""
    paths: RunPaths
    """Its run directory."""
    log: Path
    """What it prints."""
    cpu_at_end: list[float] = field(default_factory=list)
    """CPU seconds of the worker when each step had ended."""

    def steps(self) -> list[float]:
        """Wall seconds of each step that has ended."""
        return [line["step_seconds"] for line in read_lines(self.paths.metrics) if "loss" in line]

    def look(self) -> int:
        """Reads the worker's clock if steps have ended since, and says how many there are."""
        ended = len(self.steps())
        if ended > len(self.cpu_at_end):
            seconds = self._cpu_seconds()
            self.cpu_at_end += [seconds] * (ended - len(self.cpu_at_end))
        if self.child.poll():
            raise SystemExit(self.log.read_text(encoding="utf-8", errors="replace")[-4000:])
        return ended

    def train_until(self, steps: int) -> None:
        """Lets it train until so many steps have ended."""
        self.tell(signal.SIGCONT)
        until = time.monotonic() + TIMEOUT_SECONDS
        while self.look() < steps:
            if time.monotonic() > until:
                raise SystemExit(f"{self.paths.root.name}: step {steps} did not end")
            time.sleep(POLL_SECONDS)

    def tell(self, number: signal.Signals) -> None:
        """Sends the worker a signal."""
        os.kill(self._pid(), number)

    def _pid(self) -> int:
        return int(self.paths.pid(0).read_text(encoding="ascii"))

    def _cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self._pid()}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def launched(command: Sequence[str], folder: Path, name: str) -> Worker:
    """Starts a training."""
    paths, log = RunPaths(folder / name), folder / f"{name}.log"
    arguments = [*LAUNCHER, *command, f"run_dir={paths.root}", f"trace_cache={folder / 'traces'}"]
    return Worker(start(arguments, log), paths, log)


def take_turns(workers: Sequence[Worker]) -> None:
    """Trains them to their ends, never two at once after the warm-up."""
    waiting, until = list(workers), time.monotonic() + TIMEOUT_SECONDS
    while waiting:  # both start together: nothing of it counts
        if time.monotonic() > until:
            raise SystemExit(f"{waiting[0].paths.root.name}: the warm-up did not end")
        for worker in [worker for worker in waiting if worker.look() >= WARM_STEPS]:
            worker.tell(signal.SIGSTOP)
            waiting.remove(worker)
        time.sleep(POLL_SECONDS)
    for _ in range(TURNS):
        for worker in workers:
            worker.train_until(worker.look() + 1 + COUNTED)
            if worker.child.poll() is None and worker.look() < WARM_STEPS + TURNS * (1 + COUNTED):
                worker.tell(signal.SIGSTOP)
    for worker in workers:
        if worker.child.wait(TIMEOUT_SECONDS):
            raise SystemExit(worker.log.read_text(encoding="utf-8", errors="replace")[-4000:])


def side_of(worker: Worker, settings: str) -> Side:
    """What one side came to: of each turn the steps after its first one."""
    record = read_document(worker.paths.record, RunRecord)
    assert (
        record.measured is not None and record.predicted_step is not None
    )  # it ended well, and a CPU has rates
    steps, clock = worker.steps(), worker.cpu_at_end
    places = [place for place in range(WARM_STEPS, len(steps)) if (place - WARM_STEPS) % (1 + COUNTED)]
    predicted = record.predicted_as_run or record.predicted
    return Side(
        settings,
        record.predicted_step.seconds,
        tuple(round(steps[place], 4) for place in places),
        tuple(round(clock[place] - clock[place - 1], 2) for place in places),
        predicted.peak_allocated_bytes,
        record.measured.peak_allocated_bytes,
    )


def measure(recipe: Recipe, on_card: Outcome, folder: Path, tracer: Tracer) -> Pair:
    """Plans both sides, trains both."""
    card = resolve(load_job(recipe.job), ())
    architecture = small_architecture(card.model.architecture)
    write_small_model(folder, architecture, "text " * 400, 60)
    job = [*small_job(recipe, folder), f"trace_cache={folder / 'traces'}"]
    roomy = [*job, *recipe.pins, f"hardware.memory_bytes={ROOMY_BYTES}"]
    theirs = plan_job(resolve(load_job(roomy), ()), tracer)
    assert theirs.estimate is not None  # everything fits
    context = theirs.estimate.context_bytes
    memory = scaled_memory_bytes(card, on_card, theirs.estimate.peak_allocated_bytes, context)
    limit = f"hardware.memory_bytes={memory}"
    ours = plan_job(resolve(load_job([*job, limit]), ()), tracer)
    workers = [
        launched([*job, limit, *pins], folder, name) for name, pins in (("theirs", recipe.pins), ("ours", []))
    ]
    try:
        take_turns(workers)
    finally:
        for worker in workers:
            if worker.child.poll() is None:
                os.killpg(worker.child.pid, signal.SIGKILL)
    sides = [
        side_of(worker, outcome_of(choice).settings)
        for worker, choice in zip(workers, (theirs, ours), strict=True)
    ]
    return Pair(recipe.name, architecture, recipe.length // LENGTH, memory, *sides)


def words(pair: Pair) -> str:
    """A pair in a few lines."""
    lines = [f"{pair.recipe}, {pair.memory_bytes / MIB:.0f} MiB"]
    for name, side in (("theirs", pair.theirs), ("ours", pair.ours)):
        lines.append(
            f"  {name:<7} {side.settings}: wall {side.step_seconds}, CPU {side.cpu_seconds}, predicted "
            f"{side.predicted_seconds:.2f} s, {side.predicted_bytes / MIB:.1f} of {side.measured_bytes / MIB:.1f} MiB"
        )
    return "\n".join(lines)


def write(found: Findings) -> None:
    """Writes the data file; pairs of the same day that were not measured again stay."""
    file = ROOT / "docs" / "accuracy" / f"{found.date}-peers-measured.json"
    pairs = {pair.recipe: pair for pair in found.pairs}
    load = found.load_average
    if file.exists():
        earlier = from_json(Findings, file.read_text(encoding="utf-8"))
        pairs = {pair.recipe: pair for pair in earlier.pairs} | pairs
        load = (*earlier.load_average, *load)
    ordered = tuple(pairs[name] for name in MEASURED if name in pairs)
    document = Findings(found.date, found.threads, found.versions, load, ordered)
    file.write_text(to_json(document, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="recipes whose name has this text")
    parser.add_argument("--date", default=datetime.now(UTC).date().isoformat(), help="of the data file")
    parser.add_argument("--write", action="store_true", help="write docs/accuracy/<date>-peers-measured.json")
    options = parser.parse_args()
    on_card = {row["recipe"]["name"]: Outcome(**row["theirs"]) for row in newest("peers")["rows"]}
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
    versions = {name: version(name) for name in LIBRARIES}
    with Tracer(("bitsandbytes",)) as tracer:
        for name in MEASURED:
            if options.only.lower() not in name.lower():
                continue
            load = round(os.getloadavg()[0], 1)
            recipe = next(recipe for recipe in RECIPES if recipe.name == name)
            with tempfile.TemporaryDirectory(prefix="peers-") as folder:
                pair = measure(recipe, on_card[name], Path(folder), tracer)
            print(words(pair), flush=True)
            if options.write:  # each as it comes
                write(Findings(options.date, threads, versions, (load,), (pair,)))


if __name__ == "__main__":
    main()
