"""Sequence classification: what the head takes, what its data may be, and that accumulation does not change the loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from launcher.classification import LOST, mean_loss, tokenized
from launcher.config import load_job
from launcher.documents import read_document
from launcher.errors import ConfigError, DataError, UnsupportedByPlanner
from launcher.hardware import HardwareSpec
from launcher.job import (
    Attention,
    Checkpointing,
    DataFormat,
    DataSpec,
    Engine,
    EvaluationSpec,
    JobSpec,
    Loss,
    Method,
    ModelSpec,
    Optimizer,
    Precision,
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
from launcher.worker.tasks import data_of_task, fitted
from launcher.workload import model_config
from tests.tiny_job import tiny_order, write_tiny_model

WIDTH, LABELS, VOCABULARY = 64, 7, 512
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
CLASSIFIER = ModelSpec(architecture=LLAMA, task=Task.SEQUENCE_CLASSIFICATION, num_labels=LABELS)


def resident(model: ModelSpec, method: Method) -> dict[Category, int]:
    """Resident bytes of a traced job."""
    job = JobSpec(model=model, training=TrainingSpec(max_steps=2, report_to=()))
    plan = Plan(
        method=method,
        rank=0 if method is Method.FULL else 8,
        max_length=64,
        micro_batch_size=2,
        gradient_accumulation_steps=1,
        activation_checkpointing=Checkpointing.NONE,
        attention=Attention.SDPA,
        loss=Loss.PLAIN,
        optimizer=Optimizer.ADAMW_TORCH_FUSED,
        precision=Precision.FP32,
    )
    subject = trace.TraceSubject(job, plan, HardwareSpec(), model_config("", model))
    return dict(trace.trace_shape(subject, 2, 64, 1).resident_bytes(2, 64))


def test_head_of_labels_takes_the_place_of_the_vocabulary() -> None:
    with_words = resident(ModelSpec(architecture=LLAMA), Method.FULL)
    with_labels = resident(CLASSIFIER, Method.FULL)
    saved = 4 * WIDTH * (VOCABULARY - LABELS)
    assert with_words[Category.PARAMETERS] - with_labels[Category.PARAMETERS] == saved
    assert with_words[Category.GRADIENTS] - with_labels[Category.GRADIENTS] == saved


def test_adapters_train_the_head_whole() -> None:
    with_words = resident(ModelSpec(architecture=LLAMA), Method.LORA)
    with_labels = resident(CLASSIFIER, Method.LORA)
    head = 4 * WIDTH * LABELS
    assert with_labels[Category.GRADIENTS] - with_words[Category.GRADIENTS] == head
    # PEFT trains a copy of the head and keeps the one that was there
    words = 4 * WIDTH * VOCABULARY
    assert with_labels[Category.PARAMETERS] - with_words[Category.PARAMETERS] == 2 * head - words


def test_models_without_such_a_head_are_refused_by_task() -> None:
    model = ModelSpec(
        architecture={"model_type": "cohere", "hidden_size": 64}, task=Task.SEQUENCE_CLASSIFICATION
    )
    with pytest.raises(UnsupportedByPlanner, match=r"cohere with model\.task=sequence_classification"):
        resident(model, Method.FULL)


def test_loss_of_a_step_is_the_mean_over_all_its_examples() -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    whole = torch.nn.functional.cross_entropy(logits, labels)
    parts = [mean_loss({"logits": logits[at : at + 2]}, labels[at : at + 2], 6) for at in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(mean_loss({"logits": logits}, labels), whole)


def write_rows(folder: Path, *rows: dict[str, Any]) -> DataSpec:
    """The data of rows in a file."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data_of_task(DataSpec(path=str(file)), CLASSIFIER)


def test_rows_are_text_and_label(tmp_path: Path) -> None:
    data = write_rows(tmp_path, {"text": "good", "label": 1, "id": 7}, {"text": "bad", "label": 0})
    assert data.format is DataFormat.LABELED
    rows = load_examples(data)
    assert rows.to_list() == [{"text": "good", "label": 1}, {"text": "bad", "label": 0}]
    assert fitted(rows, JobSpec(model=CLASSIFIER), data) is rows


@pytest.mark.parametrize("label", ["good", -1, True, 0.5, None])
def test_labels_are_whole_numbers(label: object, tmp_path: Path) -> None:
    data = write_rows(tmp_path, {"text": "fine", "label": 0}, {"text": "odd", "label": label})
    with pytest.raises(DataError, match=r"row 2 .*`label`"):
        load_examples(data)


def test_labels_are_those_of_the_model(tmp_path: Path) -> None:
    data = write_rows(tmp_path, {"text": "fine", "label": 0}, {"text": "odd", "label": LABELS})
    rows, job = load_examples(data), JobSpec(model=CLASSIFIER)
    with pytest.raises(DataError, match=r"rows\.jsonl, row 2 \(line 2\) has label") as caught:
        fitted(rows, job, data)
    assert caught.value.hint == f"model.num_labels={LABELS + 1}"
    with pytest.raises(DataError, match=r"row 2 \(line 2\)"):  # as held-out examples of the same file
        fitted(rows.select([1]), job, data, begins_at=1)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("data.packing=true", "can't be joined"),
        ("planner.pin.loss=chunked", "no tiles"),
        ("generation.enabled=true", "generates"),
        ("data.format=text", "data.format=auto"),
    ],
)
def test_what_classification_does_not_have_is_refused(argument: str, words: str) -> None:
    arguments = ["action=plan", "model.task=sequence_classification", "data.packing=false"]
    with pytest.raises(ConfigError, match=words):
        load_job([*arguments, argument])


def test_classifier_is_trained_evaluated_and_saved_as_predicted(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    file = tmp_path / "labeled.jsonl"
    texts = [("good " * 30)[: 120 if number % 2 else 60 + number] for number in range(24)]
    file.write_text(
        "".join(json.dumps({"text": text, "label": n % LABELS}) + "\n" for n, text in enumerate(texts))
    )
    order = tiny_order(tmp_path, Engine.NONE, method=Method.LORA, num_devices=1, loss=Loss.PLAIN)
    plan = replace(order.plan, max_length=120, micro_batch_size=4, gradient_accumulation_steps=1)
    job = replace(
        order.job,
        model=replace(CLASSIFIER, architecture={}, path=str(tmp_path)),
        data=DataSpec(path=str(file), max_length=120),
        training=replace(order.job.training, max_steps=3, report_to=()),
        evaluation=EvaluationSpec(enabled=True, num_examples=4, steps=2),
    )
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    for made in (paths.logs, paths.checkpoints):
        made.mkdir(exist_ok=True)
    assert train.run(replace(order, job=job, plan=plan), paths) is Status.DONE
    measured = read_document(paths.measured(0), MemoryMeasurement)
    config = model_config(str(tmp_path), job.model)
    assert measured.shapes == (StepShape(4, 120),)
    skyline = trace.trace_shape(trace.TraceSubject(job, plan, HardwareSpec(), config), 4, 120, 1)
    predicted = {peak.phase: peak.allocated_bytes for peak in skyline.peaks(4, 120, 1)}
    phases = {phase.phase: phase.allocated_bytes for phase in measured.phases}
    for phase in (Phase.TRAIN_STEP, Phase.OPTIMIZER_STEP):
        assert abs(predicted[phase] / phases[phase] - 1.0) <= 0.003, phase
    resident = dict(skyline.resident_bytes(4, 120))
    for name in (Category.PARAMETERS, Category.GRADIENTS, Category.OPTIMIZER_STATE):
        assert measured.resident_bytes[name] == resident[name]
    logged = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    assert [0.0 <= line["eval_accuracy"] <= 1.0 for line in logged if "eval_loss" in line] == [True, True]
    saved = json.loads((paths.model / "adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_CLS" and "score" in saved["modules_to_save"]


def test_what_a_length_cuts_off_texts_is_counted(tmp_path: Path) -> None:
    """A byte is a token; the words that open and close each text are not of it."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    write_tiny_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    number = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", number)]
    )
    rows = Dataset.from_list([{"text": "a" * size, "label": 0} for size in (3, 6, 7, 30)])
    cut = tokenized(rows, tokenizer, 8)
    assert [len(ids) for ids in cut["input_ids"]] == [5, 8, 8, 8]
    assert list(cut[LOST]) == [0, 0, 1, 24]
