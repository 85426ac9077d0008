"""What of a page stands still: text and tables, readable without scripts. Every text is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from launcher.explanation import Explanation
from launcher.job import Engine
from launcher.memory import Moment
from launcher.plan import Plan, Rejection
from launcher.report.findings import Findings
from launcher.report.plot import unit_of
from launcher.report.tables import brief_words, engine_words, interval_words, plan_words, squeeze_words
from launcher.units import format_bytes, format_change, format_step
from launcher.whatif import Point, WhatIf

REJECTED_SHOWN = 8


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; nothing where there is no text."""
    return f'<p class="{kind}">{escape(text)}</p>' if text else ""


def _words(name: str) -> str:
    return name.replace("_", " ")


def lead(findings: Findings) -> str:
    """Whether the plan fits, its peak, and what is known about both."""
    estimate, budget = findings.estimate, findings.capacity_bytes - findings.headroom_bytes
    device = estimate.peak_device_bytes
    mark, word, kind = (
        ("✓", "fits", "fits") if findings.fits else ("✗", "no plan fits; this one is nearest", "over")
    )
    if findings.choice is None:
        mark, word, kind = "", "plan of a past run", ""
    rest = budget - device
    spare = f"{format_bytes(rest)} to spare" if rest >= 0 else f"{format_bytes(-rest)} too much"
    rows = [
        (
            "of",
            f"{format_bytes(findings.capacity_bytes)} usable, {format_bytes(findings.headroom_bytes)} headroom; {spare}",
        ),
        ("highest in", _words(estimate.peak.phase.value)),
    ]
    if estimate.interval is not None:
        rows.append(("expected", interval_words(estimate.interval)))
    if findings.choice is not None and findings.choice.step is not None:
        step = findings.choice.step
        label = "calibrated" if step.is_calibrated else "estimate, not calibrated"
        rows.append(
            (
                "speed",
                f"{step.tokens_per_second:,.0f} tokens/s, {format_step(step.seconds)} per step ({label})",
            )
        )
    squeezed = findings.choice.squeeze if findings.choice is not None else None
    if squeezed is not None:
        rows.append(("grade", squeeze_words(squeezed)))
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in rows)
    return (
        f'<div class="answer {kind}"><span class="word">{mark} {escape(word)}</span>'
        f'<div class="figure">{format_bytes(device)}</div><dl>{listed}</dl></div>'
    )


def knobs(plan: Plan) -> str:
    """The plan, knob by knob."""
    batch = f"{plan.micro_batch_size} x {plan.gradient_accumulation_steps}"
    facts = [
        ("method", f"{plan.method.value} rank {plan.rank}" if plan.rank else plan.method.value),
        ("micro batch x accumulation", batch),
        ("length", f"{plan.max_length}"),
        ("checkpointing", plan.activation_checkpointing.value),
        ("attention", plan.attention.value),
        ("loss", plan.loss.value),
        ("optimizer", plan.optimizer.value),
        ("precision", plan.precision.value),
    ]
    if plan.engine is not Engine.NONE:
        facts.append(("devices", engine_words(plan)))
    cells = "".join(f"<div><dt>{escape(n)}</dt><dd>{escape(t)}</dd></div>" for n, t in facts)
    return f'<dl class="facts">{cells}</dl>'


def exact_note(findings: Findings) -> str:
    """What the trace of the plan at its own shape says."""
    estimate = findings.estimate
    held = estimate.peak_reserved_bytes
    text = f"This is the plan. Traced again at its own shape its tensors peak at {estimate.peak_allocated_bytes:,} B"
    if held is not None:
        text += f", and the caching allocator holds {held:,} B: {format_bytes(estimate.peak_device_bytes)} on the device"
    return text + "."


def map_table(what_if: WhatIf, capacity_bytes: int) -> str:
    """Every micro batch with every length: bytes of the device, and whether they fit."""
    budget, (scale, _) = what_if.budget_bytes(capacity_bytes), unit_of(what_if)
    heads = "".join(f'<th scope="col">{length}</th>' for length in what_if.lengths)
    rows = []
    for number, (split, points) in enumerate(what_if.by_split().items()):
        cells = "".join(f"<td>{_cell(number, point, what_if, budget, scale)}</td>" for point in points)
        name = f"{split.micro_batch_size} x {split.gradient_accumulation_steps}"
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    head = f'<thead><tr><th scope="col">batch x<br>accumulation</th>{heads}</tr></thead>'
    return f'<table class="map">{head}<tbody id="map-body">{"".join(rows)}</tbody></table>'


def _cell(number: int, point: Point, what_if: WhatIf, budget_bytes: int, scale: int) -> str:
    where = f'type="button" data-split="{number}" data-length="{point.length}"'
    if point.estimate is None:
        return f'<button class="unknown" {where}><b>-</b><small>?</small></button>'
    device, host = point.estimate.peak_device_bytes, point.estimate.host
    on_host = bool(what_if.host_memory_bytes and host and host.peak_bytes > what_if.host_memory_bytes)
    kind, mark = ("over", "✗") if device > budget_bytes or on_host else ("fits", "✓")
    share = device / budget_bytes
    size = f"{device / scale:.2f}" if device < 100 * scale else f"{device / scale:.0f}"
    return (
        f'<button class="{kind}" style="--share:{min(1, share):.3f}" title="{device:,} B" {where}>'
        f"<b>{size}</b><small>{mark} {100 * share:.0f} %</small></button>"
    )


def map_note(findings: Findings) -> str:
    """On what the map rests, and what it lacks."""
    what_if, estimate = findings.what_if, findings.estimate
    text = "Read off the skylines of each regime, as the planner prices plans before it takes one."
    held = estimate.peak_reserved_bytes
    if held is not None:
        apart = held - estimate.peak_allocated_bytes
        text += (
            f" What the caching allocator holds beside live tensors is known for a traced shape only, and counts when a "
            f"plan is taken: for this plan {format_bytes(apart)}."
        )
    if what_if.gaps:
        why = dict.fromkeys(gap.reason for gap in what_if.gaps)
        text += f" Places without a number are not in this page: {'; '.join(why)}."
    return text


def bill_part(findings: Findings) -> str:
    """The highest moment by category and module, the peak of every phase, and the next highest moment."""
    estimate, bill = findings.estimate, findings.bill
    phases = [
        [
            _words(peak.phase.value),
            format_bytes(peak.allocated_bytes),
            *([] if peak.reserved_bytes is None else [format_bytes(peak.reserved_bytes)]),
        ]
        for peak in estimate.phases
    ]
    heads = ["phase", "live tensors", *(["reserved"] if estimate.peak_reserved_bytes is not None else [])]
    highest = [peak.phase for peak in estimate.phases].index(estimate.peak.phase)
    title = f"Highest moment, {_words(bill.peak.phase.value)}: {format_bytes(bill.peak.allocated_bytes)}"
    text = f'<div class="columns"><div><h3>{title}</h3>'
    text += _moment(bill.peak, findings)
    text += f"</div><div><h3>Peak of each phase</h3>{_table(heads, phases, highest=highest)}"
    if bill.next_highest is not None:
        lower = bill.peak.allocated_bytes - bill.next_highest.allocated_bytes
        text += f"<h3>Next highest moment, {_words(bill.next_highest.phase.value)}, {format_bytes(lower)} lower</h3>"
        text += _categories(bill.next_highest)
    return text + "</div></div>" + _modules(bill.peak)


def _moment(moment: Moment, findings: Findings) -> str:
    """The bar over the device's memory, and the categories."""
    estimate = findings.estimate
    held = estimate.peak_reserved_bytes
    parts = [(name.value, size) for name, size in moment.by_category_bytes.items() if size]
    parts.append(("unused", 0 if held is None else max(0, held - moment.allocated_bytes)))
    parts.append(("context", estimate.context_bytes))
    whole = max(findings.capacity_bytes, sum(size for _, size in parts))
    pieces = "".join(
        f'<span class="part {name}" style="width:{100 * size / whole:.3f}%" '
        f'title="{_words(name)}: {format_bytes(size)}"></span>'
        for name, size in parts
        if size
    )
    memory, budget = findings.capacity_bytes, findings.capacity_bytes - findings.headroom_bytes
    limits = (
        f'<div class="limit" style="left:{100 * memory / whole:.3f}%"><span>memory</span></div>'
        f'<div class="limit soft" style="left:{100 * budget / whole:.3f}%"></div>'
    )
    beside = [
        ("unused", "held by the allocator beside them", parts[-2][1]),
        ("context", "context of the runtime", parts[-1][1]),
    ]
    extra = "".join(
        f'<tr><th><i class="swatch {name}"></i> {words}</th><td>{format_bytes(size)}</td><td></td></tr>'
        for name, words, size in beside
        if size
    )
    return (
        f'<div class="bar" aria-hidden="true"><div class="parts">{pieces}</div>{limits}</div>'
        + _categories(moment, extra)
    )


def _categories(moment: Moment, extra: str = "") -> str:
    whole = moment.allocated_bytes
    parts = sorted(moment.by_category_bytes.items(), key=lambda item: -item[1])
    rows = "".join(
        f'<tr><th><i class="swatch {name.value}"></i> {_words(name.value)}</th><td>{format_bytes(size)}</td>'
        f"<td>{100 * size / whole:.1f} %</td></tr>"
        for name, size in parts
        if size
    )
    return f"<table><tbody>{rows}{extra}</tbody></table>"


def _modules(moment: Moment) -> str:
    if not moment.by_module:
        return ""
    rows = [
        [
            share.module or "(no module)",
            format_bytes(share.num_bytes),
            f"{100 * share.num_bytes / moment.allocated_bytes:.1f} %",
        ]
        for share in moment.by_module
    ]
    table = _table(["module", "alive", "share"], rows, kind="ruled paths")
    return f"<h3>Modules that made most of the highest moment</h3>{table}"


def _table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    highest: int = -1,
    texts: int = 1,
    kind: str = "ruled",
) -> str:
    """A table whose first `texts` columns are words and whose others are figures; all of it is escaped."""
    top = "".join(
        f'<th scope="col"{"" if i < texts else " class=figure"}>{escape(head)}</th>'
        for i, head in enumerate(heads)
    )
    body = []
    for number, row in enumerate(rows):
        cells = "".join(
            f'<td class="text" data-label="{escape(head)}">{escape(cell)}</td>'
            if 0 < i < texts
            else f"<th>{escape(cell)}</th>"
            if i == 0
            else f'<td data-label="{escape(head)}">{escape(cell)}</td>'
            for i, (head, cell) in enumerate(zip(heads, row, strict=True))
        )
        body.append(f"<tr{' class=highest' if number == highest else ''}>{cells}</tr>")
    head = f"<thead><tr>{top}</tr></thead>"
    return f'<div class="scroll"><table class="{kind}">{head}<tbody>{"".join(body)}</tbody></table></div>'


def step_note(findings: Findings) -> str:
    """What else the picture of the step shows."""
    return " Dashed: the same step as it was measured." if findings.measured is not None else ""


def alternatives(findings: Findings) -> str:
    """What each knob buys, what other memory would, and the plans that were not taken."""
    text = ""
    if findings.explanation is not None:
        text += _explained(findings.explanation)
    if findings.choice is not None and findings.choice.rejected:
        rejected, considered = findings.choice.rejected, findings.choice.num_considered
        count = f"{len(rejected)} of {considered} considered, nearest to fitting first."
        text += f'<section id="rejected"><h2>Not taken</h2><p class="muted">{count}</p>'
        text += _rejections(rejected[:REJECTED_SHOWN])
        if len(rejected) > REJECTED_SHOWN:
            rest = rejected[REJECTED_SHOWN:]
            text += f"<details><summary>{len(rest)} more</summary>{_rejections(rest)}</details>"
        text += "</section>"
    return text


def _rejections(rejected: Sequence[Rejection]) -> str:
    rows = [
        [
            brief_words(item.plan),
            item.reason,
            format_bytes(item.peak_bytes) if item.peak_bytes else "not priced",
            "" if item.step_seconds is None else format_step(item.step_seconds),
        ]
        for item in rejected
    ]
    return _table(["plan", "reason", "device", "step"], rows, texts=2, kind="ruled stack")


def _explained(explanation: Explanation) -> str:
    rows = []
    for change in explanation.changes:
        memory = "not priced" if change.saved_bytes is None else format_change(-change.saved_bytes)
        ratio = "" if change.step_ratio is None else f"x {change.step_ratio:.2f}"
        fits = "" if change.saved_bytes is None else "✓ yes" if change.fits else "✗ no"
        model_ = "another" if change.changes_result else "the same"
        rows.append([_words(change.knob), change.words, change.refusal, model_, memory, ratio, fits])
    heads = ["knob", "change", "refused because", "model that comes out", "memory", "time per token", "fits"]
    if not any(row[2] for row in rows):
        heads, rows = heads[:2] + heads[3:], [row[:2] + row[3:] for row in rows]
    capacities = [
        [
            f"{item.factor:g} x: {format_bytes(item.capacity_bytes)}",
            plan_words(item.plan) if item.plan is not None else f"no plan; {item.reason}",
            "" if item.tokens_per_second is None else f"{item.tokens_per_second:,.0f} tokens/s",
        ]
        for item in explanation.capacities
    ]
    return (
        '<section id="changes"><h2>One knob turned</h2><p class="muted">Everything else as in the plan; read off the '
        f"skylines on both sides.</p>{_table(heads, rows, texts=len(heads) - 3, kind='ruled stack')}"
        "<h3>The same job with other memory</h3>"
        f"{_table(['memory', 'plan', 'speed'], capacities, texts=2, kind='ruled stack')}"
        f'<h3>Verdict</h3><p class="verdict">{escape(explanation.verdict)}</p>'
        f"{paragraph(explanation.squeeze.advice and 'To relax: ' + explanation.squeeze.advice)}</section>"
    )
