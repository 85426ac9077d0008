"""From a configuration's values to a JobSpec, with every mistake found: each once, with the legal values.

A value that can't be read hides no other mistake: its key stands at its default, and what is said of the job afterwards
counts unless it may rest on that.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from pydantic import ValidationError

from launcher.documents import adapter
from launcher.errors import ConfigError
from launcher.job import JobSpec, OffloadDevice
from launcher.job_limits import job_limits
from launcher.optimisation import PAGED_OPTIMIZERS
from launcher.redaction import secret_in

HINT = "`launch --help` lists the groups; launcher/job.py explains every key"
LARGEST = 2**63 - 1
"""The largest number that torch, JSON readers and file systems take."""
Path = tuple[Any, ...]
"""Where a value stands: names and, in lists, numbers."""


@dataclass(frozen=True)
class Reading:
    """What a command line says, as far as it could be read."""

    job: JobSpec | None
    """The job, with defaults in the place of what could not be read; None where nothing could."""
    mistakes: tuple[str, ...] = ()
    """What is wrong, a sentence each."""
    misread: frozenset[str] = frozenset()
    """Keys and groups whose values could not be read."""
    hint: str = HINT
    """What to do about the mistakes."""

    def with_mistakes(self, more: Iterable[str]) -> Reading:
        """The same with more that is wrong with the job, but for what may rest on a default."""
        known = [mistake for mistake in more if not self._may_rest_on_a_default(mistake)]
        return replace(self, mistakes=tuple(dict.fromkeys([*self.mistakes, *known])))

    def settled(self) -> JobSpec:
        """The job.

        Raises:
            ConfigError: With every mistake, when there is one.
        """
        if self.job is None or self.mistakes:
            raise ConfigError(listed(self.mistakes), self.hint)
        return self.job

    def _may_rest_on_a_default(self, mistake: str) -> bool:
        """Whether a mistake names a key that was misread; all do where the recipe was."""
        return "recipe" in self.misread or any(_names(mistake, key) for key in self.misread if key)


def listed(mistakes: Sequence[str]) -> str:
    """Mistakes as one message."""
    if len(mistakes) == 1:
        return mistakes[0]
    return "\n- ".join([f"{len(mistakes)} mistakes:", *mistakes])


def _names(mistake: str, key: str) -> bool:
    """Whether a text names a key, one below it, or, for the name of a group's choice, the group."""
    group = key.removesuffix(".name")
    return re.search(rf"(?<![\w.]){re.escape(group)}(?!\w)", mistake) is not None


def read_values(values: Mapping[str, Any], found: Iterable[str] = (), misread: Iterable[str] = ()) -> Reading:
    """Reads a composed configuration.

    Args:
        values: Values by key, as Hydra leaves them.
        found: Mistakes that are known already.
        misread: Keys and groups whose values those mistakes are about.
    """
    wrong = dict(_unusable(values, ()))
    usable = _without(values, wrong)
    job: JobSpec | None = None
    try:
        job = adapter(JobSpec).validate_python(usable)
    except ValidationError as failure:
        refused = _explained(failure.errors())
        wrong |= refused
        job = _valid_part(_without(usable, refused))
    if job is not None:
        pin = job.planner.pin
        can_resume = pin.offload_device is not OffloadDevice.NVME and pin.optimizer not in PAGED_OPTIMIZERS
        job = replace(job, training=job.training.with_saves_settled(can_resume))
    keys = frozenset([*misread, *(".".join(map(str, path)) for path in wrong)])
    reading = Reading(job, tuple(dict.fromkeys([*found, *wrong.values()])), keys)
    return reading if job is None else reading.with_mistakes(job_limits(job))


def _valid_part(values: Mapping[str, Any]) -> JobSpec | None:
    try:
        return adapter(JobSpec).validate_python(values)
    except ValidationError:
        return None


def _without(values: Mapping[str, Any], paths: Iterable[Path]) -> Mapping[str, Any]:
    """Values without those at some paths; of a list that holds one, without the list."""
    for path in paths:
        values = _without_one(values, path)
    return values


def _without_one(values: Mapping[Any, Any], path: Path) -> Mapping[Any, Any]:
    name, *rest = path
    left = dict(values)
    if rest and isinstance(left.get(name), Mapping):
        left[name] = _without_one(left[name], tuple(rest))
    else:
        left.pop(name, None)
    return left


def _unusable(value: object, path: Path) -> Iterator[tuple[Path, str]]:
    """Numbers that nothing can be computed with, and texts that no file can have as its name."""
    key = ".".join(map(str, path))
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _unusable(item, (*path, name))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _unusable(item, (*path, number))
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, f"`{key}={value}`: must be a finite number"
    elif isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        yield path, f"`{key}={str(value)[:20]}..`: beyond {LARGEST}, the largest 64-bit number"
    elif isinstance(value, str) and "\0" in value:
        yield path, f"`{key}={value!r}`: holds a NUL character"
    elif isinstance(value, str) and (found := secret_in(value)):
        yield (
            path,
            f"`{key}` holds {found}, and a job is written to its run directory: give it in the environment of `launch`, "
            "which training processes and sbatch inherit, or by `huggingface-cli login`",
        )


def _explained(errors: Iterable[Mapping[str, Any]]) -> dict[Path, str]:
    """Pydantic's errors in our words, by path: one for all forms that a value could have had."""
    by_path: dict[Path, list[Mapping[str, Any]]] = {}
    for error in errors:
        path = tuple(part for part in error["loc"] if not _is_union_branch(str(part)))
        by_path.setdefault(path, []).append(error)
    # what is wrong with an item of a list says more than that the list is no text
    innermost = [
        path
        for path in by_path
        if not any(len(other) > len(path) and other[: len(path)] == path for other in by_path)
    ]
    return {path: _explain(path, by_path[path]) for path in innermost}


def _explain(path: Path, errors: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong with one value: key, value, what is legal."""
    texts = [str(error["msg"]) for error in errors]
    first, *others = dict.fromkeys(text[0].lower() + text[1:] for text in texts)
    message = ", or ".join([first, *(other.removeprefix("input should be ") for other in others)])
    names = [str(part) for part in path]
    legal = _legal_values(names)
    given = f"{'.'.join(names)}={errors[0]['input']}"
    return f"`{given}`: {message}" + (f"; legal: {legal}" if legal else "")


def _is_union_branch(part: str) -> bool:
    return part.startswith(("constrained-", "tuple[", "function-", "literal[")) or part in (
        "str",
        "int",
        "float",
    )


def _legal_values(path: Sequence[str]) -> str:
    kind: Any = JobSpec
    for part in path:
        if part.isdigit():
            kind = next((item for item in typing.get_args(kind) if item is not Ellipsis), kind)
            continue
        hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if part not in hints:
            return ""
        kind = hints[part]
    return ", ".join(_members(kind))


def _members(kind: Any) -> Iterator[str]:
    if isinstance(kind, type) and issubclass(kind, Enum):
        yield from (str(member.value) for member in kind)
    elif isinstance(kind, types.UnionType) or typing.get_origin(kind) is tuple:
        for item in typing.get_args(kind):
            yield from _members(item)
