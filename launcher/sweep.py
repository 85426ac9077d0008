"""`launch -m key=one,other`: the points of a sweep, read by Hydra's own parser; every point is a job of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from launcher.config import group_choices, groups, read_job
from launcher.errors import ConfigError
from launcher.job import Action, JobSpec, ReportFormat
from launcher.reading import listed

FLAGS = ("-m", "--multirun")
"""Hydra's names for a sweep."""
SHORT = {"max_length": "data.max_length"}
"""Short spellings that a sweep takes."""
NOT_SWEPT = ("action", "output", "run_dir", "resume", "plot", "trace_cache")
"""Keys of the command, not of the job."""


@dataclass(frozen=True)
class Point:
    """One point of a sweep."""

    swept: tuple[tuple[str, str], ...]
    """Keys with several values, and this point's."""
    job: JobSpec
    """The job there."""


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for a sweep."""
    return any(argument in FLAGS for argument in arguments)


def sweep_points(arguments: Sequence[str]) -> tuple[Point, ...]:
    """Every combination of the values of a command line, the last key turning fastest, as Hydra orders them.

    Raises:
        ConfigError: When a sweep has no end, or a point is no job that can be planned for.
    """
    axes = _read_axes([argument for argument in arguments if argument not in FLAGS])
    points, mistakes, hint = [], list(axes.mistakes), ""
    for values in itertools.product(*axes.swept.values()):
        swept = tuple(zip(axes.swept, values, strict=True))
        words = [*axes.fixed, *(f"{key}={value}" for key, value in swept)]
        reading = read_job(words, misread=axes.misread)
        reading = reading.with_mistakes(_only_planned(reading.job))
        mistakes += reading.mistakes
        hint = hint or reading.hint
        if reading.job is not None:
            points.append(Point(swept, reading.job))
    if mistakes:
        raise ConfigError(listed(tuple(dict.fromkeys(mistakes))), hint)
    return tuple(points)


def _only_planned(job: JobSpec | None) -> Iterator[str]:
    """What can't be done with the points of a sweep."""
    if job is not None and job.action is not Action.PLAN:
        yield f"action={job.action} with -m: the points of a sweep can be planned for, and nothing else; `action=plan`"
    if job is not None and job.report.format is not ReportFormat.NONE:
        yield f"report={job.report.format} with -m: a report is about one plan; one value for every key, or no report"


@dataclass(frozen=True)
class _Axes:
    """What a command line sweeps."""

    fixed: tuple[str, ...]
    """Arguments with one value."""
    swept: Mapping[str, tuple[str, ...]]
    """The values of the others by their key."""
    mistakes: tuple[str, ...]
    """What can't be swept."""
    misread: tuple[str, ...]
    """The keys of that."""


def _read_axes(arguments: Sequence[str]) -> _Axes:
    """Tells arguments with one value from those with several; of a key given twice the last one counts."""
    parser = OverridesParser.create()
    fixed: dict[str, str] = {}
    swept: dict[str, tuple[str, ...]] = {}
    mistakes: dict[str, str] = {}
    for argument in arguments:
        try:
            override = parser.parse_override(argument)
        except HydraException:
            fixed[argument] = argument  # composing it says what is wrong
            continue
        key = override.get_key_element()
        key = SHORT.get(key, key)
        for known in (fixed, swept, mistakes):
            known.pop(key, None)
        if mistake := _not_swept(key, override, argument):
            mistakes[key] = mistake
        elif override.is_sweep_override():
            swept[key] = _values(key, override)
        else:
            fixed[key] = f"{key}={override.get_value_element_as_str()}"
    return _Axes(tuple(fixed.values()), swept, tuple(mistakes.values()), tuple(mistakes))


def _not_swept(key: str, override: Override, argument: str) -> str:
    """Why an argument can't stand in a sweep; empty where it can."""
    if not override.is_sweep_override():
        is_list = isinstance(override.value(), list) or (key == "hardware" and override.value() == "any")
        what = {"hardware": "devices", "hardware.num_devices": "counts", "hardware.num_nodes": "counts"}.get(
            key
        )
        return (
            f"`{argument}` with -m: {what} are listed without brackets; `{key}=<one>,<other>`"
            if is_list and what
            else ""
        )
    if key in NOT_SWEPT:
        return f"`{argument}`: a sweep has one {key}; `{key}=<value>`"
    if not override.is_discrete_sweep():
        return f"`{argument}`: an interval has no end of values; `{key}=<one>,<other>`, or `{key}=range(..)`"
    return "" if _values(key, override) else f"`{argument}` matches nothing; `{key}=<one>,<other>`"


def _values(key: str, override: Override) -> tuple[str, ...]:
    """The values that one argument names; none where its pattern matches nothing."""
    glob = override.value()
    if isinstance(glob, Glob):
        return tuple(glob.filter(list(group_choices(key)))) if key in groups() else ()
    return tuple(dict.fromkeys(override.sweep_string_iterator()))
