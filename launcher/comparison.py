"""`hardware=[one,other]`, `hardware=any`, lists of counts: the jobs that are compared, one for each device and count."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException

from launcher.config import hardware_entries, read_job, with_changes
from launcher.errors import ConfigError
from launcher.job import Action, JobSpec, ReportFormat
from launcher.reading import LARGEST, listed

NAMES = "hardware"
"""The key that lists devices by name."""
COUNTS = ("hardware.num_devices", "hardware.num_nodes")
"""Keys that list counts."""
LISTED = (NAMES, *COUNTS)


@dataclass(frozen=True)
class ListedHardware:
    """The devices and counts that a command line lists."""

    names: tuple[str, ...] = ()
    """Devices that can be compared; none where one or none is named."""
    num_devices: tuple[int, ...] = ()
    """Devices per node; none where one count or none is given."""
    num_nodes: tuple[int, ...] = ()
    """Nodes; as above."""
    others: tuple[str, ...] = ()
    """The other arguments."""
    mistakes: tuple[str, ...] = ()
    """What is wrong with the lists."""
    misread: tuple[str, ...] = ()
    """The keys of those."""

    @property
    def is_comparison(self) -> bool:
        """Whether anything is listed, rightly or not."""
        return bool(self.names or self.num_devices or self.num_nodes or self.mistakes)

    def devices(self) -> list[dict[str, str]]:
        """The key and the name of each device; nothing, once, where none is listed."""
        return [{NAMES: name} for name in self.names] or [{}]

    def counts(self) -> list[dict[str, int]]:
        """The keys and values of each count, devices of a node turning fastest; nothing, once, where none is listed."""
        nodes = [{COUNTS[1]: count} for count in self.num_nodes] or [{}]
        devices = [{COUNTS[0]: count} for count in self.num_devices] or [{}]
        return [{**outer, **inner} for outer, inner in itertools.product(nodes, devices)]

    def points(self) -> list[list[str]]:
        """A command line for each device and count; the one given, where nothing is listed."""
        return [
            [*self.others, *_overrides({**device, **counts})]
            for device, counts in itertools.product(self.devices(), self.counts())
        ]


def listed_hardware(arguments: Sequence[str]) -> ListedHardware:
    """Finds the devices and counts that a command line lists; of a key given twice the last one counts."""
    last = {key: argument for argument in arguments if (key := _key_of(argument)) in LISTED}
    lists = {key: argument for key, argument in last.items() if _is_list(key, argument)}
    readers: dict[str, Callable[[str], tuple[tuple[str, ...], str]]] = {
        NAMES: _names,
        **dict.fromkeys(COUNTS, _counts),
    }
    values, mistakes = dict[str, tuple[str, ...]](), dict[str, str]()
    for key, argument in lists.items():
        values[key], mistake = readers[key](argument)
        mistakes |= {key: mistake} if mistake else {}
    devices, nodes = (tuple(map(int, values.get(key, ()))) for key in COUNTS)
    return ListedHardware(
        values.get(NAMES, ()),
        devices,
        nodes,
        tuple(item for item in arguments if _key_of(item) not in lists),
        tuple(mistakes.values()),
        tuple(mistakes),
    )


def compared_jobs(hardware: ListedHardware) -> list[JobSpec]:
    """The job on each of several devices, in each of several counts.

    Raises:
        ConfigError: With every mistake of the lists and of the jobs.
    """
    jobs, mistakes, hint = list[JobSpec](), list(hardware.mistakes), ""
    for device in hardware.devices():
        first, *more = hardware.counts()
        words = [*hardware.others, *_overrides(device), *_overrides(first)]
        reading = read_job(words, misread=hardware.misread)
        reading = reading.with_mistakes(_only_planned(reading.job))
        mistakes += reading.mistakes
        hint = hint or reading.hint
        if reading.job is None or mistakes:
            continue
        try:  # a job with another count is composed thirty times as fast from the first one
            jobs += [reading.job, *(with_changes(reading.job, counts) for counts in more)]
        except ConfigError as failure:
            mistakes.append(failure.message)
    if mistakes:
        raise ConfigError(listed(tuple(dict.fromkeys(mistakes))), hint)
    return jobs


def _overrides(values: Mapping[str, object]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def _only_planned(job: JobSpec | None) -> Iterator[str]:
    """What can't be done with several devices."""
    if job is not None and job.action is not Action.PLAN:
        yield (
            f"action={job.action} with several devices or counts: they can be planned for, and nothing else; "
            "`action=plan`"
        )
    if job is not None and job.report.format is not ReportFormat.NONE:
        yield (
            f"report={job.report.format} with several devices or counts: a report is about one plan on one device; "
            "`hardware=<name>` with one count, or no report"
        )


def _key_of(argument: str) -> str:
    return argument.partition("=")[0]


def _is_list(key: str, argument: str) -> bool:
    value = argument.partition("=")[2].strip()
    return value.startswith("[") or (key == NAMES and value == "any")


def _items(argument: str) -> list[object] | None:
    """The items of a list as Hydra reads them; None where it can't."""
    try:
        override: Override = OverridesParser.create().parse_override(argument)
    except HydraException:
        return None
    value = override.value()
    return value if override.type is OverrideType.CHANGE and isinstance(value, list) else None


def _names(argument: str) -> tuple[tuple[str, ...], str]:
    """Devices by their names, and what is wrong with the list."""
    known = tuple(str(entry["name"]) for entry in hardware_entries() if entry["kind"] in ("cuda", "rocm"))
    if argument.partition("=")[2].strip() == "any":
        return known, ""
    items = _items(argument)
    named = list(dict.fromkeys(map(str, items or ())))
    unknown = [name for name in named if name not in known]
    legal = f"legal are any, and lists of {', '.join(known)}"
    close = [near for name in unknown for near in difflib.get_close_matches(name, known, 1)]
    suggestion = f"; did you mean `{close[0]}`?" if close else ""
    mistake = ""
    if items is None:
        mistake = f"`{argument}` can't be read as a list; {legal}"
    elif not items:
        mistake = f"`{argument}` lists no device; {legal}"
    elif unknown:
        mistake = f"`{argument}`: {', '.join(unknown)} can't be compared; {legal}{suggestion}"
    return tuple(name for name in named if name in known), mistake


def _counts(argument: str) -> tuple[tuple[str, ...], str]:
    """Counts as they were written, and what is wrong with the list."""
    items = _items(argument)
    counts = [item for item in items or () if _is_count(item)]
    wrong = [str(item).lower() for item in items or () if not _is_count(item)]
    twice = [str(item) for item in dict.fromkeys(counts) if counts.count(item) > 1]
    legal = f"legal are whole numbers from 1 on, each once, as in `{_key_of(argument)}=[1,2,4,8]`"
    mistake = ""
    if items is None:
        mistake = f"`{argument}` can't be read as a list; {legal}"
    elif not items:
        mistake = f"`{argument}` lists no count; {legal}"
    elif wrong:
        mistake = f"`{argument}`: {', '.join(wrong)} can't be a count; {legal}"
    elif twice:
        mistake = f"`{argument}`: {', '.join(twice)} is there twice; {legal}"
    return tuple(str(item) for item in dict.fromkeys(counts)), mistake


def _is_count(item: object) -> bool:
    return isinstance(item, int) and not isinstance(item, bool) and 1 <= item <= LARGEST
