"""Predicted against measured memory on one CUDA card, over real training of random weights; no network, no downloads.

    python -m scripts.gpu_validation --out results.json          all jobs, most informative first, for nine minutes
    python -m scripts.gpu_validation --out results.json          again: what is left, and once more what failed
    python -m scripts.gpu_validation --table results.json        the comparison as a markdown table
    python -m scripts.gpu_validation --evidence results.json     what the planner's intervals rest on, from a results file
    python -m scripts.gpu_validation --repredict results.json    today's predictions in place of those in the file
    python -m scripts.gpu_validation --dry-run --hardware h100_80g   only predicts, on any machine
    python -m scripts.gpu_validation --cpu --out results.json    two tiny jobs on a CPU, through the same code

Predictions are made on the CPU while the card works. Each job has a process of its own, which trains with the
launcher's own loop and is measured by the launcher's own meter; the file is written after each. Besides, the three
jobs that are furthest off run again with a timeline of all allocations, beside the results file.

It needs torch, transformers, peft, accelerate, pyyaml and nvidia-ml-py, and what wheels.txt lists.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from launcher.documents import read_document
from launcher.errors import LauncherError
from scripts.gpu_validation.jobs import CPU_JOBS, JOBS, ROOT, ValidationJob
from scripts.gpu_validation.orders import Answer
from scripts.gpu_validation.results import PHASES, Results, residuals, summary, table
from scripts.gpu_validation.schedule import (
    Order,
    detect_hardware,
    dry_run,
    named_hardware,
    predict_again,
    reason_against,
    validate,
)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.gpu_validation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="results file; one that exists is continued")
    parser.add_argument("--budget-seconds", type=float, default=540.0, help="for everything")
    parser.add_argument("--limit-seconds", type=float, default=45.0, help="for each job")
    parser.add_argument("--only", type=int, nargs="+", help="the jobs of these numbers, from 0")
    parser.add_argument("--no-timelines", action="store_true", help="no timelines of the worst jobs")
    parser.add_argument("--cpu", action="store_true", help="two tiny jobs on a CPU")
    parser.add_argument("--dry-run", action="store_true", help="only predict")
    parser.add_argument("--hardware", default="h100_80g", help="for --dry-run: a file of conf/hardware")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a results file")
    parser.add_argument(
        "--evidence", type=Path, metavar="FILE", help="make the planner's evidence of a results file"
    )
    parser.add_argument("--repredict", type=Path, metavar="FILE", help="predict a results file's jobs again")
    return parser


def main() -> int:
    """Entry point."""
    parser = arguments()
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that children end with us
    listed = CPU_JOBS if options.cpu else JOBS
    jobs = listed if options.only is None else tuple(listed[number] for number in options.only)
    try:
        with tempfile.TemporaryDirectory() as folder:
            if options.dry_run:
                return _print_dry_run(jobs, options.hardware, Path(folder))
            if options.table is not None:
                results = read_document(options.table, Results)
            elif options.evidence is not None:
                results = read_document(options.evidence, Results)
                _write_evidence(results, options.evidence.stem)
            elif options.repredict is not None:
                results = predict_again(options.repredict, Path(folder))
            elif options.out is not None:
                results = _validate(options, jobs, Path(folder))
            else:
                parser.error("one of --out, --table, --evidence, --repredict and --dry-run is needed")
    except LauncherError as failure:
        print(failure, file=sys.stderr)
        return failure.exit_code
    print(table(results))
    print(summary(results))
    return 0


def _validate(options: argparse.Namespace, jobs: tuple[ValidationJob, ...], folder: Path) -> Results:
    order = Order(
        out=options.out,
        jobs=jobs,
        hardware=detect_hardware(cpu=options.cpu),
        budget_seconds=options.budget_seconds,
        limit_seconds=options.limit_seconds,
        timelines=not (options.cpu or options.no_timelines),
    )
    return validate(order, folder, lambda words: print(words, file=sys.stderr, flush=True))


def _write_evidence(results: Results, name: str) -> None:
    text = json.dumps([asdict(residual) for residual in residuals(results)], indent=1) + "\n"
    (ROOT / "launcher" / "planner" / "evidence" / f"{name}.json").write_text(text, encoding="utf-8")


def _print_dry_run(jobs: tuple[ValidationJob, ...], hardware_name: str, folder: Path) -> int:
    hardware = named_hardware(hardware_name)
    answers = dry_run(jobs, hardware, folder)
    print(f"| job on {hardware.product} | device, GiB | " + " | ".join(PHASES) + " | |")
    print("|---|--:|" + "--:|" * len(PHASES) + "---|")
    for answer in answers:
        print(_dry_row(answer, reason_against(answer.prediction, hardware) if answer.prediction else None))
    return int(any(answer.prediction is None for answer in answers))


def _dry_row(answer: Answer, shortage: str | None) -> str:
    prediction = answer.prediction
    if prediction is None:
        return f"| {answer.name} | | " + "| " * len(PHASES) + f"| {' '.join(answer.message.split())} |"
    peaks = [
        f"{prediction.phases[phase].allocated_bytes / 2**30:.3f}" if phase in prediction.phases else ""
        for phase in PHASES
    ]
    cells = [answer.name, f"{prediction.device_bytes / 2**30:.3f}", *peaks, shortage or ""]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
