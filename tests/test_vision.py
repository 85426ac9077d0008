"""Models that see: the tower stays as it is, images are part of the shape, and a trace at symbols is one at the shape."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from launcher import vision, workload
from launcher.documents import read_document
from launcher.errors import DataError, UnsupportedByPlanner
from launcher.hardware import HardwareSpec
from launcher.job import (
    Attention,
    Checkpointing,
    DataSpec,
    Engine,
    JobSpec,
    Loss,
    Method,
    MethodSpec,
    ModelSpec,
    Optimizer,
    Precision,
    StoredDtype,
    Task,
    TrainingSpec,
)
from launcher.memory import Category, MemoryMeasurement, Phase, StepShape
from launcher.plan import Plan
from launcher.planner import trace
from launcher.run_paths import RunPaths
from launcher.run_record import Status
from launcher.worker import train
from launcher.worker.data import load_examples
from launcher.worker.longest import lengths_of, most_text, worst_batches
from launcher.worker.tasks import data_of_task, fitted
from scripts.small_vision import GEMMA3, LLAVA, PIXELS, TOKENS, rows_with_images, small_processor
from tests.tiny_job import tiny_order

IMAGES = 2
PLAN = Plan(
    method=Method.LORA,
    rank=96,
    max_length=144,
    micro_batch_size=3,
    gradient_accumulation_steps=1,
    activation_checkpointing=Checkpointing.NONE,
    attention=Attention.SDPA,
    loss=Loss.CHUNKED,
    optimizer=Optimizer.ADAMW_TORCH_FUSED,
    precision=Precision.FP32,
)


def subject(architecture: dict[str, Any], plan: Plan = PLAN, **changes: Any) -> trace.TraceSubject:
    """A job with two images an example."""
    job = JobSpec(
        model=ModelSpec(architecture=architecture, task=Task.IMAGE_TEXT_TO_TEXT),
        data=DataSpec(images_per_example=IMAGES),
        training=TrainingSpec(max_steps=2, report_to=()),
    )
    job = replace(job, model=replace(job.model, **changes))
    return trace.TraceSubject(job, plan, HardwareSpec(), workload.model_config("", job.model))


def adapted(traced: trace.TraceSubject, method: MethodSpec | None = None) -> torch.nn.Module:
    """The model with its adapters, without memory."""
    job = replace(traced.job, method=method or MethodSpec())
    with torch.device("meta"):
        model = workload.build_model(traced.config, traced.plan, "", job)
        return workload.attach_adapters(model, job, traced.plan)


@pytest.mark.parametrize(
    ("architecture", "method"), [(GEMMA3, Method.FULL), (LLAVA, Method.LORA)], ids=["gemma3", "llava"]
)
def test_skyline_is_a_full_trace_at_the_shape(architecture: dict[str, Any], method: Method) -> None:
    plan = replace(
        PLAN,
        method=method,
        rank=96 if method is Method.LORA else 0,
        activation_checkpointing=Checkpointing.FULL if method is Method.FULL else Checkpointing.NONE,
    )
    traced = subject(architecture, plan)
    skyline = trace.trace_regime(traced, 3, 144, 1)
    whole = trace.trace_full_depth(traced, 3, 144, 1)
    peaks = [[peak.allocated_bytes for peak in one.peaks(3, 144, 1)] for one in (skyline, whole)]
    assert peaks[0] == peaks[1]
    pixels = 4 * 3 * IMAGES * vision.COLORS * PIXELS**2
    assert whole.peaks(3, 144, 1)[1].by_category_bytes[Category.INPUTS] >= pixels


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")])
@pytest.mark.parametrize("architecture", [GEMMA3, LLAVA], ids=["gemma3", "llava"])
def test_frozen_tower_gets_no_adapters(architecture: dict[str, Any], targets: Any) -> None:
    method = MethodSpec(target_modules=targets)
    names = [name for name, p in adapted(subject(architecture), method).named_parameters() if p.requires_grad]
    assert names and all(".language_model." in name for name in names)
    thawed = adapted(subject(architecture, freeze_vision=False), method)
    names = [name for name, p in thawed.named_parameters() if p.requires_grad]
    assert any(".vision_tower." in name for name in names)


@pytest.mark.parametrize("task", [Task.IMAGE_TEXT_TO_TEXT, Task.CAUSAL_LM])
def test_frozen_tower_is_not_trained_whole_either(task: Task) -> None:
    full = replace(PLAN, method=Method.FULL, rank=0)
    model = adapted(subject(GEMMA3, full, task=task))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all(name.startswith(("model.vision_tower.", "model.multi_modal_")) for name in frozen)
    assert len(frozen) == sum(".language_model." not in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("architecture", [GEMMA3, LLAVA], ids=["gemma3", "llava"])
def test_blank_batches_are_those_of_the_processor(architecture: dict[str, Any]) -> None:
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    traced = subject(architecture)
    shape = vision.image_shape(traced.config)
    length = 150
    rows = rows_with_images(3, length, IMAGES)
    processor = small_processor(architecture["model_type"])
    real = DataCollatorForVisionLanguageModeling(processor, max_length=length)(rows)
    blank = vision.BlankImages(shape, IMAGES)([{"input_ids": [0] * length}] * 3)
    assert {name: (value.shape, value.dtype) for name, value in blank.items()} == {
        name: (value.shape, value.dtype) for name, value in real.items()
    }
    assert int((real["input_ids"][0] == traced.config.image_token_id).sum()) == IMAGES * shape.tokens
    vision.require_shape(real, shape, IMAGES)
    with pytest.raises(UnsupportedByPlanner, match="the plan is for"):
        vision.require_shape(real, shape, IMAGES + 1)


def test_images_need_room() -> None:
    assert trace.regime_lines(subject(GEMMA3)).shortest == IMAGES * TOKENS + 1


def test_families_without_a_fixed_shape_are_refused_by_name() -> None:
    config = workload.model_config("", ModelSpec(architecture={"model_type": "qwen2_vl"}))
    with pytest.raises(UnsupportedByPlanner, match=r"model\.task=image_text_to_text: the images of qwen2_vl"):
        vision.image_shape(config)


def test_examples_have_the_images_that_they_name(tmp_path: Path) -> None:
    rows = rows_with_images(2, 20, IMAGES)
    for number, row in enumerate(rows):
        names = [f"{number}-{index}.png" for index in range(IMAGES)]
        for name, image in zip(names, row["images"], strict=True):
            image.save(tmp_path / name)
        row["images"] = names
    file = tmp_path / "rows.jsonl"
    job = subject(GEMMA3).job
    data = data_of_task(replace(job.data, path=str(file)), job.model)

    def read() -> Any:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return fitted(load_examples(data), job, data)

    first = read()[0]
    assert [image.size for image in first["images"]] == [
        image.size for image in rows_with_images(1, 20, IMAGES)[0]["images"]
    ]
    assert first["messages"] == rows[0]["messages"]
    rows[1]["images"][0] = "none.png"
    with pytest.raises(DataError, match=r"rows\.jsonl, row 2 \(line 2\): there is no image file .*none\.png"):
        read()
    rows[1]["images"] = rows[1]["images"][:1]
    with pytest.raises(
        DataError, match=r"rows\.jsonl, row 2 \(line 2\) has 1 images; data\.images_per_example=2"
    ):
        read()


def test_the_rehearsed_batch_has_the_most_tokens_not_the_most_characters() -> None:
    """Of images every example has as many tokens; text with few characters may have more tokens than a longer one."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    rows, processor = rows_with_images(3, 60, 1), small_processor("llava")
    for row, text in zip(rows, ("w1234 " * 20, "w9 " * 30, "w9"), strict=True):
        row["messages"][1]["content"] = text.strip()
    held = Dataset.from_list([{"messages": row["messages"]} for row in rows])
    lengths = lengths_of(held, processor.tokenizer)
    collate = DataCollatorForVisionLanguageModeling(processor, max_length=None)
    real = [int(collate([row])["attention_mask"].sum()) for row in rows]
    assert (
        [length - lengths[0] for length in lengths] == [length - real[0] for length in real] == [0, 10, -19]
    )
    worst = worst_batches(held, 2, 2, lengths)
    assert worst["messages"] == [held[index]["messages"] for index in (1, 0)] * 2
    assert most_text(held, 1, 1)["messages"][0] == rows[0]["messages"], (
        "by characters another one comes first"
    )


def test_model_that_sees_is_trained_as_predicted_and_its_tower_stays(tmp_path: Path) -> None:
    traced = subject(LLAVA)
    small_processor("llava").save_pretrained(tmp_path)
    torch.manual_seed(0)
    workload.AUTO_CLASSES[Task.IMAGE_TEXT_TO_TEXT].from_config(traced.config).save_pretrained(tmp_path)
    rows = rows_with_images(12, 144, 1)
    for number, row in enumerate(rows):
        row["images"][0].save(tmp_path / f"{number}.png")
        row["images"] = [f"{number}.png"]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    order = tiny_order(tmp_path, Engine.NONE, num_devices=1)
    plan = replace(PLAN, method=Method.FULL, rank=0, micro_batch_size=3, gradient_accumulation_steps=1)
    job = replace(
        order.job,
        model=ModelSpec(path=str(tmp_path), task=Task.IMAGE_TEXT_TO_TEXT, stored_dtype=StoredDtype.FP32),
        data=DataSpec(path=str(file), max_length=144),
        training=replace(order.job.training, max_steps=3, report_to=()),
    )
    paths = RunPaths(tmp_path / "run")
    for made in (paths.root, paths.logs, paths.checkpoints):
        made.mkdir(exist_ok=True)
    assert train.run(replace(order, job=job, plan=plan), paths) is Status.DONE
    measured = read_document(paths.measured(0), MemoryMeasurement)
    skyline = trace.trace_shape(replace(traced, job=job, plan=plan), 3, 144, 1)
    assert measured.shapes == (StepShape(3, 144),)
    predicted = {peak.phase: peak.allocated_bytes for peak in skyline.peaks(3, 144, 1)}
    for phase in measured.phases:
        if phase.phase in (Phase.TRAIN_STEP, Phase.OPTIMIZER_STEP):
            assert abs(predicted[phase.phase] / phase.allocated_bytes - 1.0) <= 0.001, phase.phase
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path, paths.model))
    same = {name for name in before if torch.equal(before[name], after[name])}
    # a change of the language model may be too small for some of its weights, never for all of a layer's
    assert {name for name in before if "vision_tower" in name or "multi_modal" in name} <= same
    assert not any("q_proj" in name and "language_model" in name for name in same)
