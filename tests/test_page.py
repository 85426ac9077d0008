"""The what-if page in a real browser: its numbers are the planner's, it asks no network, it fits narrow and wide screens.

Everything about the browser skips, with the reason, where Chromium or Playwright is absent.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.config import load_job
from launcher.errors import ConfigError
from launcher.explanation import AtCapacity, Change, Explanation
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import (
    Attention,
    Checkpointing,
    DataSpec,
    JobSpec,
    Loss,
    Method,
    ModelSpec,
    Optimizer,
    PlannerSpec,
    Precision,
    ReportFormat,
    ReportSpec,
    TrainingSpec,
)
from launcher.memory import Category, Phase, Timeline
from launcher.plan import Grade, Plan, PlanChoice, Rejection, Squeeze
from launcher.planner.bill import build_bill
from launcher.planner.forecast import Forecaster
from launcher.planner.surfaces import at, what_if
from launcher.planner.trace_cache import TraceCache
from launcher.planner.tracer import Tracer
from launcher.publish import report_file
from launcher.report.findings import Findings
from launcher.report.html import inline_script, page, script_json
from launcher.report.plot import pictures
from tests.tiny_job import ARCHITECTURE

ROOT = Path(__file__).resolve().parent.parent
EVIL = '</script><script>window.evil = 1</script><img src=x onerror="window.evil = 2">& "quoted" \'too\' <!-- $title'
"""A name that breaks careless pages."""
GIB = 1 << 30


def tiny_job(kind: DeviceKind) -> tuple[JobSpec, Plan]:
    """A small Llama on an imagined device, with regimes on both sides of every line."""
    on_gpu = kind is DeviceKind.CUDA
    hardware = HardwareSpec(
        name="imagined",
        kind=kind,
        product=EVIL,
        memory_bytes=192 << 20,
        context_bytes=7_654_321 if on_gpu else 0,
        blas_workspace_bytes=8_519_680 if on_gpu else 0,
        host_memory_bytes=4 * GIB if on_gpu else 0,
        supports_flash_attention=on_gpu,
        compute_capability="8.0" if on_gpu else "",
    )
    job = JobSpec(
        recipe=EVIL,
        model=ModelSpec(path=EVIL, architecture=ARCHITECTURE),
        data=DataSpec(max_length=256),
        training=TrainingSpec(
            global_batch_size=12,
            optimizer=Optimizer.PAGED_ADAMW_8BIT if on_gpu else Optimizer.ADAMW_TORCH,
            save_steps=1,
        ),
        hardware=hardware,
        planner=PlannerSpec(headroom=0.05),
    )
    plan = Plan(
        method=Method.LORA,
        rank=8,
        max_length=256,
        micro_batch_size=4,
        gradient_accumulation_steps=3,
        activation_checkpointing=Checkpointing.NONE,
        attention=Attention.SDPA,
        loss=Loss.CHUNKED,
        optimizer=job.training.optimizer,
        precision=Precision.BF16,
    )
    return job, plan


def found_out(job: JobSpec, plan: Plan, forecaster: Forecaster) -> Findings:
    """All that a page says, of a plan that nobody searched for."""
    estimate = forecaster.estimate(plan, exact=True)
    bill = build_bill(forecaster.stream(plan))
    rejected = Rejection(replace(plan, micro_batch_size=12, gradient_accumulation_steps=1), EVIL, 5, 7)
    headroom = round(0.05 * job.hardware.memory_bytes)
    choice = PlanChoice(plan, EVIL, estimate, None, None, (rejected,), job.hardware.memory_bytes, headroom, 2)
    squeezed = Squeeze(
        Grade.TIGHT, 5, 0.1, ("activation_checkpointing=selective", "optimizer=paged_adamw_8bit"), EVIL
    )
    changes = (
        Change("method", EVIL, replace(plan, rank=4), True, 7 << 20, 1.25, True),
        Change("loss", "chunked -> plain", plan, False, -(9 << 20), 0.5, False),
        Change("optimizer", "to something", plan, True, None, None, False, EVIL),
    )
    capacities = (
        AtCapacity(0.5, 96 << 20, None, -1, None, EVIL),
        AtCapacity(2.0, 384 << 20, plan, 0, 1234.0, ""),
    )
    choice = replace(choice, squeeze=squeezed)
    measured = Timeline(tuple(size + 1000 for size in bill.step.allocated_bytes), bill.step.phases)
    return Findings(
        job=job,
        plan=plan,
        estimate=estimate,
        capacity_bytes=job.hardware.memory_bytes,
        headroom_bytes=headroom,
        choice=choice,
        explanation=Explanation(changes, capacities, EVIL, squeezed),
        bill=bill,
        measured=measured,
        what_if=what_if(job, plan, forecaster, [("twice", 384 << 20), ("half", 96 << 20)]),
        notes=(EVIL,),
        versions={EVIL: "1"},
    )


@dataclass(frozen=True)
class Written:
    """A page, and the planner that it must agree with."""

    file: Path
    findings: Findings
    forecaster: Forecaster


@pytest.fixture(scope="module")
def tracer() -> Iterator[Tracer]:
    with Tracer(("bitsandbytes",)) as started:
        yield started


@pytest.fixture(scope="module")
def written(tracer: Tracer, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The page of a job on a GPU: workspaces, paged states, resume and host memory are all in it."""
    job, plan = tiny_job(DeviceKind.CUDA)
    forecaster = Forecaster(job, tracer, TraceCache(None))
    findings = found_out(job, plan, forecaster)
    file = tmp_path_factory.mktemp("a b & #") / "what if.html"
    file.write_text(page(findings), encoding="utf-8")
    return Written(file, findings, forecaster)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is absent (the extra `dev` has it)"
    )
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@dataclass
class Opened:
    """The page as a browser shows it, with everything that it complained of or asked for."""

    page: Any
    complaints: list[str]
    requests: list[str]


def opened(browser: Any, file: Path, **context: Any) -> Opened:
    shown = Opened(browser.new_context(**context).new_page(), [], [])
    shown.page.set_default_timeout(180_000)  # a machine may be busy
    shown.page.on("console", lambda message: shown.complaints.append(message.text))
    shown.page.on("pageerror", lambda error: shown.complaints.append(str(error)))
    shown.page.on("request", lambda request: shown.requests.append(request.url))
    shown.page.goto(file.as_uri())
    shown.page.wait_for_selector("#step-chart .main-svg")
    return shown


@pytest.fixture(scope="module")
def wide(browser: Any, written: Written) -> Opened:
    return opened(browser, written.file, viewport={"width": 1400, "height": 900})


def slide(shown: Opened, name: str, value: int) -> None:
    """Moves a slider as a hand does."""
    shown.page.locator(f"#{name}").evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', {bubbles: true})); }",
        value,
    )


def type_into(shown: Opened, name: str, value: str) -> None:
    shown.page.locator(f"#{name}").fill(value)
    shown.page.locator(f"#{name}").press("Tab")


def rows(shown: Opened, name: str, key: str) -> dict[str, int]:
    found = shown.page.locator(f"#{name} tr").evaluate_all(
        f"rows => rows.map(row => [row.dataset.{key}, row.dataset.bytes])"
    )
    return {key: int(size) for key, size in found}


def test_the_page_opens_from_a_file_and_asks_for_nothing(wide: Opened, written: Written) -> None:
    assert wide.complaints == []
    assert [url for url in wide.requests if not url.startswith(("data:", "blob:"))] == [written.file.as_uri()]
    assert wide.page.evaluate("window.evil") is None
    assert EVIL in wide.page.locator("h1").inner_text()
    assert wide.page.locator("img[src=x]").count() == 0


@pytest.mark.parametrize(
    ("number", "length", "card"),
    [
        (0, 256, 0),
        (0, 1024, 1),
        (1, 200, 1),
        (2, 513, 2),
        (3, 256, 1),
        (4, 1007, 1),
        (5, 512, 2),
        (6, 131, 0),
        (7, 1024, 1),
    ],
)
def test_sliders_say_what_the_planner_says(
    wide: Opened, written: Written, number: int, length: int, card: int
) -> None:
    findings, what = written.findings, written.findings.what_if
    split, memory = what.splits[number], what.cards[card].memory_bytes
    slide(wide, "batch", number)
    type_into(wide, "length-number", str(length))
    slide(wide, "card", card)
    estimate = written.forecaster.estimate(at(findings.plan, split, length))
    assert rows(wide, "phases", "phase") == {p.phase.value: p.allocated_bytes for p in estimate.phases}
    parts = {name.value: size for name, size in estimate.peak.by_category_bytes.items() if size}
    assert rows(wide, "parts", "category") == {**parts, "context": 7_654_321}
    assert int(wide.page.locator("#device-bytes").get_attribute("data-bytes")) == estimate.peak_device_bytes
    fits = estimate.peak_device_bytes <= memory - round(0.05 * memory)
    assert wide.page.locator("#answer").get_attribute("class") == f"answer {'fits' if fits else 'over'}"
    keys = wide.page.locator("#overrides").inner_text()
    assert (
        f"planner.pin.micro_batch_size={split.micro_batch_size} " in keys and f"max_length={length}" in keys
    )
    assert ("hardware.memory_bytes" in keys) is (memory != findings.capacity_bytes)
    assert ("global_batch_size" in keys) is (split.global_batch_size != 12)


def test_the_map_is_the_same_with_and_without_scripts(browser: Any, wide: Opened, written: Written) -> None:
    wide.page.locator("#reset").click()
    cells = "cells => cells.map(cell => [cell.textContent, cell.className])"
    moved = wide.page.locator("#map-body button").evaluate_all(cells)
    still = browser.new_context(java_script_enabled=False).new_page()
    still.goto(written.file.as_uri())
    texts = still.locator("#map-body button").all_inner_texts()
    assert [text.split() for text in texts] == [
        text.split() for text in wide.page.locator("#map-body button").all_inner_texts()
    ]
    assert {kind for _, kind in moved} == {"fits", "over"}
    what = written.findings.what_if
    assert len(moved) == len(what.points) == len(what.splits) * len(what.lengths) > 40
    assert still.locator("#step img").is_visible() and not still.locator("#what-if").is_visible()
    still.context.close()


def test_a_click_on_the_map_moves_the_sliders(wide: Opened, written: Written) -> None:
    wide.page.locator('#map-body button[data-split="2"][data-length="512"]').click()
    assert wide.page.locator("#length-number").input_value() == "512"
    assert wide.page.locator("#batch-value").inner_text() == str(
        written.findings.what_if.splits[2].micro_batch_size
    )
    wide.page.locator("#reset").click()
    assert wide.page.locator("#plan-note").is_visible()


def test_what_the_page_does_not_hold_has_no_number(browser: Any, written: Written, tmp_path: Path) -> None:
    findings = written.findings
    held = findings.what_if
    holes = replace(held, regimes=held.regimes[:1], gaps=(), points=held.points)
    file = tmp_path / "holes.html"
    file.write_text(page(replace(findings, what_if=holes)), encoding="utf-8")
    shown = opened(browser, file)
    assert shown.page.locator("#answer-known").is_visible()
    slide(shown, "batch", 0)
    assert "No number" in shown.page.locator("#answer-gap").inner_text()
    assert not shown.page.locator("#answer-known").is_visible()
    assert shown.page.locator("#map-body button.unknown").count() > 10
    assert shown.complaints == []
    shown.page.context.close()


def test_a_length_that_is_none_changes_nothing(wide: Opened) -> None:
    wide.page.locator("#reset").click()
    before = wide.page.locator("#device-bytes").inner_text()
    for wrong in ("", "-5", "1e9"):
        type_into(wide, "length-number", wrong)
        assert wide.page.locator("#device-bytes").inner_text() == before
        assert wide.page.locator("#length-number").get_attribute("aria-invalid") == "true"


CHARTS_FOLLOW = """isLight => {
    const text = document.querySelector('#step-chart .legendtext');
    const parts = getComputedStyle(text).fill.match(/\\d+/g).slice(0, 3).map(Number);
    return (parts.reduce((sum, part) => sum + part) / 3 < 128) === isLight;
}"""
"""Whether the charts' ink is dark on a light page and light on a dark one; they are drawn anew a moment after it."""


def test_nothing_overflows_narrow_or_wide_light_or_dark(browser: Any, wide: Opened, written: Written) -> None:
    narrow = opened(browser, written.file, viewport={"width": 360, "height": 800}, color_scheme="dark")
    for shown, width in ((narrow, 360), (wide, 1400)):
        for scheme in ("dark", "light"):
            shown.page.emulate_media(color_scheme=scheme)
            assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
            background = shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
            brightness = sum(int(part) for part in background.strip("rgb()").split(",")) / 3
            assert (brightness > 128) is (scheme == "light")
            shown.page.wait_for_function(CHARTS_FOLLOW, arg=scheme == "light", timeout=20_000)
    assert narrow.complaints == wide.complaints == []
    narrow.page.context.close()


# without a browser


def test_the_rows_are_the_planners_prices_between_the_maps_points_too(written: Written) -> None:
    what, plan, forecaster = written.findings.what_if, written.findings.plan, written.forecaster
    assert what.gaps == () and len(what.regimes) == 5
    dice = np.random.default_rng(5)
    for _ in range(60):
        split = what.splits[dice.integers(len(what.splits))]
        length = int(dice.integers(what.lengths[0], what.lengths[-1] + 1))
        batch, steps = split.micro_batch_size, split.gradient_accumulation_steps
        (regime,) = [item for item in what.regimes if item.answers(batch, length, steps)]
        priced = forecaster.estimate(at(plan, split, length))
        more = steps - regime.traced_accumulation
        assert regime.device.peaks(batch, length, more) == priced.phases
        assert regime.host is not None and priced.host is not None
        assert regime.host.peaks(batch, length, more) == priced.host.phases
    assert {peak.phase for peak in priced.phases} >= {Phase.LOAD, Phase.RESUME, Phase.TRAIN_STEP, Phase.SAVE}


def test_a_job_on_a_cpu_has_the_copy_of_its_weights_while_it_loads(tracer: Tracer) -> None:
    job, plan = tiny_job(DeviceKind.CPU)
    job = replace(job, training=replace(job.training, global_batch_size=1))
    plan = replace(plan, micro_batch_size=1, gradient_accumulation_steps=1, method=Method.FULL, rank=0)
    what = what_if(job, plan, Forecaster(job, tracer, TraceCache(None)), [])
    assert what.gaps == ()
    load = what.regimes[0].device.peaks(1, 64, 0)[0]
    assert load.phase is Phase.LOAD and load.by_category_bytes[Category.TEMPORARIES] > 0
    assert all(point.estimate is not None for point in what.points)


def test_pictures_are_png(written: Written) -> None:
    drawn = pictures(written.findings)
    assert sorted(drawn) == ["bill", "fits", "step"]
    assert all(png.startswith(b"\x89PNG") and len(png) > 5000 for png in drawn.values())


def test_scripts_and_json_cannot_end_their_element() -> None:
    text = script_json({"name": EVIL})
    assert "<" not in text and json.loads(text) == {"name": EVIL}
    assert "</script" not in inline_script('a = "</SCRIPT>"; b = "<!-- <script"').lower()


def test_names_are_escaped_everywhere(written: Written) -> None:
    text = written.file.read_text(encoding="utf-8")
    body = text[: text.index('<script type="application/json"')]
    assert "<img src=x" not in body and "window.evil = 1</script>" not in body
    assert body.count("&lt;img src=x") >= 10
    assert EVIL in unescape(body)


@pytest.mark.parametrize("action", ["run", "report", "status", "calibrate"])
def test_only_plans_have_a_report(action: str) -> None:
    with pytest.raises(ConfigError, match="by plan, explain, memory"):
        load_job([f"action={action}", "report=html", "run_dir=x"])


def test_the_key_is_a_group_with_a_format_and_a_file() -> None:
    assert load_job([]).report == ReportSpec(ReportFormat.NONE, "")
    job = load_job(["action=plan", "report=png", "report.file=a.png"])
    assert (job.report.format, job.report.file) == (ReportFormat.PNG, "a.png")
    with pytest.raises(ConfigError, match="legal: html, none, png") as caught:
        load_job(["action=plan", "report=pdf"])
    assert caught.value.exit_code == 2
    with pytest.raises(ConfigError, match=r"report\.format"):
        load_job(["action=plan", "report.format=svg"])


def test_where_a_report_is_put() -> None:
    job = load_job(["action=plan", "recipe=llama_lora", "hardware=a100_40g", "report=html"])
    assert str(report_file(job)) == "llama_lora-a100_40g.html"
    assert str(report_file(replace(job, run_dir="runs/a"))) == "runs/a/llama_lora-a100_40g.html"
    assert str(report_file(replace(job, report=replace(job.report, file="x/y")))) == "x/y.html"


@pytest.mark.thorough
@pytest.mark.network
def test_the_wheel_holds_what_the_page_is_made_of(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(words, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    wanted = {f"launcher/report/page/{name}" for name in ("page.html", "page.css", "page.js", "skyline.js")}
    assert wanted <= set(names) and "launcher/conf/report/html.yaml" in names
