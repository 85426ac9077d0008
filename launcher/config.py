"""From the command line and the YAML files to a JobSpec: the only place that knows Hydra and OmegaConf.

Hydra composes, the dataclasses of job.py are the schema. All errors of a command line are collected and reported
at once, each with the legal values; nothing is written.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from launcher.documents import adapter
from launcher.errors import ConfigError
from launcher.job import Action, JobSpec, ReportFormat
from launcher.job_limits import job_limits
from launcher.overrides import typed_values
from launcher.redaction import secret_in
from launcher.resume_limits import STEERING, resume_mistake
from launcher.spellings import PEER_SPELLINGS

PAST = ("recipe", "model", "hardware", "status", "export", "compare", "check")
"""Keys of `report` that are about past runs."""
REPORTED = (Action.PLAN, Action.EXPLAIN, Action.MEMORY)
"""Actions that write files about a plan."""
HINT = "`launch --help` lists the groups; launcher/job.py explains every key"
LARGEST = 2**63 - 1
"""The largest number that torch, JSON readers and file systems take."""
OPEN_KEYS = ("model.architecture", "hardware.sources", "planner.prices")
"""Mappings whose keys are not ours."""


def config_root() -> Path:
    """The folder that holds conf/ and recipes/: the checkout, or the installed package."""
    package = Path(__file__).resolve().parent
    return package if (package / "conf").is_dir() else package.parent


def group_choices(group: str) -> tuple[str, ...]:
    """The choices of a config group, sorted."""
    root = config_root()
    folder = root / "recipes" if group == "recipe" else root / "conf" / group
    return tuple(sorted(file.stem for file in folder.glob("*.yaml")))


def groups() -> tuple[str, ...]:
    """The config groups."""
    return (
        "recipe",
        *sorted(folder.name for folder in (config_root() / "conf").iterdir() if folder.is_dir()),
    )


def listed_hardware(arguments: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The devices of `hardware=[one,other]` or `hardware=any`, and the other arguments; no devices where one is named.

    Raises:
        ConfigError: When a device is unknown.
    """
    listed = [item for item in arguments if item.startswith("hardware=[") or item == "hardware=any"]
    if not listed:
        return (), tuple(arguments)
    known = tuple(str(entry["name"]) for entry in hardware_entries() if entry["kind"] in ("cuda", "rocm"))
    words = listed[-1].partition("=")[2]
    names = (
        known
        if words == "any"
        else tuple(name.strip() for name in words.strip("[]").split(",") if name.strip())
    )
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ConfigError(
            f"`{listed[-1]}`: {', '.join(unknown) or 'no device'} can't be compared",
            f"legal are any, and lists of {', '.join(known)}",
        )
    return tuple(dict.fromkeys(names)), tuple(item for item in arguments if item not in listed)


def load_job(arguments: Sequence[str]) -> JobSpec:
    """Composes the job that a command line describes.

    Args:
        arguments: Hydra overrides, `key=value`.

    Raises:
        ConfigError: With every mistake found.
    """
    overrides, mistakes = _check_overrides(arguments)
    typed = typed_values(arguments)
    if typed.get("resume"):  # the job is the run's own
        overrides = [override for override in overrides if override.partition("=")[0] in STEERING]
        mistakes += filter(None, [resume_mistake(str(typed["resume"]), typed)])
    try:
        composed = _compose(overrides)
    except ConfigError as failure:
        raise _all_of([*mistakes, failure.message], failure.hint) from failure
    return job_of(composed, mistakes)


def with_changes(job: JobSpec, changes: Mapping[str, Any]) -> JobSpec:
    """A job with other values of some keys, checked as a command line is.

    Args:
        job: The job.
        changes: Values by dotted key.

    Raises:
        ConfigError: With every mistake found.
    """
    values = _plain(dataclasses.asdict(job))
    for key, value in changes.items():
        *parents, name = key.split(".")
        functools.reduce(lambda node, parent: node[parent], parents, values)[name] = value
    return job_of(values)


def job_of(composed: Mapping[str, Any], found: Sequence[str] = ()) -> JobSpec:
    """The job that a composed configuration describes.

    Args:
        composed: Values by key, as Hydra leaves them.
        found: Mistakes that are known already.

    Raises:
        ConfigError: With every mistake found.
    """
    mistakes = [*found, *_unknown_keys(composed, JobSpec, ""), *_unusable(composed, "")]
    try:
        job = adapter(JobSpec).validate_python(composed)
    except ValidationError as failure:
        mistakes += [_explain(error) for error in failure.errors()]
    else:
        mistakes += [*_missing_values(job), *job_limits(job)]
    if mistakes:
        raise _all_of(list(dict.fromkeys(mistakes)))
    return job


def _missing_values(job: JobSpec) -> Iterator[str]:
    if job.action is Action.RUN and not job.resume and not job.data.path:
        yield "`data.path` is empty: a run needs examples, `data.path=<file, folder or hub id>`"
    if job.resume and job.action is not Action.RUN:
        yield f"`resume={job.resume}` with `action={job.action}`: a run is continued by `action=run` alone"
    devices = group_choices("hardware")
    for name in job.planner.prices:
        if name not in devices:
            yield "`planner.prices`: " + _unknown_choice("hardware", name, devices)
    if job.report.format is not ReportFormat.NONE and job.action not in REPORTED:
        legal = ", ".join(action.value for action in REPORTED)
        yield f"`report={job.report.format}` with `action={job.action}`: a report is written about a plan, by {legal}"
    yield from _misplaced_report(job)
    if job.action is Action.STATUS and not job.run_dir:
        yield "`action=status` needs the run: `run_dir=<run directory>`"


def _misplaced_report(job: JobSpec) -> Iterator[str]:
    """What `report.*` asks for and can't have."""
    spec = job.report
    asked = [name for name in PAST if getattr(spec, name)]
    if asked and job.action is not Action.REPORT:
        yield f"`report.{asked[0]}` with `action={job.action}`: past runs are what `action=report` is about"
    if spec.compare and len(spec.compare) != 2:
        yield f"`report.compare` names {len(spec.compare)}: two runs or plans, as `[runs/a,runs/b]`"
    if spec.export and not spec.export.endswith((".csv", ".json")):
        yield f"`report.export={spec.export}`; legal: a file that ends in .csv or .json"


def _check_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides that can be composed, and the mistakes in the others."""
    mistakes: list[str] = []
    accepted: list[str] = []
    parser = OverridesParser.create()
    for argument in arguments:
        if argument.startswith("-"):
            mistakes.append(_dashes(argument))
            continue
        try:
            override = parser.parse_override(argument)
        except HydraException as failure:
            mistakes.append(_unreadable(argument, failure))
            continue
        found = list(_check_override(override, argument))
        mistakes += found
        if not found:
            accepted += _translate(override, argument)
    return accepted, mistakes


def _unreadable(argument: str, failure: HydraException) -> str:
    key, is_pair, _ = argument.partition("=")
    quoting = f"; a value with special characters needs quotes: `{key}='...'`" if is_pair else ""
    return f"`{argument}` is not `key=value`: {str(failure).splitlines()[0]}{quoting}"


def _dashes(argument: str) -> str:
    key = argument.lstrip("-").split("=")[0].replace("-", "_")
    ours = PEER_SPELLINGS.get(key, key)
    remedy = f"try `{ours}=...`" if ours in (*legal_keys(JobSpec), *groups()) else _unknown_key(ours)
    return f"`{argument}`: options are written `key=value` without dashes; {remedy}"


def _translate(override: Override, argument: str) -> list[str]:
    if override.key_or_group == "recipe":
        return [f"recipes={override.value()}", argument]
    if _is_open(override.key_or_group):
        return [f"++{argument.lstrip('+')}"]
    return [argument]


def _is_open(key: str) -> bool:
    return key in OPEN_KEYS or key.startswith(tuple(f"{name}." for name in OPEN_KEYS))


def _check_override(override: Override, argument: str) -> Iterator[str]:
    key = override.key_or_group
    if override.is_sweep_override():
        yield (
            f"`{argument}`: sweeps are for `launch -m`, which plans every point; otherwise give one value (in quotes if "
            "it has a comma)"
        )
    elif override.is_delete() or (override.is_add() and not _is_open(key)):
        yield f"`{argument}`: every key exists already; write `{key}=<value>`"
    elif key in groups():
        choices, value = group_choices(key), override.value()
        if value not in choices:
            yield _unknown_choice(key, value, choices)
    elif key not in set(legal_keys(JobSpec)) and not _is_open(key):
        yield _unknown_key(key)


def _unknown_choice(key: str, value: object, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(value), choices, 1)
    suggestion = f"; did you mean `{close[0]}`?" if close else ""
    return f"`{key}={value}` does not exist; legal: {', '.join(choices)}{suggestion}"


def _unknown_key(key: str) -> str:
    ours = PEER_SPELLINGS.get(key.rsplit(".", 1)[-1])
    known = [*legal_keys(JobSpec), *groups()]
    if ours is not None and ours in known:
        return f"unknown key `{key}`; here it is `{ours}`"
    parent = key.rsplit(".", 1)[0] if "." in key else ""
    siblings = [name for name in known if name.startswith(f"{parent}.")] if parent else []
    top = [name for name in known if "." not in name]
    legal = [name for name in siblings if "." not in name[len(parent) + 1 :]] or sorted({*top, *groups()})
    close = difflib.get_close_matches(key, known, 1, cutoff=0.7)
    suggestion = f"; did you mean `{close[0]}`?" if close else ""
    return f"unknown key `{key}`; legal: {', '.join(legal)}{suggestion}"


def legal_keys(kind: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields of a dataclass, nested ones included."""
    for name, field_kind in typing.get_type_hints(kind).items():
        yield prefix + name
        nested = _dataclass_of(field_kind)
        if nested is not None:
            yield from legal_keys(nested, f"{prefix}{name}.")


def _dataclass_of(kind: Any) -> type | None:
    return kind if dataclasses.is_dataclass(kind) and isinstance(kind, type) else None


def _compose(overrides: list[str]) -> dict[str, Any]:
    ConfigStore.instance().store(name="job_defaults", node=_plain(dataclasses.asdict(JobSpec())))
    OmegaConf.register_new_resolver("launcher_root", lambda: str(config_root()), replace=True)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_root() / "conf"), version_base="1.3"):
            composed = compose("config", overrides=overrides)
        container = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as failure:
        raise ConfigError(
            str(failure).strip(), "a recipe or a file under conf/ is malformed, or a value has the wrong form"
        ) from failure
    return typing.cast("dict[str, Any]", container)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _unknown_keys(values: Mapping[str, Any], kind: type, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            yield _unknown_key(prefix + name)
            continue
        nested = _dataclass_of(hints[name])
        if nested is not None and isinstance(value, Mapping):
            yield from _unknown_keys(value, nested, f"{prefix}{name}.")


def _unusable(value: object, key: str) -> Iterator[str]:
    """Numbers that nothing can be computed with, and texts that no file can have as its name."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _unusable(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _unusable(item, f"{key}.{number}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"`{key}={value}`: must be a finite number"
    elif isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        yield f"`{key}={str(value)[:20]}..`: beyond {LARGEST}, the largest 64-bit number"
    elif isinstance(value, str) and "\0" in value:
        yield f"`{key}={value!r}`: holds a NUL character"
    elif isinstance(value, str) and (found := secret_in(value)):
        yield (
            f"`{key}` holds {found}, and a job is written to its run directory: give it in the environment of `launch`, "
            "which training processes and sbatch inherit, or by `huggingface-cli login`"
        )


def _explain(error: Mapping[str, Any]) -> str:
    """One pydantic error in our words: key, value, what is legal."""
    path = [str(part) for part in error["loc"] if not _is_union_branch(str(part))]
    message = str(error["msg"])
    message = message[0].lower() + message[1:]
    legal = _legal_values(path)
    given = f"{'.'.join(path)}={error['input']}"
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
        hints = typing.get_type_hints(kind) if _dataclass_of(kind) else {}
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


def _all_of(mistakes: Sequence[str], hint: str = HINT) -> ConfigError:
    if len(mistakes) == 1:
        return ConfigError(mistakes[0], hint)
    listed = "\n".join(f"- {mistake}" for mistake in mistakes)
    return ConfigError(f"{len(mistakes)} mistakes:\n{listed}", hint)


def catalogue_entry(hub_id: str) -> Mapping[str, Any] | None:
    """The built-in facts of a hub model; None when it is not built in."""
    for file in sorted((config_root() / "conf" / "model").glob("*.yaml")):
        entry: Mapping[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        if entry["id"] == hub_id:
            return entry
    return None


def hardware_entries() -> Iterator[Mapping[str, Any]]:
    """The built-in hardware facts."""
    for file in sorted((config_root() / "conf" / "hardware").glob("*.yaml")):
        yield yaml.safe_load(file.read_text(encoding="utf-8"))
