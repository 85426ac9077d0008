"""From the command line and the YAML files to a JobSpec: the only place that knows Hydra and OmegaConf.

Hydra composes, the dataclasses of job.py are the schema. All errors of a command line are collected and reported
at once, each with the legal values; nothing is written.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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

from launcher.errors import ConfigError
from launcher.job import JobSpec
from launcher.overrides import typed_values
from launcher.reading import Reading, read_values
from launcher.resume_limits import STEERING, resume_mistake
from launcher.spellings import PEER_SPELLINGS

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


def load_job(arguments: Sequence[str]) -> JobSpec:
    """Composes the job that a command line describes.

    Args:
        arguments: Hydra overrides, `key=value`.

    Raises:
        ConfigError: With every mistake found.
    """
    return read_job(arguments).settled()


def read_job(arguments: Sequence[str], found: Sequence[str] = (), misread: Sequence[str] = ()) -> Reading:
    """Reads the job that a command line describes, as far as it can be read.

    Args:
        arguments: Hydra overrides, `key=value`.
        found: Mistakes that are known already.
        misread: Keys and groups that those mistakes are about.
    """
    checked = check_overrides(arguments)
    mistakes, keys = (*found, *checked.mistakes), (*misread, *checked.misread)
    accepted, typed = list(checked.accepted), typed_values(arguments)
    if typed.get("resume"):  # the job is the run's own
        accepted = [override for override in accepted if override.partition("=")[0] in STEERING]
        mistakes += tuple(filter(None, [resume_mistake(str(typed["resume"]), typed)]))
    try:
        composed = _compose(accepted)
    except ConfigError as failure:
        return Reading(None, (*mistakes, failure.message), frozenset(keys), failure.hint)
    return read_composed(composed, mistakes, keys)


def read_composed(
    composed: Mapping[str, Any], found: Sequence[str] = (), misread: Sequence[str] = ()
) -> Reading:
    """Reads a composed configuration; arguments as of `read_job`."""
    unknown = _unknown_keys(composed, JobSpec, "")
    reading = read_values(composed, [*found, *unknown], misread)
    return reading if reading.job is None else reading.with_mistakes(_unknown_prices(reading.job))


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
    return read_composed(values).settled()


def _unknown_prices(job: JobSpec) -> Iterator[str]:
    devices = group_choices("hardware")
    for name in job.planner.prices:
        if name not in devices:
            yield "`planner.prices`: " + _unknown_choice("hardware", name, devices)


@dataclass(frozen=True)
class CheckedOverrides:
    """A command line's overrides, each looked at alone."""

    accepted: tuple[str, ...]
    """Those that can be composed."""
    mistakes: tuple[str, ...]
    """What is wrong with the others."""
    misread: tuple[str, ...]
    """The keys and groups of those, by our names."""


def check_overrides(arguments: Sequence[str]) -> CheckedOverrides:
    """Tells overrides that can be composed from those that can't."""
    mistakes: list[str] = []
    accepted: list[str] = []
    misread: list[str] = []
    parser = OverridesParser.create()
    for argument in arguments:
        key = argument.partition("=")[0]
        if argument.startswith("-"):
            found = [_dashes(argument)]
        else:
            try:
                override = parser.parse_override(argument)
            except HydraException as failure:
                found = [_unreadable(argument, failure)]
            else:
                key = override.key_or_group
                found = list(_check_override(override, argument))
                accepted += [] if found else _translate(override, argument)
        if found:
            mistakes += found
            misread.append(_ours(key))
    return CheckedOverrides(tuple(accepted), tuple(mistakes), tuple(misread))


def _ours(key: str) -> str:
    """Our name for a key that may be spelt as other launchers do, with dashes or without."""
    name = key.lstrip("-").replace("-", "_")
    return PEER_SPELLINGS.get(name.rsplit(".", 1)[-1], name)


def _unreadable(argument: str, failure: HydraException) -> str:
    key, is_pair, _ = argument.partition("=")
    quoting = f"; a value with special characters needs quotes: `{key}='...'`" if is_pair else ""
    return f"`{argument}` is not `key=value`: {str(failure).splitlines()[0]}{quoting}"


def _dashes(argument: str) -> str:
    ours = _ours(argument.split("=")[0])
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
