"""What a rehearsal showed, what recoveries there were, and what was alive when memory ran out, for people."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.memory import HeldMemory, MemoryEstimate
from launcher.report.layout import wrapped
from launcher.report.tables import run_text
from launcher.run_record import Finding, Rehearsal, Replan, RunRecord, WorkerOutcome
from launcher.units import format_bytes, format_seconds, signed_percent


def rehearsal_text(rehearsal: Rehearsal) -> str:
    """A line for the whole, one for each phase's error, and one for each finding."""
    measured = rehearsal.measured
    largest = max(measured.shapes, key=lambda shape: shape.micro_batch_size * shape.length, default=None)
    batch = f", largest batch {largest.micro_batch_size} x {largest.length}" if largest else ""
    errors = [
        f"{phase.phase.value} {signed_percent(peak.allocated_bytes, phase.allocated_bytes):+.2f} %"
        for phase in measured.phases
        if (peak := rehearsal.predicted.phase(phase.phase)) is not None
    ]
    lines = [
        f"rehearsal in {format_seconds(rehearsal.seconds)}{batch}: peak "
        f"{format_bytes(measured.peak_allocated_bytes)}",
        wrapped("predicted", ", ".join(errors) + " off what was measured"),
    ]
    return "\n".join([*lines, *map(finding_text, rehearsal.findings)])


def finding_text(finding: Finding) -> str:
    """A finding in words."""
    measured, predicted = format_bytes(finding.measured_bytes), format_bytes(finding.predicted_bytes)
    return wrapped(
        "finding  ",
        f"{finding.phase.value} took {measured}, where {predicted} were predicted and at most "
        f"{format_bytes(finding.expected_bytes)} expected: {format_bytes(finding.category_excess_bytes)} more of "
        f"{finding.category} than predicted",
    )


def replan_text(replan: Replan) -> str:
    """A recovery in words, or what the user changed."""
    begun = f"from the checkpoint of step {replan.from_step}" if replan.from_step else "from the beginning"
    if replan.by_user:
        return wrapped("changed  ", f"by the user: {replan.change}, {begun}")
    where = replan.phase.value if replan.phase else "an unknown phase"
    what = " of the rehearsal" if replan.in_rehearsal else ""
    return wrapped("recovered", f"out of memory in {where}{what}; {replan.change}, {begun}")


def bill_at_failure(predicted: MemoryEstimate, outcome: WorkerOutcome) -> str:
    """What was to be alive at the highest moment of the phase in which memory ran out, and what the worker had then."""
    peak = predicted.phase(outcome.phase) if outcome.phase else None
    peak = peak or predicted.peak
    parts = {name.value: size for name, size in peak.by_category_bytes.items()}
    bill = f"{format_bytes(peak.allocated_bytes)} alive: {_parts_text(parts)}"
    return f"predicted at most in {peak.phase.value}: {bill}\n{_held_text(outcome.held)}"


def _held_text(held: HeldMemory | None) -> str:
    if held is None:
        return "measured: nothing, the worker was killed or could not say; only the prediction is known"
    parts = {name.value: size for name, size in held.resident_bytes.items()}
    words = []
    if held.allocated_bytes is not None:
        if parts:
            parts["all else"] = max(0, held.allocated_bytes - sum(parts.values()))
        words.append(
            f"{format_bytes(held.allocated_bytes)} in use" + (f": {_parts_text(parts)}" if parts else "")
        )
    elif parts:
        words.append(_parts_text(parts))
    if held.peak_allocated_bytes is not None:
        words.append(f"at most {format_bytes(held.peak_allocated_bytes)} in that phase")
    if held.reserved_bytes is not None:
        words.append(f"{format_bytes(held.reserved_bytes)} reserved")
    if held.process_peak_bytes is not None:
        words.append(f"the whole process had at most {format_bytes(held.process_peak_bytes)}")
    return "measured after the failure: " + ("; ".join(words) or "nothing, nobody counts it here")


def _parts_text(parts: Mapping[str, int]) -> str:
    """Parts of a sum, the largest first."""
    named = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in named if size)


def record_text(record: RunRecord) -> str:
    """A finished run: predicted beside measured, then what the rehearsal found and what was recovered from."""
    found = record.rehearsal.findings if record.rehearsal else ()
    lines = [run_text(record), *map(replan_text, record.replans), *map(finding_text, found)]
    leak = record.leak
    if leak is not None:
        lines.append(wrapped("finding  ", leak.words(None)))
    return "\n".join(lines)
