"""The README's figures are those of the data files under docs/accuracy, to the digits that are printed.

Each test finds a sentence by its words, and computes its numbers from bytes and seconds that were measured.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from scripts.accuracy_page import category_table

ROOT = Path(__file__).resolve().parent.parent
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def data_of(kind: str) -> Any:
    """The newest data file of a kind."""
    newest = max((ROOT / "docs" / "accuracy").glob(f"????-??-??-{kind}.json"))
    return json.loads(newest.read_text(encoding="utf-8"))


def said(sentence: str) -> tuple[float, ...]:
    """The numbers of a sentence of the README, where `#` stands for each."""
    pattern = re.escape(sentence).replace(r"\#", r"([+-]?\d[\d,]*(?:\.\d+)?)")
    match = re.search(pattern.replace(r"\ ", " "), README)
    assert match, sentence
    return tuple(float(number.replace(",", "")) for number in match.groups())


def highest_peak_errors(kind: str, what: str) -> list[float]:
    """Signed errors of the highest peak of every job that a GPU ran, percent of the measurement."""
    errors = []
    for job in data_of(kind)["jobs"]:
        if job["status"] == "skipped":
            continue
        measured = {phase: sizes[what] for phase, sizes in job["measured"].items() if sizes.get(what)}
        highest = max(measured.values())
        errors.append(100 * (max(job["predicted"][phase][what] for phase in measured) / highest - 1))
    return errors


def within(errors: list[float], percent: float) -> int:
    """How many errors are within a number of percent, once they are rounded as the pages in docs/ print them."""
    return sum(abs(round(error, 2)) <= percent for error in errors)


def largest(errors: list[float]) -> float:
    """The signed error that is largest in size."""
    return max(errors, key=abs)


def test_cpu_jobs() -> None:
    count, median, worst = said(
        "predicted against measured over # real CPU jobs; the median error of the peak is # %, the worst # %."
    )
    errors = []
    for result in data_of("cpu")["results"]:
        measured = result["measured_bytes"]
        predicted = max(result["predicted_bytes"][phase] for phase in measured)
        errors.append(100 * (predicted / max(measured.values()) - 1))
    assert count == len(errors)
    assert median == round(statistics.median(map(abs, errors)), 4)
    assert worst == round(largest(errors), 3)


def test_categories_of_cpu_jobs() -> None:
    count, close = said("of # sizes of a category # were within 4 KiB")
    lines = category_table(data_of("cpu")["results"]).splitlines()[2:]
    cells = [line.split("|") for line in lines]
    assert (count, close) == (sum(int(row[2]) for row in cells), sum(int(row[3]) for row in cells))


def test_the_first_gpu() -> None:
    count, worst, most, most_within, reserved_worst, reserved_most, reserved_within = said(
        "on an NVIDIA H200 the allocated peaks of # training jobs were within # % of the predictions, # of them "
        "within # %, what the caching allocator reserved within # %, # of them within # %"
    )
    allocated = highest_peak_errors("h200", "allocated_bytes")
    reserved = highest_peak_errors("h200", "reserved_bytes")
    assert count == len(allocated) == within(allocated, worst) == within(reserved, reserved_worst)
    assert worst == round(max(map(abs, allocated)), 2)
    assert most == within(allocated, most_within)
    assert reserved_most == within(reserved, reserved_within)


def test_the_second_gpu() -> None:
    count, allocated_within, reserved_within, exception = said(
        "on an H100, where all was a forecast, those of # other jobs within # % and # %, and one was # % lower"
    )
    allocated = highest_peak_errors("h100", "allocated_bytes")
    reserved = highest_peak_errors("h100", "reserved_bytes")
    assert count == len(allocated) - 1 == within(allocated, allocated_within)
    assert within(reserved, reserved_within) == len(reserved)
    assert exception == round(max(allocated), 1)


def test_ranks() -> None:
    count, percent, exception = said(
        "in # jobs every rank within # %, two jobs with offload # % at most; and with two ranks"
    )
    jobs = {job["name"]: [100 * error for error in job["errors"]] for job in data_of("ranks")["jobs"]}
    beyond = {name: errors for name, errors in jobs.items() if within(errors, percent) < len(errors)}
    assert count == len(jobs)
    assert len(beyond) == 2 and all("offload" in name for name in beyond)
    assert exception == round(max(map(largest, beyond.values())), 1)


def test_ranks_on_a_card() -> None:
    count, allocated_within, lowest_then, reserved_within = said(
        "with two ranks that shared one H200, over NCCL: in # jobs every rank's allocated peak within # %. What these "
        "would reserve was predicted up to # % too low; what that showed is mended, and it is within # % now"
    )
    jobs = [job for job in data_of("h200-ranks")["jobs"] if job["status"] == "done"]
    then = json.loads((ROOT / "docs/accuracy/2026-11-27-h200/first-predictions.json").read_text())
    reserved, first = [], []
    for job in jobs:
        for rank in job["measured"]:
            measured = max(phase["reserved_bytes"] for phase in rank["phases"])
            today = max(phase["reserved_bytes"] for phase in job["predicted"]["phases"])
            reserved.append(100 * (today / measured - 1))
            first.append(100 * (then["reserved_bytes"][job["name"]] / measured - 1))
    assert count == len(jobs)
    allocated = [100 * error for job in jobs for error in job["errors"]["peak"]]
    assert within(allocated, allocated_within) == 2 * count
    assert within(reserved, reserved_within) == 2 * count
    assert lowest_then == round(-min(first))


def test_speed_on_a_cpu() -> None:
    """Kendall's tau counted pair by pair."""
    median, count, tau, share = said(
        "On a CPU they were too low by # % in the median: of # plans of SmolLM2 the order had a Kendall tau of #, "
        "and the chosen one # of the speed of the fastest"
    )
    results = data_of("speed")["results"]
    times = [(result["predicted_seconds"], result["measured_seconds"]) for result in results]
    assert count == len(times) >= 12
    pairs = [(left, right) for index, left in enumerate(times) for right in times[:index]]
    agreement = sum((p1 < p2) == (m1 < m2) for (p1, m1), (p2, m2) in pairs)
    assert tau == round(2 * agreement / len(pairs) - 1, 2)
    (chosen,) = (result["measured_seconds"] for result in results if result["is_chosen"])
    assert share == round(min(measured for _, measured in times) / chosen, 2)
    assert tau >= 0.8 and share >= 0.95
    errors = [100 * (predicted / measured - 1) for predicted, measured in times]
    assert median == round(-statistics.median(errors))


def test_jobs_of_the_validation() -> None:
    from scripts.gpu_validation.jobs import JOBS

    assert said("measures # jobs on yours") == (len(JOBS),)
