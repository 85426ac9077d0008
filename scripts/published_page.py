"""The page docs/published.md, made from its data file alone."""

from __future__ import annotations

import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from launcher.units import GIB, MIB
from scripts.published_differences import TEXTS, Difference

Result = dict[str, Any]
"""What is kept of one row."""
ESTIMATORS = {
    "accelerate_float16": "accelerate",
    "deepspeed_zero2": "DeepSpeed",
    "rule_of_thumb": "16 B/param",
    "transformer_math": "+ activations",
}
"""Estimators of the tables; the data file has more."""
TRAINED_WHOLE, OWN = "full", "library"


def error_percent(result: Result, size_bytes: int) -> float:
    """Signed error of a figure, percent of the measurement."""
    measured = int(result["measured_bytes"])
    return 100.0 * (size_bytes - measured) / measured


def today_percent(result: Result) -> float:
    """Signed error of the prediction for the installed libraries."""
    return error_percent(result, result["predicted_bytes"])


def as_run_percent(result: Result) -> float:
    """Signed error with the known differences of the row's code put back."""
    return error_percent(result, result["predicted_as_run_bytes"])


def predicted(results: Iterable[Result], quantity: str) -> list[Result]:
    """The predicted rows that measured one quantity, under-predictions first."""
    chosen = [result for result in results if not result["reason"] and result["quantity"] == quantity]
    return sorted(chosen, key=today_percent)


def table(results: Sequence[Result], quantity: str) -> str:
    """One line per predicted row."""
    lines = [
        "| row | model | method | shape | kernels | highest moment | measured, GiB | ours, GiB "
        f"| ours | as run | {' | '.join(ESTIMATORS.values())} |",
        "|---|---|---|---|---|---|--:|--:|--:|--:|" + "--:|" * len(ESTIMATORS),
    ]
    for result in predicted(results, quantity):
        cells = [
            result["id"],
            str(result["model"]).split("/")[-1],
            result["method"],
            result["shape"] if result["length_is_exact"] else f"{result['shape']}, cap",
            result["kernels"],
            result["mechanism"],
            f"{result['measured_bytes'] / GIB:.3f}",
            f"{result['predicted_bytes'] / GIB:.3f}",
            f"{today_percent(result):+.2f} %",
            f"{as_run_percent(result):+.3f} %" if result["differences"] else "-",
            *(f"{error_percent(result, result['others_bytes'][name]):+.0f} %" for name in ESTIMATORS),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mechanism_table(results: Sequence[Result]) -> str:
    """Median and worst signed error by what the highest moment is made of, and by whose kernels ran."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in predicted(results, "allocated"):
        kernels = "the library's" if result["kernels"] == OWN else "others'"
        groups.setdefault((result["method"], result["mechanism"], kernels), []).append(result)
    lines = [
        "| method | highest moment | kernels | rows | ours, median | ours, worst | as run, median "
        f"| as run, worst | {' | '.join(f'{name}, median' for name in ESTIMATORS.values())} |",
        "|---|---|---|--:|" + "--:|" * (4 + len(ESTIMATORS)),
    ]
    for (method, moment, kernels), members in sorted(groups.items()):
        cells = [method, moment, kernels, str(len(members))]
        for errors, digits in ((today_percent, 2), (as_run_percent, 3)):
            cells += [f"{_median(members, errors):+.{digits}f} %", f"{_worst(members, errors):+.{digits}f} %"]
        cells += [f"{_median(members, _estimator(name)):+.0f} %" for name in ESTIMATORS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reasons_table(results: Sequence[Result]) -> str:
    """How many rows were not expressed, by reason."""
    counts = Counter(result["reason"] for result in results if result["reason"])
    return "\n".join(
        [
            "| rows | reason |",
            "|--:|---|",
            *(f"| {count} | {reason} |" for reason, count in counts.most_common()),
        ]
    )


def page(data: Mapping[str, Any], file_name: str) -> str:
    """The whole page."""
    results = data["rows"]
    allocated, reserved = predicted(results, "allocated"), predicted(results, "reserved")
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    parts = [
        "# Predictions against published measurements",
        *map(_wrapped, _introduction(results, file_name)),
        f"{data['date']}, {versions}",
        "## By mechanism",
        mechanism_table(results),
        "## What explains the misses",
        *map(_wrapped, _explanations(allocated)),
        "## Differences put back",
        *map(_wrapped, _about_differences()),
        "\n".join(map(_wrapped, _differences(allocated))),
        "## Not explained",
        _wrapped(_unexplained(allocated)),
        "## Rows that measured allocated memory",
        table(results, "allocated"),
        "## Rows that measured reserved memory",
        _wrapped(_about_reserved(reserved)),
        table(results, "reserved"),
        "## What the other estimators leave out",
        "\n".join(map(_wrapped, _about_estimators(allocated))),
        "## Rows not expressed",
        reasons_table(results),
    ]
    return "\n\n".join(parts) + "\n"


def _introduction(results: Sequence[Result], file_name: str) -> list[str]:
    allocated = predicted(results, "allocated")
    as_run = [abs(as_run_percent(result)) for result in allocated]
    own = [result for result in allocated if result["kernels"] == OWN]
    return [
        "Generated by `python scripts/published.py --write` from docs/accuracy/published.csv, peak memory "
        f"that others measured on their GPUs; the data lie in docs/accuracy/{file_name}. Signed errors, "
        "percent of the measurement, under-predictions first. *Ours* is the prediction for the libraries as "
        "they are installed. *As run* is the same trace with the known differences of the row's own code "
        "put back, as read in its source.",
        f"{len(results)} rows; {len(allocated)} measured allocated memory and could be expressed. The "
        f"{len(own)} of them that ran transformers' own kernels are {_range(own, today_percent)} off with "
        "today's libraries. With its own code put back, the median row is "
        f"{statistics.median(as_run):.3f} % off and the worst {max(as_run):.2f} %.",
        "All of these come from one benchmark on one device: fms-acceleration on A100 80 GB, full "
        "checkpointing, FlashAttention-2, sequences of exactly 4096 tokens. They say nothing of other "
        "devices, of padding, of kept activations, or of what the caching allocator holds beyond live "
        "tensors.",
        "Allocated memory is live tensors and the matrix library's two workspaces, which come from the same "
        "allocator: what the benchmark has left after training is weights, states, one batch and 2 x 8.125 "
        "MiB.",
    ]


def _explanations(allocated: Sequence[Result]) -> list[str]:
    """A paragraph per mechanism."""
    step = [result for result in allocated if result["mechanism"] == "optimizer step"]
    head = [result for result in allocated if result["mechanism"] == "logits and loss"]
    layer = [result for result in allocated if result["mechanism"].startswith("one layer")]
    own = [result for result in head if result["kernels"] == OWN]
    foreign = [result for result in head if result["kernels"] != OWN]
    prepared = [result for result in own if _has(result, Difference.BF16_EMBEDDINGS)]
    quantised = [
        result for result in own if _has(result, Difference.FP32_ADAPTERS) and result not in prepared
    ]
    rest = [result for result in own if not _has(result, Difference.FP32_ADAPTERS)]
    return [
        f"**Full, optimizer step** ({_rows(step)}). Weights, gradients and two states in bf16 are 8 bytes "
        "per parameter; the other 2 are one temporary of the whole model, which torch's foreach AdamW "
        "makes. Neither batch nor loss matters here.",
        f"**Logits and loss, transformers' own kernels** ({_rows(own)}). Full and LoRA ({_rows(rest)}): old "
        "and new loss hold 12 bytes per logit at the highest moment, the old one in the forward pass, with "
        "the last hidden states beside them, the new one in the backward pass. Where the head is frozen "
        f"that hidden state is the difference. QLoRA ({_rows(quantised)}): the same, and adapters that trl "
        f"now turns to bf16. QLoRA after k-bit preparation ({_rows(prepared)}): today's embeddings stay in "
        "fp32, and the tied head is turned to bf16 for every step.",
        f"**Logits and loss, others' kernels** ({_rows(foreign)}). These rows ran a cross entropy that "
        "writes its gradient over the logits. The launcher has no such kernel: the miss is up to 4 "
        "bytes for every logit, the price of transformers' own loss. TRL's chunked loss, which the launcher "
        "takes unless told otherwise, never has the logits of the whole batch.",
        f"**One layer's backward pass** ({_rows(layer)}). The loss was Liger's fused one, predicted with "
        "TRL's chunked one; neither is the highest moment. Fused norms, rotary embeddings and LoRA kept "
        "fewer copies than transformers and PEFT do; reentrant checkpointing kept one more.",
    ]


def _about_differences() -> list[str]:
    return [
        "The differences were looked for after the misses were known. None of them has a number to be "
        "tuned: each replaces a function by what the source of that version allocates, for all rows that "
        "ran it. What speaks for them is that the same few functions leave next to nothing over at every "
        "batch size, in three models and three methods.",
        "Two facts are inferred. The rows of PowerLM-3b with full fine-tuning or LoRA are taken to have run "
        "without autocast: in a former version of the same file the LoRA rows are larger by exactly 2 bytes "
        "per adapter weight, the bf16 copies that autocast makes. And they don't name their trl; it is taken "
        "to be that of the other rows. Those ran bf16 weights under autocast, a layout that no "
        "`training.precision` names; the trace was told to hold bf16 weights.",
    ]


def _differences(allocated: Sequence[Result]) -> list[str]:
    counts = Counter(name for result in allocated for name in result["differences"])
    return [f"- {kind.value} ({counts[kind.value]} rows): {TEXTS[kind]}." for kind in Difference]


def _unexplained(allocated: Sequence[Result]) -> str:
    fused = [result for result in allocated if _has(result, Difference.FUSED_LORA)]
    power = [result for result in allocated if "PowerLM" in result["model"] and result not in fused]
    rest = [result for result in allocated if result not in fused and result not in power]
    return (
        f"Left over with the known differences put back: {_rest_mib(rest)} MiB in {len(rest)} rows of "
        f"Mistral and Llama; {_rest_mib(power)} MiB in {len(power)} rows of PowerLM-3b, whose cause is not "
        f"known; {_rest_mib(fused)} MiB in {len(fused)} rows with fused LoRA. That one makes no bf16 copies "
        "of its fp32 adapters (26 MiB for Mistral) and keeps no products of rank 16 (128 bytes per token), "
        "which was not put back and is about as much."
    )


def _about_reserved(reserved: Sequence[Result]) -> str:
    above = [result["id"] for result in reserved if today_percent(result) > 0]
    return (
        "Reserved memory is what the caching allocator holds, never less than what is allocated. The "
        "prediction of allocated memory stands here as a lower bound, and its error says how much lies "
        "between: fragmentation, code of other years, and what the loops held besides. SWIFT: ms-swift of "
        "January 2024; lengths vary up to a cap, so blocks of many sizes pile up. PEFT: today's libraries "
        "in a loop of its own, which keeps the outputs of a step through the next one and generates text "
        "with another batch size inside the window; whether any batch reached the cap was not published. "
        f"Above the measurement: {', '.join(above) if above else 'none'}"
        + (", as it can be where no batch reached the cap." if above else ".")
    )


def _about_estimators(allocated: Sequence[Result]) -> list[str]:
    def spread(name: str) -> str:
        whole = [result for result in allocated if result["method"] == TRAINED_WHOLE]
        adapters = [result for result in allocated if result["method"] != TRAINED_WHOLE]
        return f"full {_range(whole, _estimator(name), 0)}, adapters {_range(adapters, _estimator(name), 0)}"

    return [
        "- accelerate: `accelerate estimate-memory`, float16, training with Adam, by its own function: 8 "
        "bytes per parameter, the largest of parts that coexist. It asks for no batch, length, adapters or "
        f"checkpointing: {spread('accelerate_float16')}. Its float32 column is twice as much.",
        "- DeepSpeed: `estimate_zero2_model_states_mem_needs` on one GPU without offload, 20 bytes per "
        "parameter: it counts fp32 master weights, gradients and states, which none of these rows has, and "
        f"every weight as trained: {spread('deepspeed_zero2')}. The one for ZeRO-3 is in the data file.",
        "- 16 B/param: the rule of thumb, 16 bytes per trained parameter plus frozen weights of 2 bytes, or "
        f"half a byte in 4 bits: {spread('rule_of_thumb')}.",
        "- + activations: the same and the activations of EleutherAI's *Transformer Math 101*, 2 s b h L "
        "with recomputation, s b h L (34 + 5 a s / h) without. It has no logits and no recomputed layer: "
        f"{spread('transformer_math')}.",
    ]


def _wrapped(text: str) -> str:
    """A paragraph, or an item of a list, in lines of a readable width."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, 110, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _has(result: Result, difference: Difference) -> bool:
    return difference.value in result["differences"]


def _estimator(name: str) -> Callable[[Result], float]:
    return lambda result: error_percent(result, result["others_bytes"][name])


def _median(members: Sequence[Result], error: Callable[[Result], float]) -> float:
    return statistics.median(error(result) for result in members)


def _worst(members: Sequence[Result], error: Callable[[Result], float]) -> float:
    return max((error(result) for result in members), key=abs)


def _range(members: Sequence[Result], error: Callable[[Result], float], digits: int = 2) -> str:
    errors = [error(result) for result in members]
    return f"{min(errors):+.{digits}f} to {max(errors):+.{digits}f} %"


def _rows(members: Sequence[Result]) -> str:
    return f"{len(members)} rows, {_range(members, today_percent)}"


def _rest_mib(members: Sequence[Result]) -> str:
    rests = [(result["predicted_as_run_bytes"] - result["measured_bytes"]) / MIB for result in members]
    return f"{min(rests):+.1f} to {max(rests):+.1f}"
