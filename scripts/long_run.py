"""A day's worth of optimizer steps of a tiny model: does the memory of the launcher or of the worker grow?

17,280 steps are a day at five seconds a step. The resident memory of both processes is read every few seconds, by the
kernel's account; the slope is Theil and Sen's (the median over all pairs of readings) over the second half of the run,
when every buffer has its size.

    python -m scripts.long_run                    prints the slopes
    python -m scripts.long_run --write            also writes docs/accuracy/<date>-long-run.json
    python -m scripts.long_run --steps 2000
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import psutil

from launcher.documents import read_lines
from launcher.run_paths import RunPaths
from scripts.endurance import ARCHITECTURE, LAUNCHER, LIBRARIES, ROOT, start
from scripts.small_text import write_small_model

DAY_STEPS = 17_280
READ_SECONDS = 3.0


def command(folder: Path, run_dir: Path, steps: int) -> list[str]:
    """The command line of the job."""
    job = [
        f"model.path={folder}",
        f"data.path={folder / 'train.jsonl'}",
        "data.format=text",
        "data.max_length=32",
        "data.packing=true",
        "training.global_batch_size=1",
        f"training.max_steps={steps}",
        "training.save_steps=500",
        "training.save_total_limit=2",
        "training.precision=fp32",
        "training.logging_steps=10",
        "hardware=cpu",
        f"trace_cache={folder / 'traces'}",
        f"run_dir={run_dir}",
        "launch.rehearse=false",
    ]
    return [*LAUNCHER, *job]


def last_step(metrics: Path) -> int:
    """The last logged step; 0 before the first."""
    return max((int(line["step"]) for line in read_lines(metrics)), default=0)


def slope(readings: list[tuple[int, int]]) -> float:
    """Bytes per 1,000 steps, by Theil and Sen.

    Args:
        readings: Steps and bytes.
    """
    slopes = [(b - a) / (m - n) for (n, a), (m, b) in combinations(readings, 2) if m != n]
    return 1000.0 * statistics.median(slopes)


def watch(child: subprocess.Popen[bytes], paths: RunPaths) -> dict[str, list[tuple[int, int]]]:
    """Reads the memory of launcher and worker until the launcher ends."""
    readings: dict[str, list[tuple[int, int]]] = {"launcher": [], "worker": []}
    while child.poll() is None:
        time.sleep(READ_SECONDS)
        step = last_step(paths.metrics)
        if not step:
            continue
        with suppress(psutil.Error, OSError, ValueError):
            worker = int(paths.pid(0).read_text(encoding="ascii"))
            pair = [psutil.Process(pid).memory_info().rss for pid in (child.pid, worker)]
            readings["launcher"].append((step, pair[0]))
            readings["worker"].append((step, pair[1]))
    return readings


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=DAY_STEPS)
    parser.add_argument("--write", action="store_true", help="write docs/accuracy/<date>-long-run.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="long-run-") as name:
        folder = Path(name)
        write_small_model(
            folder, {**ARCHITECTURE, "num_hidden_layers": 1, "hidden_size": 64}, "text " * 40, 400
        )
        paths, log = RunPaths(folder / "run"), folder / "log"
        child = start(command(folder, paths.root, options.steps), log)
        readings = watch(child, paths)
        if child.returncode:
            raise SystemExit(log.read_text(encoding="utf-8", errors="replace")[-4000:])
    found = {}
    for who, pairs in readings.items():
        settled = [pair for pair in pairs if pair[0] > options.steps // 2]
        found[who] = {
            "bytes_per_1000_steps": slope(settled),
            "first_bytes": settled[0][1],
            "last_bytes": settled[-1][1],
            "num_readings": len(settled),
        }
        print(
            f"{who:<9} {found[who]['bytes_per_1000_steps'] / 1024:+.1f} KiB per 1,000 steps, "
            f"{settled[0][1] / 2**20:.1f} MiB at step {settled[0][0]}, {settled[-1][1] / 2**20:.1f} MiB at step "
            f"{settled[-1][0]}"
        )
    if options.write:
        now = datetime.now(UTC).date().isoformat()
        document = {
            "date": now,
            "steps": options.steps,
            "versions": {name: version(name) for name in LIBRARIES},
            "python": sys.version.split()[0],
            **found,
        }
        file = ROOT / "docs" / "accuracy" / f"{now}-long-run.json"
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
