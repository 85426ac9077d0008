"""Past runs: listed, filtered, exported, compared, and checked against today's libraries."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.documents import read_document, write_text
from launcher.errors import ConfigError, LaunchError, PeakMoved
from launcher.job import JobSpec
from launcher.planner.forecast import Forecaster
from launcher.planner.trace_cache import library_versions
from launcher.planner.tracer import Tracer
from launcher.planning import needed_libraries, trace_cache
from launcher.report import tables
from launcher.report.documents import record_document
from launcher.report.history import (
    EXPORTED,
    Moved,
    Side,
    check_fields,
    check_text,
    compare_fields,
    compare_text,
    export_row,
)
from launcher.report.rehearsal import record_text
from launcher.run.ledger import Ledger, find_records
from launcher.run_paths import RunPaths
from launcher.run_record import RunRecord, WorkerOrder
from launcher.workflow import Answer


def report_answer(job: JobSpec) -> Answer:
    """`action=report`: past runs.

    Raises:
        ConfigError: When a run or plan to compare is none, or no run of the recipe to check is known.
        LaunchError: When the export can't be written.
    """
    spec = job.report
    if spec.compare:
        sides = [read_side(Path(name)) for name in spec.compare]
        return Answer(compare_text(*sides), {"compare": compare_fields(*sides)})
    ledger = filtered(find_records(Path(job.run_dir or "runs")), job)
    if spec.check:
        return check_answer(job, ledger)
    runs = [record_document(record) for record in ledger.records]
    lines = [tables.runs_text(ledger.records, ledger.notes)]
    if len(ledger.records) == 1:
        lines = [record_text(ledger.records[0]), *ledger.notes]
    if spec.export:
        _export(Path(spec.export), runs)
        lines.append(f"export    {spec.export}")
    return Answer("\n".join(lines), {"runs": runs, "notes": list(ledger.notes)})


def filtered(ledger: Ledger, job: JobSpec) -> Ledger:
    """The runs that have what the report asks for."""
    spec = job.report

    def is_wanted(record: RunRecord) -> bool:
        found = (record.recipe, record.model, record.hardware, record.outcome.status.value)
        asked = (spec.recipe or spec.check, spec.model, spec.hardware, spec.status)
        return all(not name or name == value for name, value in zip(asked, found, strict=True))

    return Ledger(tuple(record for record in ledger.records if is_wanted(record)), ledger.notes)


def _export(file: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    try:
        write_text(file, exported(runs, file.suffix))
    except OSError as failure:
        raise LaunchError(
            f"`report.export={file}` can't be written: {failure.strerror or failure}",
            "report.export=<another file>",
        ) from failure


def exported(runs: Sequence[Mapping[str, Any]], suffix: str) -> str:
    """Runs as JSON, or as CSV with a row each."""
    if suffix == ".json":
        return json.dumps({"runs": list(runs)}, indent=2) + "\n"
    text = io.StringIO()
    writer = csv.DictWriter(text, EXPORTED, lineterminator="\n")
    writer.writeheader()
    writer.writerows(export_row(run) for run in runs)
    return text.getvalue()


def read_side(path: Path) -> Side:
    """A run or a plan to compare: a run directory, or a file that `output=json` printed.

    Raises:
        ConfigError: When it is neither.
    """
    try:
        if path.is_dir():
            return Side(str(path), record_document(read_document(RunPaths(path).record, RunRecord)))
        document = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(document, dict) and document.get("plan") and document.get("predicted"):
            return Side(str(path), document)
    except (LaunchError, OSError, ValueError) as failure:
        reason = failure.message if isinstance(failure, LaunchError) else str(failure)
        raise ConfigError(f"`report.compare`: `{path}` can't be read: {reason}", HINT) from failure
    raise ConfigError(f"`report.compare`: `{path}` holds no plan", HINT)


HINT = "name a run directory that has ended, or a file with what `output=json action=plan` printed"


def check_answer(job: JobSpec, ledger: Ledger) -> Answer:
    """Whether the libraries of today predict and measure what those of earlier runs did.

    The newest run of the recipe whose directory is there is predicted again; its measurement is compared with that of
    the run before it with the same plan.

    Raises:
        ConfigError: When there is no such run.
    """
    spec = job.report
    there = [record for record in ledger.records if RunPaths(Path(record.run_dir)).worker.is_file()]
    if not there:
        raise ConfigError(
            f"`report.check={spec.check}`: no run of this recipe lies in `{job.run_dir or 'runs'}`",
            f"`launch recipe={spec.check}` makes one",
        )
    newest = there[0]
    order = read_document(RunPaths(Path(newest.run_dir)).worker, WorkerOrder)
    with Tracer(needed_libraries(order.job)) as tracer:
        today = Forecaster(order.job, tracer, trace_cache(job)).estimate(newest.plan, exact=True)
    before, now = newest.predicted.peak_allocated_bytes, today.peak_allocated_bytes
    moved = [Moved("predicted", before, now, newest.versions, library_versions(), newest.run_dir)]
    notes: list[str] = []
    earlier = _earlier_run(newest, ledger)
    if newest.measured is None:
        notes.append(f"measured: nothing to compare, {newest.run_dir} ended before its meter was read")
    elif earlier is None or earlier.measured is None:
        notes.append(
            f"measured: nothing to compare, no earlier run with this plan; the newest is {newest.run_dir}"
        )
    else:
        peaks = earlier.measured.peak_allocated_bytes, newest.measured.peak_allocated_bytes
        moved.append(Moved("measured", *peaks, earlier.versions, newest.versions, earlier.run_dir))
    beyond = [item for item in moved if abs(item.share) > spec.tolerance]
    failure = None
    if beyond:
        words = ", ".join(f"{item.what} peak {item.share:+.2%}" for item in beyond)
        failure = PeakMoved(
            f"{spec.check} moved by more than {spec.tolerance:.2%}: {words}",
            "the versions that differ are listed above; `action=memory` shows where the bytes went",
        )
    text = "\n".join([check_text(spec.check, moved, spec.tolerance), *notes])
    return Answer(text, {"check": check_fields(moved), "notes": notes}, failure)


def _earlier_run(newest: RunRecord, ledger: Ledger) -> RunRecord | None:
    """The newest run but one that was measured with the same plan, model and hardware; None where there is none."""
    what = (newest.plan, newest.model, newest.hardware)
    for record in ledger.records:
        is_same = (record.plan, record.model, record.hardware) == what
        if is_same and record.measured is not None and record.run_dir != newest.run_dir:
            return record
    return None
