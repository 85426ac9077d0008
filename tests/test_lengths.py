"""Lengths of data: against brute force, the libraries' own trainer and packing, bytes that can be counted by hand."""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.config import load_job
from launcher.data_lengths import (
    DataLengths,
    LengthOrder,
    expected_longest,
    histogram,
    kept_at,
    padding_share,
    percentile,
    split_share,
)
from launcher.documents import write_document
from launcher.errors import ConfigError, DataError
from launcher.job import DataSpec, Engine, JobSpec, PlannerSpec
from launcher.length_choice import lengths_at_hand
from launcher.planner.explain import explain
from launcher.planner.lengths import (
    candidates,
    far_above,
    length_options,
    position_limit,
    with_candidates,
    words_of_choice,
)
from launcher.planner.search import search
from launcher.report.lengths import lengths_document, lengths_text, options_document, options_text
from launcher.run.lengths import count_lengths, is_at_hand
from tests.imagined import FakeForecaster, Law, job_with
from tests.tiny_job import tiny_order, write_tiny_model

LAW = Law()


def of(*lengths: int, first: tuple[int, ...] = (), longest: int = 0, total: int = 0) -> DataLengths:
    """Lengths as data of their own."""
    return DataLengths(
        "imagined", total or len(lengths), lengths, first or (0,) * len(lengths), longest or max(lengths)
    )


# figures, against brute force and by hand


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 9])
def test_the_longest_of_a_batch_is_that_of_all_draws(batch: int) -> None:
    lengths = [3, 3, 8, 11, 20, 21, 40, 90]
    draws = itertools.combinations(lengths, min(batch, len(lengths)))
    assert expected_longest(lengths, batch) == pytest.approx(statistics.fmean(map(max, draws)))
    wasted = 1 - statistics.fmean(lengths) / expected_longest(lengths, batch)
    assert padding_share(lengths, batch) == pytest.approx(wasted)
    assert padding_share([7, 7, 7], batch) == pytest.approx(0.0)


def test_percentiles_are_numpys() -> None:
    generator = random.Random(0)
    for count in (1, 2, 19, 100, 101):
        lengths = [generator.randrange(1, 500) for _ in range(count)]
        for share in (0.01, 0.5, 0.95, 0.99, 1.0):
            assert percentile(lengths, share) == np.quantile(lengths, share, method="inverted_cdf")


def test_a_histogram_has_every_example_once() -> None:
    assert histogram([1]) == ((1, 1, 1),)
    assert histogram([5, 8, 9, 33]) == ((5, 8, 2), (9, 16, 1), (17, 32, 0), (33, 64, 1))
    lengths = [random.Random(1).randrange(1, 5000) for _ in range(300)]
    assert sum(count for _, _, count in histogram(lengths)) == 300


def test_what_is_cut_is_lost() -> None:
    data = of(10, 20, 30, 40, first=(0, 0, 0, 25))
    assert kept_at(data, 40).tokens_share == 1.0
    kept = kept_at(data, 20)  # of the last one the first 20 tokens are all prompt
    assert (kept.tokens_share, kept.cut_share, kept.dropped_share) == (50 / 100, 2 / 4, 1 / 4)
    assert kept.rows == (10, 20, 20)


def test_figures_that_contradict_each_other_are_refused() -> None:
    for total, lengths, first, longest in ((1, (), (), 0), (1, (5,), (0,), 4), (1, (5, 5), (0, 0), 5)):
        with pytest.raises(ValueError, match=r"lengths|longest"):
            DataLengths("", total, lengths, first, longest)


def test_packing_cuts_where_the_library_cuts() -> None:
    from datasets import Dataset
    from trl import pack_dataset

    lengths = [random.Random(2).randrange(1, 60) for _ in range(80)]
    rows = Dataset.from_list([{"input_ids": [number] * length} for number, length in enumerate(lengths)])
    for length in (8, 32, 100):
        packed = pack_dataset(rows, length, "wrapped")["input_ids"]
        homes = [sum(number in row for row in packed) for number in range(len(lengths))]
        assert split_share(of(*lengths), length) == sum(home > 1 for home in homes) / len(lengths)


# the rule


def test_candidates_are_rounded_marks_and_powers_of_two() -> None:
    data = of(*([100] * 60 + [300] * 37 + [420] * 2 + [5000]))
    # 4096, 512, 256 and 128 are nearer than a quarter to another one
    assert candidates(data, None) == (5000, 2048, 1024, 424, 304, 104)
    assert candidates(data, 2048)[0] == 2048
    assert candidates(of(3, 5), None) == (8,)


def test_the_model_says_how_many_positions_it_has() -> None:
    assert position_limit({"max_position_embeddings": 2048}) == 2048
    assert position_limit({"n_positions": 1024}) == 1024
    assert position_limit({"text_config": {"max_position_embeddings": 8192}}) == 8192
    assert position_limit({}) is None


DATA = of(*([20] * 50 + [40] * 45 + [60] * 4 + [200]))


def automatic(memory_bytes: int) -> JobSpec:
    job = job_with(memory_bytes)
    return with_candidates(replace(job, data=DataSpec(max_length="auto")), candidates(DATA, None))


def test_no_token_is_lost_where_the_longest_example_fits() -> None:
    job = automatic(10**9)
    choice = search(job, FakeForecaster(LAW))
    assert choice.plan is not None and choice.plan.max_length == 200
    options = length_options(
        job, DATA, choice, FakeForecaster(LAW), lambda one: search(one, FakeForecaster(LAW))
    )
    assert [option.length for option in options] == list(candidates(DATA, None))
    assert options[0].kept_share == 1.0 and options[0].plan == choice.plan
    shares = [option.kept_share for option in options]
    assert shares == sorted(shares, reverse=True) and shares[-1] < 1.0
    words = words_of_choice(DATA, 200, candidates(DATA, None), packing=False)
    assert words == "length 200: no token is lost (all of 100 examples were counted)"


def test_the_longest_candidate_that_fits_is_taken_and_what_is_lost_is_said() -> None:
    smallest = replace(search(automatic(10**9), FakeForecaster(LAW)).plan or pytest.fail("roomy"))
    short = min(
        LAW.peak(replace(smallest, micro_batch_size=micro, gradient_accumulation_steps=8 // micro,
                         activation_checkpointing=mode))
        for micro in (1, 2, 4, 8) for mode in type(smallest.activation_checkpointing)
    ) - 1  # fmt: skip
    job = automatic(short)
    choice = search(job, FakeForecaster(LAW))
    lengths = candidates(DATA, None)
    assert choice.plan is not None and choice.plan.max_length == lengths[1]
    options = length_options(
        job, DATA, choice, FakeForecaster(LAW), lambda one: search(one, FakeForecaster(LAW))
    )
    assert options[0].plan is None and "none of" in options[0].reason
    words = words_of_choice(DATA, lengths[1], lengths, packing=False)
    lost = 1 - options[1].kept_share
    assert "changes the result" in words and f"{lost:.1%} of the tokens are lost" in words
    assert "no plan fits 200 (all of 100" in words
    assert "the model has no more positions" in words_of_choice(DATA, 64, (64, 40), packing=False)
    assert "packing cuts" in words_of_choice(DATA, 200, lengths, packing=True)
    text = options_text(options, choice.plan.max_length, False)
    assert f"* {lengths[1]}" in text and "no plan" in text
    assert max(map(len, text.splitlines())) <= 80
    assert json.loads(json.dumps(options_document(options)))[0]["plan"] is None


def test_padding_is_no_speed() -> None:
    """Per second only real tokens count: by the law's own time of a batch of the expected length."""
    job = automatic(10**9)
    choice = search(job, FakeForecaster(LAW))
    find = lambda one: search(one, FakeForecaster(LAW))  # noqa: E731
    (first, *_) = length_options(job, DATA, choice, FakeForecaster(LAW), find)
    plan = choice.plan
    assert plan is not None and first.real_tokens_per_second is not None
    expected = round(expected_longest(DATA.lengths, plan.micro_batch_size))
    seconds = LAW.seconds(replace(plan, max_length=expected))
    assert first.real_tokens_per_second == pytest.approx(8 * statistics.fmean(DATA.lengths) / seconds)
    packed = replace(job, data=replace(job.data, packing=True))
    (whole, *_) = length_options(packed, DATA, choice, FakeForecaster(LAW), find)
    assert whole.real_tokens_per_second == pytest.approx(8 * 200 / LAW.seconds(plan))
    assert whole.cut_share == split_share(DATA, 200) and whole.kept_share == 1.0


def test_a_length_far_above_the_data_is_the_verdict() -> None:
    job = job_with(10**9, PlannerSpec(headroom=0.0), length=1000)
    choice = search(job, FakeForecaster(LAW))
    assert choice.plan is not None
    words = far_above(job, choice.plan, DATA, FakeForecaster(LAW))
    saved = (
        LAW.price(choice.plan).peak_device_bytes
        - LAW.price(replace(choice.plan, max_length=200)).peak_device_bytes
    )
    assert words.startswith("length 1000 is 16.7 times the data's p99 of 60 tokens; no example exceeds 200")
    assert f"{saved / 2**20:.2f} MiB less" in words
    find = lambda one: search(one, FakeForecaster(LAW))  # noqa: E731
    verdict = explain(job, choice, lambda _: FakeForecaster(LAW), find, words).verdict
    assert verdict == f"A setting takes the memory, not the training: {words}."
    assert far_above(job, replace(choice.plan, max_length=100), DATA, FakeForecaster(LAW)) == ""
    assert "few examples need it" in far_above(
        job, replace(choice.plan, max_length=120), DATA, FakeForecaster(LAW)
    )
    packed = replace(job, data=replace(job.data, packing=True))
    assert far_above(packed, choice.plan, DATA, FakeForecaster(LAW)) == ""


def test_the_text_fits_a_terminal() -> None:
    for data in (DATA, of(10, 500, longest=9000, total=70_000)):
        text = lengths_text(data)
        assert max(map(len, text.splitlines())) <= 80
        assert f"longest {data.longest:,}" in text
        document = json.loads(json.dumps(lengths_document(data)))
        assert document["num_counted"] == len(data.lengths)


# what the trainer gets


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model; its tokenizer makes a token of every byte, and has a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<eos>{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def spoken(count: int) -> str:
    return "so " * count


ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": spoken(count)} for count in (1, 40, 7, 3, 90, 12)],
    "messages": [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": spoken(count)}]}
        for count in (2, 50, 9, 30)
    ],
    "pairs": [{"prompt": spoken(count), "completion": "yes"} for count in (2, 50, 9, 30)],
}


@pytest.mark.parametrize("layout", ROWS)
def test_lengths_are_those_that_the_trainer_cuts(layout: str, tiny: Path, tmp_path: Path) -> None:
    """The real trainer, given the same rows and a length, holds what `kept_at` says."""
    from launcher import workload
    from launcher.worker.lengths import count
    from launcher.worker.tasks import examples_of, tokenizer_of

    order = tiny_order(tiny, engine=Engine.NONE, num_devices=1)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[layout]))
    job = replace(order.job, data=DataSpec(path=str(file), max_length=48))
    data = count(LengthOrder(job, str(tiny), ""), tmp_path / "scratch")
    assert data.is_whole and data.longest == max(data.lengths)
    plan = replace(order.plan, max_length=48)
    tokenizer = tokenizer_of(job, str(tiny), "")
    rows, _ = examples_of(job, tokenizer)
    config = workload.model_config(str(tiny), job.model)
    trainer = workload.build_trainer(
        workload.build_model(config, plan, "", job), job, plan,
        workload.training_arguments(job, plan, tmp_path / "out", {"use_cpu": True, "report_to": []}),
        rows, None, tokenizer, (),
    )  # fmt: skip
    kept = kept_at(data, 48)
    assert [len(row["input_ids"]) for row in trainer.train_dataset] == list(kept.rows)  # type: ignore[union-attr]
    assert 0 < kept.tokens_share < 1
    assert (kept.dropped_share > 0) == (layout == "pairs")


def test_a_sample_finds_the_longest_by_its_characters(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.worker import lengths

    monkeypatch.setattr(lengths, "SAMPLE", 10)
    monkeypatch.setattr(lengths, "PROBES", 2)
    file = tmp_path / "rows.jsonl"
    counts = [5] * 60
    counts[33] = 500
    file.write_text("".join(json.dumps({"text": "x" * count}) + "\n" for count in counts))
    job = replace(tiny_order(tiny, Engine.NONE, num_devices=1).job, data=DataSpec(path=str(file)))
    data = lengths.count(LengthOrder(job, str(tiny), ""), tmp_path / "scratch")
    assert not data.is_whole and len(data.lengths) == 10 and data.num_examples == 60
    assert data.longest == 501  # 500 bytes and the end of the text


# the command


def launch(*words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", *words], capture_output=True, text=True, check=False,
        cwd=folder, timeout=600, env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), **environment},
    )  # fmt: skip


def test_the_command_reads_the_data_and_plans_for_its_worst_batch(tiny: Path, tmp_path: Path) -> None:
    sizes = [20] * 39 + [63]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": "y" * size}) + "\n" for size in sizes))
    words = [
        f"model.path={tiny}", "data.path=rows.jsonl", "data.format=auto", "data.packing=false",
        "training.precision=fp32", "training.global_batch_size=2", "planner.pin.micro_batch_size=2",
        "planner.pin.activation_checkpointing=none", "hardware=cpu", "action=plan",
    ]  # fmt: skip
    child = launch(*words, "data.max_length=auto", "output=json", folder=tmp_path)
    assert child.returncode == 0, child.stderr
    document = json.loads(child.stdout)
    lengths = [size + 1 for size in sizes]  # a byte is a token, and a text has an end
    assert document["data_lengths"]["longest"] == 64
    assert document["data_lengths"]["num_tokens_counted"] == sum(lengths)
    assert document["data_lengths"]["percentiles"] == {"p50": 21, "p95": 21, "p99": 64}
    assert document["plan"]["max_length"] == 64
    options = {option["length"]: option for option in document["length_options"]}
    assert set(options) == {64, 32, 24}
    assert options[64]["kept_share"] == 1.0
    assert options[24]["kept_share"] == pytest.approx(sum(min(size, 24) for size in lengths) / sum(lengths))
    assert options[24]["peak_device_bytes"] < options[64]["peak_device_bytes"]
    assert any("no token is lost" in note for note in document["notes"])


def test_data_that_can_not_be_read_is_an_error_only_where_it_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    words = ["recipe=llama_lora", "hardware=a100_40g", "action=plan", "data.max_length=auto"]
    child = launch(*words, folder=tmp_path, HF_HUB_OFFLINE="1")
    assert child.returncode == 5, child.stderr
    assert "Llama-3.1-8B" in child.stderr and "model.path" in child.stderr


def test_data_that_are_not_there_are_a_data_error(tiny: Path, tmp_path: Path) -> None:
    from launcher.worker.lengths import main

    job = replace(tiny_order(tiny, Engine.NONE, num_devices=1).job, data=DataSpec(path="absent.jsonl"))
    write_document(tmp_path / "order.json", LengthOrder(job, str(tiny), ""))
    assert main(["", str(tmp_path / "order.json"), str(tmp_path / "answer.json")]) == 5
    assert not (tmp_path / "answer.json").exists()
    assert lengths_at_hand(job) == (None, "data and tokenizer are not both on this machine")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data=file", "data.max_length=auto"], "`data.path` is empty"),
        (["data.max_length=auto", "planner.pin.max_length=64"], "leave one of the two out"),
        (["data.max_length=auto", "planner.choices.max_length=[64]"], "leave one of the two out"),
        (
            ["data.max_length=auto", "model.task=image_text_to_text", "data.packing=false"],
            "images are not counted",
        ),
        (["data.max_length=automatic"], "data.max_length=automatic"),
    ],
)
def test_what_an_automatic_length_can_not_do_is_said(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_job(["recipe=smollm_lora", "action=plan", *words])


@pytest.mark.thorough
def test_lengths_are_kept_until_data_or_tokenizer_change(tiny: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "four"}\n')
    job = replace(tiny_order(tiny, Engine.NONE, num_devices=1).job, data=DataSpec(path=str(data)))
    order, folder = LengthOrder(job, str(tiny), ""), tmp_path / "kept"
    assert is_at_hand(order)
    assert count_lengths(order, folder).lengths == (5,)
    (kept,) = folder.iterdir()
    kept.write_text(kept.read_text().replace("5", "6"))  # so that nobody can have counted again
    assert count_lengths(order, folder).lengths == (6,)
    data.write_text("")
    with pytest.raises(DataError, match="holds no examples"):
        count_lengths(order, folder, offline=True)
    assert not is_at_hand(replace(order, job=replace(job, data=DataSpec(path="some/hub"))))
