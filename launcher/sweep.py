"""`launch -m key=one,other`: the points of a sweep, read by Hydra's own parser; every point is a job of its own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from launcher.config import group_choices, groups, load_job
from launcher.errors import ConfigError
from launcher.job import Action, JobSpec

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
    fixed, axes = _axes([argument for argument in arguments if argument not in FLAGS])
    points, mistakes = [], dict[str, str]()
    for values in itertools.product(*axes.values()):
        swept = tuple(zip(axes, values, strict=True))
        try:
            points.append(Point(swept, load_job([*fixed, *(f"{key}={value}" for key, value in swept)])))
        except ConfigError as failure:
            mistakes[failure.message] = failure.hint
    if mistakes:
        raise ConfigError("\n".join(mistakes), next(iter(mistakes.values())))
    action = points[0].job.action
    if action is not Action.PLAN:
        raise ConfigError(
            f"action={action.value} with -m: the points of a sweep can be planned for, and nothing else",
            "action=plan",
        )
    return tuple(points)


def _axes(arguments: Sequence[str]) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Arguments with one value, and the values of the others by their key; of a key given twice the last one counts."""
    parser = OverridesParser.create()
    fixed: dict[str, str] = {}
    axes: dict[str, tuple[str, ...]] = {}
    for argument in arguments:
        try:
            override = parser.parse_override(argument)
        except HydraException:
            fixed[argument] = argument  # composing it says what is wrong
            continue
        key = override.get_key_element()
        key = SHORT.get(key, key)
        fixed.pop(key, None)
        axes.pop(key, None)
        if override.is_sweep_override():
            axes[key] = _values(override, argument)
        elif key == "hardware" and (override.value() == "any" or isinstance(override.value(), list)):
            raise ConfigError(
                f"`{argument}` with -m: devices are listed without brackets", "hardware=<one>,<other>"
            )
        else:
            fixed[key] = f"{key}={override.get_value_element_as_str()}"
    return list(fixed.values()), axes


def _values(override: Override, argument: str) -> tuple[str, ...]:
    key = override.key_or_group
    if key in NOT_SWEPT:
        raise ConfigError(f"`{argument}`: a sweep has one {key}", f"{key}=<value>")
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"`{argument}`: an interval has no end of values", f"{key}=<one>,<other>, or {key}=range(..)"
        )
    glob = override.value()
    if isinstance(glob, Glob):
        names = glob.filter(list(group_choices(key))) if key in groups() else []
        if not names:
            raise ConfigError(f"`{argument}` matches nothing", f"{key}=<one>,<other>")
        return tuple(names)
    return tuple(dict.fromkeys(override.sweep_string_iterator()))
