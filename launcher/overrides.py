"""What a command line says, key by key, before anything is composed: read by Hydra's own parser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from launcher.resume_limits import STEERING


def typed_values(arguments: Sequence[str]) -> dict[str, Any]:
    """The values of a command line's keys, by dotted key; of a key in braces, of those in it.

    Args:
        arguments: Hydra overrides, `key=value`; what is none is left out.
    """
    parser = OverridesParser.create()
    typed: dict[str, Any] = {}
    for argument in arguments:
        with suppress(HydraException):
            override = parser.parse_override(argument)
            typed |= _leaves(override.key_or_group, None if override.is_delete() else override.value())
    return typed


def resume_changes(arguments: Sequence[str]) -> dict[str, Any]:
    """What a command line with `resume=<run dir>` changes of that run's job, by dotted key; nothing without `resume`."""
    typed = typed_values(arguments)
    return {key: value for key, value in typed.items() if typed.get("resume") and key not in STEERING}


def _leaves(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {key: value}
    return {leaf: item for name in value for leaf, item in _leaves(f"{key}.{name}", value[name]).items()}
