"""The same training by peers' shipped recipes and by our plans: same method, rank, length, optimizer, global batch, card.

A row's job is what the peer's file trains; its own micro batch, accumulation, checkpointing and loss are pinned for the
one side, and left to the planner for the other. All numbers are predictions; where the peer has published a measurement
of its own, it stands beside. Read from the peers' example files, in 2026.

    python -m scripts.peers                     prints the table
    python -m scripts.peers --write             also writes docs/accuracy/<date>-peers.json
    python -m scripts.peers --only axolotl      these alone; --write puts them among those that are in the newest data

`python -m scripts.peers_page` makes docs/peers.md of it and of what scripts/peers_measured.py measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launcher.config import load_job
from launcher.job import Engine
from launcher.plan import PlanChoice
from launcher.planning import plan_job, resolve
from launcher.units import GIB

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
CARDS = {"lora": "a100_40g", "qlora": "rtx4090_24g", "full": "h100_80g"}
QUERY_VALUE = "method.target_modules=[q_proj,v_proj]"


@dataclass(frozen=True)
class Recipe:
    """One peer's recipe, as far as it decides memory and speed."""

    name: str
    """Peer and file."""
    model: str
    """Ours of the same architecture."""
    method: str
    """`full`, `lora` or `qlora`."""
    length: int
    """Tokens per sequence."""
    micro: int
    """Micro batch."""
    accumulation: int
    """Micro batches per step."""
    checkpointing: str
    """By our names."""
    rank: int = 0
    """LoRA rank."""
    loss: str = "plain"
    """By our names: `plain` is all logits at once, `chunked` stands for every loss that keeps none."""
    packing: bool = False
    """Whether rows are packed."""
    card: str = ""
    """Device; empty: the usual one of the method."""
    changes: tuple[str, ...] = field(default=())
    """More of the job."""
    published: str = ""
    """What the peer says that it measured."""
    published_step_seconds: float = 0.0
    """The step that it says that it measured; 0: it says none."""
    remark: str = ""
    """What is not quite as in the peer's file."""
    devices: int = 1
    """Cards that train together."""
    engine: tuple[str, ...] = ()
    """What the peer decided about several cards."""

    @property
    def what(self) -> str:
        """Method, rank, and how the frozen weights are stored where the method does not say it."""
        if "method.quantization=int8" in self.changes:
            return (
                f"lora {self.rank} on int8"  # our method for all weights that bitsandbytes stores is `qlora`
            )
        return f"{self.method} {self.rank or ''}".strip()

    @property
    def where(self) -> str:
        """Cards."""
        card = self.card or CARDS[self.method]
        return f"{self.devices} x {card}" if self.devices > 1 else card

    @property
    def job(self) -> list[str]:
        """What is trained, as a command line."""
        rank = [f"method.rank={self.rank}"] if self.rank else []
        return [
            "recipe=llama_lora",
            f"model={self.model}",
            f"method={self.method}",
            *rank,
            f"hardware={self.card or CARDS[self.method]}",
            *([f"hardware.num_devices={self.devices}"] if self.devices > 1 else []),
            f"data.max_length={self.length}",
            f"data.packing={str(self.packing).lower()}",
            f"training.global_batch_size={self.micro * self.accumulation * self.devices}",
            "training.precision=bf16",  # peers differ in what they multiply in which dtype; both sides are alike here
            "planner.headroom=0.05",
            *self.changes,
        ]

    @property
    def pins(self) -> list[str]:
        """What the peer decided."""
        return [
            f"planner.pin.micro_batch_size={self.micro}",
            f"planner.pin.activation_checkpointing={self.checkpointing}",
            f"planner.pin.loss={self.loss}",
            *(f"planner.pin.{change}" for change in self.engine),
            *(
                change.replace("training.", "planner.pin.")
                for change in self.changes
                if ".optimizer=" in change
            ),
        ]


AXOLOTL = ("method.adapter_dtype=base", "method.dropout=0.05")
INT8 = ("method.quantization=int8", "training.optimizer=adamw_8bit", *AXOLOTL)
TUNED = "method.target_modules=[q_proj,v_proj,gate_proj,up_proj,down_proj]"
NO_HEAD = "its file sets no length, 2,048 stands for it; it adapts the head too, which TRL refuses"
ANY_MODEL = "its file is for any model, in fp32 unless told; here bf16"
UNSLOTH = ("training.optimizer=adamw_8bit", "method.alpha=16")
RECIPES = (
    Recipe("LLaMA-Factory 0.9.3 llama3_lora_sft", "llama3_1_8b", "lora", 2048, 1, 8, "full", 8),
    Recipe("Axolotl qwen3/8b-lora-fused-attn", "qwen3_8b", "lora", 4096, 1, 4, "full", 32, packing=True),
    Recipe(
        "litgpt llama-3.1-8b/lora", "llama3_1_8b", "lora", 512, 1, 8, "none", 32,
        changes=(QUERY_VALUE, "method.dropout=0.05"),
    ),
    Recipe(
        "ms-swift lora_sft", "qwen2_5_7b", "lora", 2048, 1, 16, "full", 8,
        changes=("method.dropout=0.05",), published="22 GB",
    ),
    Recipe(
        "NeMo AutoModel llama3_1_8b_peft_benchmark", "llama3_1_8b", "lora", 4096, 2, 16, "none", 16,
        packing=True, card="h100_80g", changes=("method.dropout=0.1",), published="10.51 s per step",
        published_step_seconds=10.51,
    ),
    Recipe(
        "NeMo AutoModel qwen2_5_7b_peft_benchmark", "qwen2_5_7b", "lora", 4096, 2, 16, "none", 16,
        packing=True, card="h100_80g", published="9.29 s per step", published_step_seconds=9.29,
    ),
    Recipe(
        "torchtune llama3_1/8B_lora_single_device", "llama3_1_8b", "lora", 2048, 2, 8, "full", 8, "chunked",
        changes=(TUNED,), remark=NO_HEAD,
    ),
    Recipe(
        "torchtune qwen2_5/7B_lora_single_device", "qwen2_5_7b", "lora", 2048, 2, 8, "full", 8, "chunked",
        changes=(TUNED,), remark=NO_HEAD,
    ),
    Recipe(
        "TRL trl sft, LoRA", "llama3_1_8b", "lora", 1024, 2, 8, "full", 32, "chunked", packing=True,
        changes=(QUERY_VALUE, "method.dropout=0.05"), remark=ANY_MODEL,
    ),
    Recipe(
        "Axolotl llama-3/instruct-lora-8b", "llama3_1_8b", "qlora", 4096, 2, 4, "full", 32,
        card="a100_40g", changes=INT8,
    ),
    Recipe("LLaMA-Factory 0.9.3 llama3_lora_sft_otfq", "llama3_1_8b", "qlora", 2048, 1, 8, "full", 8),
    Recipe(
        "Axolotl llama-3/qlora", "llama3_1_8b", "qlora", 4096, 2, 4, "full", 32, packing=True,
        changes=("training.optimizer=paged_adamw_32bit", "method.double_quantization=false", *AXOLOTL),
    ),
    Recipe(
        "alignment-handbook zephyr-7b-beta qlora", "mistral_7b", "qlora", 2048, 4, 2, "full", 16,
        changes=("method.dropout=0.05",),
    ),
    Recipe(
        "Unsloth Studio, Llama 3.1 8B", "llama3_1_8b", "qlora", 8192, 2, 4, "offload", 16, "chunked",
        changes=UNSLOTH,
    ),
    Recipe(
        "Unsloth Studio, Qwen2.5 7B", "qwen2_5_7b", "qlora", 2048, 2, 4, "offload", 16, "chunked",
        changes=UNSLOTH,
    ),
    Recipe(
        "ms-swift qlora/bnb", "qwen2_5_7b", "qlora", 2048, 1, 16, "full", 8, published="10 GB",
    ),
    Recipe(
        "torchtune llama3_1/8B_qlora_single_device", "llama3_1_8b", "qlora", 2048, 2, 8, "full", 8, "chunked",
        changes=("method.double_quantization=false", TUNED), remark=NO_HEAD,
    ),
    Recipe(
        "Unsloth CLI", "llama3_1_8b", "qlora", 2048, 2, 4, "offload", 64, "chunked", changes=UNSLOTH,
        remark="for any model",
    ),
    Recipe(
        "Axolotl llama-3/fft-8b", "llama3_1_8b", "full", 8192, 1, 8, "full", packing=True,
        changes=("training.optimizer=paged_adamw_8bit",), published="48 GB, in its README",
    ),
    Recipe(
        "ms-swift full/train", "qwen2_5_7b", "full", 2048, 1, 16, "full", published="76 GiB",
    ),
    Recipe(
        "torchtune llama3_1/8B_full_single_device", "llama3_1_8b", "full", 2048, 2, 1, "full", loss="chunked",
        changes=("training.optimizer=paged_adamw_8bit",), published="18.9 GiB, on a 24 GB card",
        remark="its file sets no length, 2,048 stands for it; its optimizer steps in the backward pass and frees each "
        "gradient, ours keep all of them until the step",
    ),
    Recipe(
        "TRL trl sft, full", "llama3_1_8b", "full", 1024, 2, 8, "full", loss="chunked", packing=True,
        remark=ANY_MODEL,
    ),
    Recipe(
        "Unsloth full_finetune template", "qwen2_5_0_5b", "full", 2048, 1, 4, "offload", loss="chunked",
        card="rtx4090_24g", changes=("training.optimizer=adamw_8bit",),
    ),
    Recipe(
        "LLaMA-Factory 0.9.3 llama3_full_sft", "llama3_1_8b", "full", 2048, 1, 2, "full", devices=8,
        changes=("training.precision=bf16_mixed",), engine=("engine=deepspeed", "zero_stage=3"),
        remark="its file does not say how many cards",
    ),
    Recipe(
        "torchtune llama3_1/8B_full", "llama3_1_8b", "full", 2048, 2, 1, "full", loss="chunked", devices=8,
        engine=("engine=fsdp2",),
        remark="its file sets neither the length, 2,048 stands for it, nor how many cards; ours, by DeepSpeed, trains "
        "fp32 copies of the weights, theirs the bf16 weights",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What one side comes to."""

    fits: bool
    """Whether it fits, with 5 % of the card kept free."""
    settings: str
    """Micro batch x accumulation, checkpointing, loss, and engine of several cards."""
    peak_bytes: int
    """Predicted highest bytes on the device."""
    tokens_per_second: float | None
    """Predicted; None where it doesn't fit."""


def outcome_of(choice: PlanChoice) -> Outcome:
    """The plan that was taken, or the nearest one."""
    nearest = choice.nearest
    plan = choice.plan or (nearest.plan if nearest else None)
    assert plan is not None  # one was priced
    settings = f"{plan.micro_batch_size} x {plan.gradient_accumulation_steps}, {plan.activation_checkpointing.value}, "
    settings += plan.loss.value + (f", {plan.optimizer.value}" if plan.uses_pages else "")
    if plan.world_size > 1:
        stage = f" {plan.zero_stage}" if plan.engine is Engine.DEEPSPEED else ""
        settings += f", {plan.engine.value}{stage}"
    if choice.estimate is not None:
        rate = choice.step.tokens_per_second if choice.step else None
        return Outcome(True, settings, choice.estimate.peak_device_bytes, rate)
    return Outcome(False, settings, nearest.peak_bytes if nearest else 0, None)


def row_of(recipe: Recipe) -> tuple[Outcome, Outcome]:
    """Theirs and ours."""
    sides = [recipe.job + recipe.pins, recipe.job]
    theirs, ours = (outcome_of(plan_job(resolve(load_job(side), ()))) for side in sides)
    return theirs, ours


def line_of(recipe: Recipe, theirs: Outcome, ours: Outcome) -> str:
    """One line of the table."""
    cells = [recipe.name, recipe.model, recipe.what, str(recipe.length), recipe.where]
    for side in (theirs, ours):
        rate = f"{side.tokens_per_second:,.0f}" if side.tokens_per_second else "does not fit"
        cells += [side.settings, f"{side.peak_bytes / GIB:.1f}", rate]
    ratio = ""
    if theirs.tokens_per_second and ours.tokens_per_second:
        ratio = f"{ours.tokens_per_second / theirs.tokens_per_second:.2f}"
    return "| " + " | ".join([*cells, ratio, recipe.published]) + " |"


HEADER = (
    "| recipe | model | method | length | card | theirs | GiB | tokens/s | ours | GiB | tokens/s | ratio | they say |\n"
    "|---|---|---|--:|---|---|--:|--:|---|--:|--:|--:|---|"
)


def newest(kind: str) -> Any:
    """The newest data file of a kind."""
    file = max((ROOT / "docs" / "accuracy").glob(f"????-??-??-{kind}.json"))
    return json.loads(file.read_text(encoding="utf-8"))


def joined(rows: Sequence[dict[str, Any]], kept: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """New rows, and kept ones of recipes that still train the same, in the order of the recipes."""
    same = {recipe.name: recipe for recipe in RECIPES}
    found = {}
    for row in (*kept, *rows):
        before = Recipe(**row["recipe"])
        now = same.get(before.name)
        if now is not None and (before.job, before.pins) == (now.job, now.pins):
            found[now.name] = row | {"recipe": asdict(now)}
    return [found[name] for name in same if name in found]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="recipes whose name has this text")
    parser.add_argument("--date", default=datetime.now(UTC).date().isoformat(), help="of the data file")
    parser.add_argument("--write", action="store_true", help="write docs/accuracy/<date>-peers.json")
    options = parser.parse_args()
    print(HEADER)
    for recipe in RECIPES:
        if options.only.lower() not in recipe.name.lower():
            continue
        theirs, ours = row_of(recipe)
        print(line_of(recipe, theirs, ours), flush=True)
        if options.write:  # each as it comes
            row = {"recipe": asdict(recipe), "theirs": asdict(theirs), "ours": asdict(ours)}
            rows = joined([row], newest("peers")["rows"])
            versions = {name: version(name) for name in LIBRARIES}
            document = {"date": options.date, "versions": versions, "rows": rows}
            file = ROOT / "docs" / "accuracy" / f"{options.date}-peers.json"
            file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
