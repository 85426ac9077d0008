"""Runs and plans side by side, and what moved between versions: for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from launcher.report.layout import aligned, wrapped
from launcher.units import format_bytes, signed_percent

EXPORTED: Final = (
    "run_dir",
    "started",
    "recipe",
    "model",
    "hardware",
    "status",
    "steps",
    "method",
    "rank",
    "max_length",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "activation_checkpointing",
    "predicted_peak_bytes",
    "measured_peak_bytes",
    "predicted_step_seconds",
    "measured_step_seconds",
    "last_loss",
)
"""Columns of the CSV file."""


@dataclass(frozen=True)
class Side:
    """One of two things that are compared."""

    name: str
    """Where it comes from."""
    document: Mapping[str, Any]
    """A plan's or a run's document."""


@dataclass(frozen=True)
class Moved:
    """A peak then and now."""

    what: str
    """`predicted` or `measured`."""
    before_bytes: int
    """Then."""
    now_bytes: int
    """Now."""
    before_versions: Mapping[str, str]
    """Libraries then."""
    now_versions: Mapping[str, str]
    """Libraries now."""
    run_dir: str
    """The run of then."""

    @property
    def share(self) -> float:
        """By how much it moved, as a share of what it was."""
        return self.now_bytes / self.before_bytes - 1


def export_row(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run's document as one row."""
    plan, outcome = run["plan"], run["outcome"]
    predicted, measured = run["predicted_as_run"] or run["predicted"], run["measured"] or {}
    row = {name: run[name] for name in ("run_dir", "started", "recipe", "model", "hardware")}
    row |= {"status": outcome["status"], "steps": outcome["steps"], "last_loss": outcome["last_loss"]}
    row |= {name: plan[name] for name in EXPORTED if name in plan}
    return row | {
        "predicted_peak_bytes": predicted["peak_allocated_bytes"],
        "measured_peak_bytes": measured.get("peak_allocated_bytes"),
        "predicted_step_seconds": predicted["step_seconds"],
        "measured_step_seconds": measured.get("step_seconds"),
    }


def compare_fields(first: Side, second: Side) -> dict[str, Any]:
    """What is different between two plans or runs; values of the first, then of the second."""
    left, right = first.document, second.document
    return {
        "sides": [first.name, second.name],
        "plan": _different(left["plan"], right["plan"]),
        "versions": _different(left.get("versions") or {}, right.get("versions") or {}),
        "predicted_by_phase_bytes": _phases(left["predicted"], right["predicted"]),
        "measured_by_phase_bytes": _phases(left.get("measured") or {}, right.get("measured") or {}),
        "predicted_by_category_bytes": _both(
            left["predicted"]["by_category_bytes"], right["predicted"]["by_category_bytes"]
        ),
        "step_seconds": [side["predicted"].get("step_seconds") for side in (left, right)],
    }


def compare_text(first: Side, second: Side) -> str:
    """Two plans or runs side by side."""
    fields = compare_fields(first, second)
    lines = [wrapped("first    ", first.name), wrapped("second   ", second.name)]
    for title in ("plan", "versions"):
        if fields[title]:
            rows = [[title, "first", "second"]]
            rows += [[f"  {name}", str(a), str(b)] for name, (a, b) in fields[title].items()]
            lines += ["", *aligned(rows)]
    if not fields["plan"]:
        lines += ["", "plan      the same"]
    for title, key in (
        ("peak of phase, predicted", "predicted_by_phase_bytes"),
        ("peak of phase, measured", "measured_by_phase_bytes"),
        ("at the highest moment", "predicted_by_category_bytes"),
    ):
        if fields[key]:
            rows = [[title, "first", "second", "change"]]
            rows += [[f"  {name}", *_bytes(a, b)] for name, (a, b) in fields[key].items() if a or b]
            lines += ["", *aligned(rows)]
    return "\n".join(lines)


def check_text(recipe: str, moved: Sequence[Moved], tolerance: float) -> str:
    """What moved, and which versions are different."""
    lines = [f"check     {recipe}, at most {tolerance:.2%}"]
    rows = [["peak", "then", "now", "change"]]
    rows += [[f"  {item.what}", *_bytes(item.before_bytes, item.now_bytes)] for item in moved]
    lines += aligned(rows)
    for item in moved:
        changed = _different(item.before_versions, item.now_versions)
        words = ", ".join(f"{name} {a} -> {b}" for name, (a, b) in changed.items()) or "the same libraries"
        lines.append(wrapped("         ", f"{item.what}: {words}, since {item.run_dir}"))
    return "\n".join(lines)


def check_fields(moved: Sequence[Moved]) -> list[dict[str, Any]]:
    """The same as plain values."""
    return [{**asdict(item), "share": item.share} for item in moved]


def _different(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: pair for name, pair in _both(left, right).items() if pair[0] != pair[1]}


def _both(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (left.get(name), right.get(name)) for name in {**left, **right}}


def _phases(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return _both(left.get("by_phase_bytes") or {}, right.get("by_phase_bytes") or {})


def _bytes(first: int | None, second: int | None) -> list[str]:
    shown = ["-" if value is None else format_bytes(value) for value in (first, second)]
    if not first or second is None:
        return [*shown, ""]
    return [*shown, f"{signed_percent(second, first):+.2f} %"]
