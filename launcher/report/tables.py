"""Tables for people: a plan, a reconciled run, the list of past runs. Pure text, at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launcher.cluster import SubmittedJob
from launcher.hardware import HardwareSpec
from launcher.job import Engine, JobSpec, Loss
from launcher.memory import RESIDENT, Category, Interval, MemoryEstimate, MemoryMeasurement, Phase
from launcher.plan import SMALL_BUCKETS, Grade, Plan, PlanChoice, Squeeze, offload_words
from launcher.report.layout import aligned, wrapped
from launcher.run_paths import RunPaths
from launcher.run_record import RunRecord
from launcher.step_time import StepTime, dollars_per_million_tokens
from launcher.units import MIB, format_bytes, format_seconds, format_step, signed_percent

PRINTED_BYTES = MIB // 200
"""What shows in MiB with two digits."""
REJECTED_SHOWN = 8


def plan_text(job: JobSpec, choice: PlanChoice, planning_seconds: float) -> str:
    """A plan, what it needs, and what else was considered."""
    hardware = job.hardware
    product = f" ({hardware.product})" if hardware.product else ""
    lines = [
        wrapped("job      ", f"{job.recipe}: {job.model.path} on {hardware.name}{product}"),
        f"memory    {format_bytes(choice.capacity_bytes)} usable, {format_bytes(choice.headroom_bytes)} headroom, "
        f"profile={job.profile.value}",
    ]
    if choice.plan is None or choice.estimate is None:
        lines.append(wrapped("no plan  ", choice.reason))
    else:
        lines += [
            wrapped("plan     ", plan_words(choice.plan)),
            wrapped("because  ", choice.reason),
            *_speed_lines(choice.step, hardware, swaps=choice.plan.swaps),
            *([wrapped("grade    ", squeeze_words(choice.squeeze))] if choice.squeeze else []),
            "",
            *_estimate_lines(choice.estimate),
            *_per_weight(choice.estimate, job.model.num_parameters),
        ]
    lines += [wrapped("note     ", note) for note in choice.notes]
    if choice.rejected:
        lines += [
            "",
            f"not taken ({len(choice.rejected)} of {choice.num_considered} considered, nearest first)",
        ]
        lines += [_rejection(item.plan, item.reason) for item in choice.rejected[:REJECTED_SHOWN]]
        hidden = len(choice.rejected) - REJECTED_SHOWN
        if hidden > 0:
            lines.append(f"  and {hidden} more; `output=json` lists all")
    lines.append("")
    lines.append(f"planned in {format_seconds(planning_seconds)}")
    return "\n".join(lines)


def squeeze_words(squeeze: Squeeze) -> str:
    """How tight a plan is."""
    savers = ", ".join(squeeze.savers) or "none"
    hint = (
        ""
        if squeeze.grade is Grade.COMFORTABLE or squeeze.advice
        else "; `action=explain` says what relaxes it"
    )
    return (
        f"{squeeze.grade.value}: {format_bytes(squeeze.free_bytes)} ({squeeze.free_share:.1%}) stay free at the upper "
        f"end of what is expected; memory savers in use: {savers}{hint}"
    )


def plan_words(plan: Plan) -> str:
    """A plan in one line."""
    method = f"{plan.method.value} rank {plan.rank}" if plan.rank else plan.method.value
    return (
        f"{method}, micro batch {plan.micro_batch_size} x accumulation {plan.gradient_accumulation_steps}, "
        f"length {plan.max_length}, checkpointing {plan.activation_checkpointing.value}, "
        f"{plan.attention.value} attention, {plan.loss.value} loss, {plan.optimizer.value}, "
        f"{plan.precision.value}" + (f", {engine_words(plan)}" if plan.engine is not Engine.NONE else "")
    )


def engine_words(plan: Plan) -> str:
    """What trains on several devices together, `ZeRO stage 2 on 2 x 8 devices`; empty on one device."""
    if plan.engine is Engine.NONE:
        return ""
    name, *more = engine_parts(plan)
    nodes = f"{plan.num_nodes} x " if plan.num_nodes > 1 else ""
    devices = "one device" if plan.world_size == 1 else f"{nodes}{plan.num_devices} devices"
    return ", ".join([f"{name} on {devices}", *more])


def engine_parts(plan: Plan) -> list[str]:
    """The same without the devices, a part each: the engine, what is offloaded, small buckets; none on one device."""
    if plan.engine is Engine.NONE:
        return []
    name = f"ZeRO stage {plan.zero_stage}" if plan.engine is Engine.DEEPSPEED else plan.engine.value.upper()
    offloaded = offload_words(plan.offload_optimizer, plan.offload_parameters, swaps=plan.swaps)
    buckets = SMALL_BUCKETS if plan.has_small_buckets else ""
    return [name, *(words.removeprefix(", ") for words in (offloaded, buckets) if words)]


def _speed_lines(step: StepTime | None, hardware: HardwareSpec, *, swaps: bool) -> list[str]:
    """Predicted speed, and on what it rests."""
    if step is None and swaps and not hardware.nvme_bytes_per_second:
        words = (
            "not known: optimizer states cross the drive in each step, and hardware.nvme_bytes_per_second, the rate of "
            "the drive, is not set"
        )
        return [wrapped("speed    ", words)]
    if step is None:
        words = "not known for this device; `launch action=calibrate` measures the one that is here"
        return [wrapped("speed    ", words)]
    on_several = hardware.world_size > 1
    label = "calibrated" if step.is_calibrated else "estimate, not calibrated"
    words = (
        f"{step.tokens_per_second:,.0f} tokens/s{' per device' if on_several else ''}, {format_step(step.seconds)} per "
        f"step with every sequence at its full length ({label}: {step.rates})"
    )
    lines = [wrapped("speed    ", words)]
    if hardware.price_per_hour is not None:
        dollars = dollars_per_million_tokens(step, hardware.price_per_hour)
        lines.append(f"cost      ${dollars:,.2f} per million tokens")
    return lines


def brief_words(plan: Plan) -> str:
    """What tells the plans of one search apart."""
    words = [engine_words(plan)] if plan.engine is not Engine.NONE else []
    words += [plan.method.value + (f" r{plan.rank}" if plan.rank else ""), f"length {plan.max_length}"]
    words += [f"micro batch {plan.micro_batch_size}", f"checkpointing {plan.activation_checkpointing.value}"]
    words += [] if plan.loss is Loss.CHUNKED else [f"{plan.loss.value} loss"]
    words += [plan.optimizer.value] if plan.uses_pages else []
    return ", ".join(words)


def _rejection(plan: Plan, reason: str) -> str:
    return wrapped("  -", f"{brief_words(plan)}: {reason}")


def _estimate_lines(estimate: MemoryEstimate) -> list[str]:
    peak = estimate.peak
    reserved = estimate.peak_reserved_bytes
    rows = [["phase", "predicted peak", *(["reserved"] if reserved is not None else [])]]
    for phase in estimate.phases:
        held = [] if phase.reserved_bytes is None else [format_bytes(phase.reserved_bytes)]
        rows.append([phase.phase.value, format_bytes(phase.allocated_bytes), *held])
    lines = aligned(rows)
    words = "not known: no run on this kind of device has been measured yet"
    if estimate.interval is not None:
        words = interval_words(estimate.interval)
    lines.append(wrapped("expected ", words))
    lines += ["", f"what is alive at the highest moment ({peak.phase.value})"]
    parts = sorted(peak.by_category_bytes.items(), key=lambda item: -item[1])
    rows = [
        [f"  {name.value}", format_bytes(size), _share(size, peak.allocated_bytes)]
        for name, size in parts
        if size
    ]
    rows.append(["  tensors", format_bytes(peak.allocated_bytes), "100.0 %"])
    if reserved is not None:
        unused = reserved - estimate.peak_allocated_bytes
        rows.append(["  held by the allocator beside them", format_bytes(unused), ""])
    if estimate.context_bytes:
        rows.append(["  context", format_bytes(estimate.context_bytes), ""])
        rows.append(["  device", format_bytes(estimate.peak_device_bytes), ""])
    return [*lines, *aligned(rows), *_beside_the_device(estimate)]


def _beside_the_device(estimate: MemoryEstimate) -> list[str]:
    """Host memory, NVMe and disk, a line each."""
    lines = []
    host, disk = estimate.host, estimate.disk
    if host is not None:
        parts = sorted(host.by_category_bytes.items(), key=lambda item: -item[1])
        words = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts if size)
        pinned = f"; {format_bytes(host.pinned_bytes)} of it pinned" if host.pinned_bytes else ""
        lines.append(wrapped("host     ", f"{format_bytes(host.peak_bytes)}: {words}{pinned}"))
    if estimate.nvme is not None:
        locked = format_bytes(estimate.nvme.locked_bytes)
        words = f"optimizer states and gradients; {locked} of host memory locked for it"
        lines.append(wrapped("nvme     ", f"{format_bytes(estimate.nvme.file_bytes)}: {words}"))
    if disk is not None:
        many = f"{disk.num_checkpoints} x checkpoint"
        if disk.num_checkpoints is None:
            many = "as many checkpoints as are due, each"
        words = f"model {format_bytes(disk.model_bytes)}"
        if disk.checkpoint_bytes:
            words += f", {many} {format_bytes(disk.checkpoint_bytes)}"
        elif disk.num_checkpoints != 0:
            words += f"; {many} of a size that only the rehearsal tells, under an engine"
        if disk.merged_bytes:
            words += f", merged model {format_bytes(disk.merged_bytes)}"
        lines.append(wrapped("disk     ", f"{format_bytes(disk.total_bytes)}: {words}"))
    return lines


def _per_weight(estimate: MemoryEstimate, num_parameters: int | None) -> list[str]:
    """Bytes per weight of the model: peers mean anything from 8 to 18 by the same words."""
    if not num_parameters:
        return []
    parts = [
        f"{estimate.resident_bytes.get(category, 0) / num_parameters:.2f} {name}"
        for category, name in (
            (Category.PARAMETERS, "of weights"),
            (Category.GRADIENTS, "of gradients"),
            (Category.OPTIMIZER_STATE, "of optimizer state"),
        )
    ]
    return [wrapped("per weight", f"{', '.join(parts)}: bytes, per weight of the model")]


def interval_words(interval: Interval) -> str:
    """Where the highest moment is to be expected, and on what that rests."""
    new = ", none of this architecture" if interval.is_new_architecture else ""
    return (
        f"{format_bytes(interval.low_bytes)} to {format_bytes(interval.high_bytes)} at the highest moment, with "
        f"{interval.coverage:.0%}, from {interval.num_runs} measured runs{new}"
    )


def _share(part: int, whole: int) -> str:
    return f"{100.0 * part / whole:.1f} %"


def handed_over_text(paths: RunPaths, command: str, job: SubmittedJob | None) -> str:
    """What a user does next with a run that a cluster has, or is to have."""
    lines = [f"job       {job.job_id} was submitted" if job else f"start     {command}"]
    return "\n".join([*lines, f"follow    launch action=status run_dir={paths.root}"])


def run_text(record: RunRecord) -> str:
    """A finished run: how it went, and predicted against measured peak per phase and category."""
    outcome = record.outcome
    lines = [f"run       {record.run_dir}", f"outcome   {outcome.status.value} after {outcome.steps} steps"]
    if outcome.message:
        lines.append(wrapped("         ", outcome.message.splitlines()[0]))
    if outcome.first_loss is not None and outcome.last_loss is not None:
        lines.append(f"loss      {outcome.first_loss:.4f} at first, {outcome.last_loss:.4f} at last")
    if outcome.tokens_per_second is not None and outcome.step_seconds is not None:
        lines.append(
            f"speed     {outcome.tokens_per_second:,.0f} tokens/s, {format_step(outcome.step_seconds)} per step"
        )
        predicted_step = record.predicted_step_as_run or record.predicted_step
        if predicted_step is not None:
            error = signed_percent(predicted_step.seconds, outcome.step_seconds)
            lines.append(
                f"          predicted {format_step(predicted_step.seconds)} per step ({error:+.0f} %)"
            )
    if record.measured is None:
        lines.append("memory    not measured: the run ended before the meter was read")
        return "\n".join(lines)
    predicted = record.predicted_as_run or record.predicted
    lines += ["", *reconciliation(predicted, record.measured)]
    if len(record.measured_ranks) > 1:
        lines += ["", *ranks_reconciliation(predicted, record.measured_ranks)]
    if record.predicted_as_run is not None:
        shapes = ", ".join(f"{shape.micro_batch_size} x {shape.length}" for shape in record.measured.shapes)
        lines.append(
            wrapped(
                "note     ",
                f"the metered batches were {shapes} tokens and the prediction above is for them; the plan "
                f"allows for {record.plan.micro_batch_size} x {record.plan.max_length}, whose predicted peak is "
                f"{format_bytes(record.predicted.peak_allocated_bytes)}",
            )
        )
    return "\n".join(lines)


def reconciliation(predicted: MemoryEstimate, measured: MemoryMeasurement) -> list[str]:
    """Predicted against measured, in MiB, with the signed error: phases, and what memory was for at their peaks.

    Where the meter does not tell that (CUDA's counters, once nothing is recorded), the lasting categories as they were
    weighed, and the rest.
    """
    rows = [["peak of phase, MiB", "predicted", "measured", "error"]]
    highest_predicted = highest_measured = 0
    for phase in Phase:
        ours, seen = predicted.phase(phase), measured.phase(phase)
        if ours is None or seen is None:
            continue
        rows.append(_comparison(phase.value, ours.allocated_bytes, seen.allocated_bytes))
        if seen.by_category_bytes is not None:
            rows += _categories(ours.by_category_bytes, seen.by_category_bytes)
        if phase is not Phase.LOAD:
            highest_predicted = max(highest_predicted, ours.allocated_bytes)
            highest_measured = max(highest_measured, seen.allocated_bytes)
    rows.append(_comparison("highest after loading", highest_predicted, highest_measured))
    if all(seen.by_category_bytes is not None for seen in measured.phases):
        return aligned(rows)
    weighed = [["size of category, MiB", "predicted", "measured", "error"]]
    for category in RESIDENT:
        ours_bytes = predicted.resident_bytes.get(category, 0)
        seen_bytes = measured.resident_bytes.get(category, 0)
        if ours_bytes or seen_bytes:
            weighed.append(_comparison(category.value, ours_bytes, seen_bytes))
    weighed.append(
        _comparison(
            "working set at the peak",
            highest_predicted - sum(predicted.resident_bytes.values()),
            highest_measured - sum(measured.resident_bytes.values()),
        )
    )
    lines = aligned([*rows, *weighed])
    return [*lines[: len(rows)], "", *lines[len(rows) :]]


def _categories(predicted: Mapping[Category, int], measured: Mapping[Category, int]) -> list[list[str]]:
    """One row for each category that has as much as can be printed."""
    return [
        _comparison(f"  {category.value}", ours, seen)
        for category in Category
        if max(ours := predicted.get(category, 0), seen := measured.get(category, 0)) >= PRINTED_BYTES
    ]


def ranks_reconciliation(predicted: MemoryEstimate, ranks: Sequence[MemoryMeasurement]) -> list[str]:
    """Predicted against measured peak of every rank, in MiB, with the signed error."""
    rows = [["peak of rank, MiB", "predicted", "measured", "error"]]
    for measured in ranks:
        name = f"rank {measured.rank}"
        rows.append(_comparison(name, predicted.peak_allocated_bytes, measured.peak_allocated_bytes))
    return aligned(rows)


def _comparison(name: str, predicted: int, measured: int) -> list[str]:
    error = f"{signed_percent(predicted, measured):+.3f} %" if measured else "-"
    return [name, f"{predicted / MIB:.2f}", f"{measured / MIB:.2f}", error]


def runs_text(records: Sequence[RunRecord], notes: Sequence[str]) -> str:
    """Past runs, newest first: predicted, measured, error."""
    if not records:
        return "\n".join(["no runs", *notes])
    rows = [["started", "recipe", "outcome", "predicted", "measured", "error"]]
    for record in records:
        predicted = (record.predicted_as_run or record.predicted).peak_allocated_bytes
        measured = record.measured.peak_allocated_bytes if record.measured else None
        rows.append(
            [
                record.started[:16].replace("T", " "),
                record.recipe,
                record.outcome.status.value,
                format_bytes(predicted),
                format_bytes(measured) if measured else "-",
                f"{signed_percent(predicted, measured):+.3f} %" if measured else "-",
            ]
        )
    return "\n".join([*aligned(rows, num_words=3, gives_way=1, is_cut=True), *notes])
