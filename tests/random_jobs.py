"""Random command lines over the whole schema of a job: legal, boundary and illegal values of every key."""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from unittest import mock

from annotated_types import Ge, Gt, Le, Lt
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import strategies as st

from launcher import config, contradictions
from launcher.architecture import FROM_ZERO, POSITIVE
from launcher.config import group_choices, groups, load_job
from launcher.errors import LauncherError, NoPlanFits
from launcher.job import JobSpec
from launcher.memory import MemoryEstimate
from launcher.plan import PlanChoice
from launcher.planner.interval import with_interval
from launcher.planner.relief import smallest_change
from launcher.planner.search import search
from launcher.planning import needed_libraries, resolve, with_headroom
from launcher.report.documents import plan_document
from launcher.report.tables import plan_text
from launcher.run.detect import DetectedDevice
from launcher.run.launch import prepare_run
from launcher.run_paths import RunPaths
from launcher.run_record import WorkerOrder
from tests.imagined import FakeForecaster, Law

WORDS = (
    "", "null", "a", "5", "-1", "1.5", "true", "~", "'it''s'", '"a b"', "'a\\nb'", "'$HOME'", "a/b", "/no/such",
    "[1,2]", "{a:1}", "${oops}", "\u00e9\u4e16", "'#x'", "a=b", "--x", "x" * 300, "'\\u0000'",
)  # fmt: skip
"""Values that some keys take and others must refuse."""
INTEGERS = (
    "0",
    "1",
    "2",
    "3",
    "4",
    "7",
    "8",
    "16",
    "64",
    "256",
    "1000",
    str(2**31),
    str(2**63),
    "1" + "0" * 400,
)
REALS = ("0", "0.05", "0.5", "0.999", "1", "2", "1e-300", "1e300", "nan", "inf", "-inf")
TIGHT_BYTES = (1 << 20, 3 << 20, 1 << 23)
"""About what the imagined model takes (`Law`)."""
PARSER = OverridesParser.create()
DEVICES = (DetectedDevice("NVIDIA A100-SXM4-80GB", 80 << 30),)


def fields_of(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of the schema with its annotation, groups included."""
    for name, annotation in typing.get_type_hints(kind, include_extras=True).items():
        yield prefix + name, annotation
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            yield from fields_of(annotation, f"{prefix}{name}.")


def values_of(annotation: Any) -> list[str]:
    """Legal and boundary values of an annotation, as one writes them on a command line."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = [
            bound
            for item in inner[1:]
            for bound in (getattr(item, name, None) for name in ("ge", "gt", "le", "lt"))
            if isinstance(item, Ge | Gt | Le | Lt) and bound is not None
        ]
        near = [str(bound + step) for bound in bounds for step in (-1, 0, 1)]
        return near + values_of(inner[0])
    if origin in (types.UnionType, typing.Union):
        return [value for item in inner for value in values_of(item)]
    if origin is Literal:
        return [str(item) for item in inner]
    if origin is tuple:
        some = values_of(inner[0])
        return ["[]", *(f"[{value}]" for value in some), f"[{','.join(some[:3])}]", f"[{some[-1]},{some[0]}]"]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [str(member.value) for member in annotation]
    known = {bool: ["true", "false"], int: list(INTEGERS), float: list(REALS), type(None): ["null"]}
    return known.get(annotation, list(WORDS[:8]))


LEAVES = tuple((name, values_of(kind)) for name, kind in fields_of(JobSpec) if name not in ("action", "plot"))


def override() -> st.SearchStrategy[str]:
    """One `key=value`."""
    likely = st.sampled_from(LEAVES).flatmap(
        lambda leaf: st.sampled_from(leaf[1]).map(lambda value: f"{leaf[0]}={value}")
    )
    unlikely = st.tuples(st.sampled_from(LEAVES), st.sampled_from(WORDS)).map(
        lambda pair: f"{pair[0][0]}={pair[1]}"
    )
    choice = st.sampled_from(groups()).flatmap(
        lambda group: st.sampled_from(group_choices(group)).map(lambda value: f"{group}={value}")
    )
    facts = st.tuples(st.sampled_from((*POSITIVE, *FROM_ZERO)), st.sampled_from((*INTEGERS, *WORDS[:8]))).map(
        lambda pair: f"model.architecture.{pair[0]}={pair[1]}"
    )
    price = st.sampled_from(
        ("planner.prices.l4_24g=0.8", "planner.prices.l4=-1", "hardware.sources.memory_bytes=x")
    )
    noise = st.sampled_from(WORDS)
    return st.one_of(likely, likely, likely, likely, choice, choice, unlikely, facts, st.one_of(price, noise))


def command_lines() -> st.SearchStrategy[list[str]]:
    """A command line; `action=plan`, so that nothing is asked for but the plan.

    Of any seven words or so hardly one is a job, and hardly a job is too large: so some begin with a recipe and a card,
    and some of those with a card that is hardly large enough for the model that is imagined.
    """
    some = st.lists(override(), min_size=1, max_size=7)
    recipe = st.sampled_from(group_choices("recipe")).map(lambda value: [f"recipe={value}"])
    card = st.sampled_from(group_choices("hardware")).map(lambda value: [f"hardware={value}"])
    small = st.sampled_from(TIGHT_BYTES).map(lambda size: [f"hardware.memory_bytes={size}"])
    few = st.lists(override(), max_size=2)
    sensible = st.tuples(recipe, card, few).map(lambda parts: [word for part in parts for word in part])
    tight = st.tuples(recipe, card, small, few).map(lambda parts: [word for part in parts for word in part])
    return st.one_of(some, some, sensible, tight).map(lambda words: [*words, "action=plan"])


@functools.cache
def known_hardware() -> tuple[Mapping[str, Any], ...]:
    """The built-in hardware facts, read once."""
    return tuple(config.hardware_entries())


@functools.cache
def composed(choice: str) -> dict[str, Any]:
    """The configuration with one group choice, composed by Hydra once."""
    return config._compose([choice] if choice else [])


def quickly_loaded(arguments: list[str]) -> JobSpec:
    """`load_job`, but each group choice is composed once and the keys are set by hand: a tenth of the time."""
    checked = config.check_overrides(arguments)
    read = [(argument, PARSER.parse_override(argument)) for argument in checked.accepted]
    recipes = [argument for argument, item in read if item.key_or_group == "recipes"]
    values = copy.deepcopy(composed(recipes[-1] if recipes else ""))
    for argument, item in read:
        group = item.key_or_group
        if group in groups() and group != "recipe":
            values[group] = copy.deepcopy(composed(argument)[group])
    for _, item in read:
        if item.key_or_group not in (*groups(), "recipes"):
            *parents, last = item.key_or_group.split(".")
            at: Any = values
            for name in parents:
                at = at.setdefault(name, {}) if isinstance(at, dict) else {}
            if isinstance(at, dict):
                at[last] = item.value()
    return config.read_composed(values, checked.mistakes, checked.misread).settled()


def settle(arguments: list[str], scratch: Path, load: Callable[[list[str]], JobSpec] = load_job) -> str:
    """What becomes of a command line: `plan`, `no plan fits`, or `refused`; anything else is raised.

    Everything but the tracer is the real thing: composition, limits, search, texts, and the files of the run directory.
    """
    facts = known_hardware()
    try:
        with mock.patch.object(
            contradictions, "hardware_entries", lambda: facts
        ):  # read once; the same facts
            job = resolve(load(arguments), DEVICES)
        job, _ = with_headroom(job, ())
        needed_libraries(job)
        choice = search(job, FakeForecaster(Law()))
        if choice.plan is not None and choice.estimate is not None:
            estimate: MemoryEstimate = with_interval(choice.estimate, choice.plan, job, ())
            choice = dataclasses.replace(choice, estimate=estimate)
        return _shown(job, choice, scratch)
    except LauncherError as failure:
        assert failure.message.strip() and "Traceback" not in failure.message
        assert failure.exit_code in (2, 5)
        return "refused"


def _shown(job: JobSpec, choice: PlanChoice, scratch: Path) -> str:
    assert plan_text(job, choice, 1.0)
    document = plan_document(choice, {}, 1.0, "")
    if choice.plan is None or choice.estimate is None:
        assert NoPlanFits(choice.reason, smallest_change(job, choice, FakeForecaster(Law()))).message
        return "no plan fits"
    paths = RunPaths(scratch / "run")
    prepare_run(paths, WorkerOrder(job, choice.plan, choice.estimate, "weights", "", choice.step), document)
    return "plan"
