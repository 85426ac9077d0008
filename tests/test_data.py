"""Examples in every legal layout become what TRL takes, and every bad one is named by file, row and field.

The consumer is real: each layout is tokenised by TRL's SFTTrainer itself. The hub is a stand-in. The built-in
data is checked against `inspect`, and made in processes that differ in everything that must not matter.
"""

# mypy: disable-error-code="import-untyped, no-untyped-call"
# neither datasets nor the constructors of tokenizers are typed

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import itertools
import json
import os
import random
import subprocess
import sys
import textwrap
import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from launcher.errors import ConfigError, DataError
from launcher.job import DataFormat, DataSpec, EvaluationSpec
from launcher.worker.data import ROWS_PER_CHUNK, load_examples, require_chat_template, split_examples
from launcher.worker.source_rows import LONGEST_ROW_BYTES

Row = dict[str, Any]

ASK = {"role": "user", "content": "Two plus two?"}
TELL = {"role": "assistant", "content": "Four."}
SYSTEM = {"role": "system", "content": "Be brief."}

# One row in each layout, and what it must become.
LEGAL: dict[str, tuple[DataFormat, Row, Row]] = {
    "messages": (DataFormat.MESSAGES, {"messages": [SYSTEM, ASK, TELL]}, {"messages": [SYSTEM, ASK, TELL]}),
    "alpaca": (
        DataFormat.ALPACA,
        {"instruction": "Add.", "input": "2, 2", "output": "Four."},
        {"messages": [{"role": "user", "content": "Add.\n\n2, 2"}, TELL]},
    ),
    "alpaca without input": (
        DataFormat.ALPACA,
        {"instruction": "Two plus two?", "output": "Four."},
        {"messages": [ASK, TELL]},
    ),
    "alpaca with nulls": (
        DataFormat.ALPACA,
        {"instruction": "Two plus two?", "input": None, "output": "Four.", "system": None, "history": []},
        {"messages": [ASK, TELL]},
    ),
    "alpaca with system": (
        DataFormat.ALPACA,
        {"instruction": "Two plus two?", "input": "", "output": "Four.", "system": "Be brief."},
        {"messages": [SYSTEM, ASK, TELL]},
    ),
    "sharegpt": (
        DataFormat.SHAREGPT,
        {"conversations": [{"from": "human", "value": ASK["content"]}, {"from": "gpt", "value": "Four."}]},
        {"messages": [ASK, TELL]},
    ),
    "sharegpt with system": (
        DataFormat.SHAREGPT,
        {"system": "Be brief.", "conversations": [{"from": "user", "value": "Two plus two?", "weight": 1}]},
        {"messages": [SYSTEM, ASK]},
    ),
    "prompt and completion": (
        DataFormat.PROMPT_COMPLETION,
        {"prompt": "2 + 2 =", "completion": " 4", "id": 7},
        {"prompt": "2 + 2 =", "completion": " 4"},
    ),
    "conversational prompt and completion": (
        DataFormat.PROMPT_COMPLETION,
        {"prompt": [SYSTEM, ASK], "completion": [TELL]},
        {"prompt": [SYSTEM, ASK], "completion": [TELL]},
    ),
    "text": (
        DataFormat.TEXT,
        {"text": "Two plus two is four.", "meta": {}},
        {"text": "Two plus two is four."},
    ),
}

each_legal = pytest.mark.parametrize(("layout", "row", "expected"), LEGAL.values(), ids=list(LEGAL))


def write_lines(file: Path, rows: Iterable[object]) -> str:
    """Writes one JSON value a line and returns the path."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def load(path: str | Path, layout: DataFormat = DataFormat.AUTO, num_examples: int | None = None) -> Dataset:
    """Loads with everything else at its default."""
    return load_examples(DataSpec(path=str(path), format=layout, num_examples=num_examples))


# --------------------------------------------------------------------------------------------- legal examples


@each_legal
def test_a_layout_is_recognised_and_laid_out(
    layout: DataFormat, row: Row, expected: Row, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [row, row])
    assert load(path).to_list() == [expected, expected]
    assert load(path, layout).to_list() == [expected, expected]


@each_legal
def test_an_array_reads_as_the_lines_do(layout: DataFormat, row: Row, expected: Row, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("\n \n" + json.dumps([row, row], indent=2))
    assert load(tmp_path / "rows.json", layout).to_list() == [expected, expected]


def test_white_space_byte_order_mark_and_upper_case_suffix_do_not_matter(tmp_path: Path) -> None:
    for content in (
        b'\n\n{"text": "a"}\n\n  {"text": "b"}\r\n\n',
        b'\r\n [ {"text": "a"},\n{"text": "b"}]\n',
    ):
        for mark in (b"", b"\xef\xbb\xbf"):
            (tmp_path / "rows.JSONL").write_bytes(mark + content)
            assert load(tmp_path / "rows.JSONL")["text"][:] == ["a", "b"]


def test_the_files_of_a_folder_are_joined_by_name(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", [{"text": "3"}])
    (tmp_path / "a.json").write_text(json.dumps([{"text": "1"}, {"text": "2"}]))
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "sub.json").mkdir()
    assert load(tmp_path)["text"][:] == ["1", "2", "3"]
    assert load(tmp_path, num_examples=2)["text"][:] == ["1", "2"]


@pytest.mark.parametrize("num_examples", [1, 3, 5, 99])
def test_a_limit_takes_the_first(num_examples: int, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"text": str(number)} for number in range(5)])
    assert load(path, num_examples=num_examples)["text"][:] == [str(n) for n in range(min(5, num_examples))]


def test_rows_behind_the_limit_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\nrubbish\n')
    assert len(load(tmp_path / "rows.jsonl", num_examples=2)) == 2
    with pytest.raises(DataError, match="line 3"):
        load(tmp_path / "rows.jsonl")


def test_more_rows_than_a_chunk_keep_their_order(tmp_path: Path) -> None:
    texts = [str(number) for number in range(2 * ROWS_PER_CHUNK + 1)]
    path = write_lines(tmp_path / "rows.jsonl", ({"text": text} for text in texts))
    assert load(path)["text"][:] == texts


def test_the_same_conversation_is_the_same_in_each_chat_layout(tmp_path: Path) -> None:
    chance = random.Random(0)

    def words() -> str:
        return "".join(chance.choice("ab ç漢🙂\n\"\\'{}[]\u2028\x00") for _ in range(chance.randrange(40)))

    for number in range(60):
        system, user, answer = words(), words() or "?", words()
        alpaca = {"instruction": user, "output": answer, "system": system}
        turns = [{"from": "human", "value": user}, {"from": "gpt", "value": answer}]
        opening = [{"role": "system", "content": system}] if system else []
        said = [*opening, {"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        rows: list[Row] = [alpaca, {"conversations": turns, "system": system}, {"messages": said}]
        for layout, row in zip(("alpaca", "sharegpt", "messages"), rows, strict=True):
            path = write_lines(tmp_path / f"{layout}{number}.jsonl", [row])
            assert load(path).to_list() == [{"messages": said}]


# ----------------------------------------------------------------------------------------------- bad examples

# Layout asked for, the bad second row, and what the message must hold.
BAD: dict[str, tuple[DataFormat, object, str]] = {
    "not an object": (DataFormat.TEXT, ["a"], "expected an object, found a list"),
    "field missing": (DataFormat.TEXT, {"txt": "a"}, "`text` is missing; found `txt`"),
    "no keys at all": (DataFormat.TEXT, {}, "`text` is missing; found none"),
    "field null": (DataFormat.ALPACA, {"instruction": "a", "output": None}, "`output` is missing"),
    "wrong type": (DataFormat.TEXT, {"text": 5}, "`text` must be text, found a number"),
    "half a surrogate pair": (
        DataFormat.TEXT,
        {"text": "a\ud800"},
        "`text` holds half a character at position 1",
    ),
    "optional field of wrong type": (
        DataFormat.ALPACA,
        {"instruction": "a", "input": ["b"], "output": "c"},
        "`input` must be text, found a list",
    ),
    "no turns": (
        DataFormat.MESSAGES,
        {"messages": []},
        "`messages` must be a list of turns, found an empty list",
    ),
    "turns are text": (
        DataFormat.MESSAGES,
        {"messages": "hi"},
        "`messages` must be a list of turns, found text",
    ),
    "turn is text": (DataFormat.MESSAGES, {"messages": [ASK, "hi"]}, "`messages[1]` must be an object"),
    "turn without content": (
        DataFormat.MESSAGES,
        {"messages": [{"role": "user"}]},
        "`messages[0].content` is missing",
    ),
    "turn without role": (
        DataFormat.MESSAGES,
        {"messages": [{"content": "a"}]},
        "`messages[0].role` is missing",
    ),
    "content in parts": (
        DataFormat.MESSAGES,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        "`messages[0].content` must be text, found a list",
    ),
    "unknown role": (
        DataFormat.MESSAGES,
        {"messages": [ASK, {"role": "robot", "content": "a"}]},
        "`messages[1].role` is `robot`; legal: `system`, `user`, `assistant`",
    ),
    "unknown speaker": (
        DataFormat.SHAREGPT,
        {"conversations": [{"from": "observation", "value": "a"}]},
        "`conversations[0].from` is `observation`; legal: `system`, `human`",
    ),
    "role spelt as in messages": (
        DataFormat.SHAREGPT,
        {"conversations": [ASK, TELL]},
        "`conversations[0].from` is missing",
    ),
    "two system prompts": (
        DataFormat.SHAREGPT,
        {"system": "a", "conversations": [{"from": "system", "value": "b"}]},
        "`system` is given, and `conversations[0]`",
    ),
    "text answered by messages": (
        DataFormat.PROMPT_COMPLETION,
        {"prompt": "a", "completion": [TELL]},
        "`prompt` must be a list of turns, found text",
    ),
    "messages after text": (
        DataFormat.PROMPT_COMPLETION,
        {"prompt": [ASK], "completion": [TELL]},
        "`prompt` is a list, but was text in the rows before",
    ),
    "tools": (DataFormat.MESSAGES, {"messages": [ASK], "tools": "[{}]"}, "`tools` is not supported"),
    "earlier turns": (
        DataFormat.ALPACA,
        {"instruction": "a", "output": "b", "history": [["c", "d"]]},
        "`history` is not supported",
    ),
    "a tool call": (
        DataFormat.MESSAGES,
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]},
        "`messages[0].tool_calls` is not supported",
    ),
}


@pytest.mark.parametrize(("layout", "bad", "said"), BAD.values(), ids=list(BAD))
def test_a_bad_row_is_named_with_its_field(
    layout: DataFormat, bad: object, said: str, tmp_path: Path
) -> None:
    good = next(row for legal, row, _ in LEGAL.values() if legal is layout)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(good) + "\n\n" + json.dumps(bad) + "\n")
    with pytest.raises(DataError) as failed:
        load(file, layout)
    assert f"{file}, row 2 (line 3): " in failed.value.message
    assert said in failed.value.message
    assert failed.value.hint
    (tmp_path / "rows.json").write_text(json.dumps([good, bad]))
    with pytest.raises(DataError) as failed:
        load(tmp_path / "rows.json", layout)
    assert f"{tmp_path / 'rows.json'}, row 2: " in failed.value.message
    assert said in failed.value.message


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "a", "answer": "b"}, ("`question`, `answer`", "no known layout")),
        ({"messages": [ASK], "text": "a"}, ("`messages`, `text`", "`messages` and `text`")),
        ({"instruction": "a", "output": "b", "text": "c"}, ("`alpaca` and `text`",)),
        ({"prompt": "a"}, ("`prompt`", "no known layout")),
        ({"text": None}, ("`text`", "no known layout")),
        ({}, ("the keys none fit no known layout",)),
    ],
)
def test_an_unknown_or_ambiguous_layout_names_the_keys_and_the_legal_layouts(
    row: Row, said: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(DataError) as failed:
        load(write_lines(tmp_path / "rows.jsonl", [row]))
    asked_for = (DataFormat.AUTO, DataFormat.LABELED, DataFormat.IMAGES)  # never recognised by keys
    for part in (*said, *(set(DataFormat) - set(asked_for))):
        assert part in failed.value.message
    assert "row 1 (line 1)" in failed.value.message
    assert failed.value.hint


def test_an_ambiguous_row_is_read_as_the_job_says(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b", "text": "c"}])
    assert load(path, DataFormat.TEXT).to_list() == [{"text": "c"}]


# -------------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no examples"),
        (b" \n\n", "holds no examples"),
        (b"\xef\xbb\xbf", "holds no examples"),
        (b"[]", "holds no examples"),
        (b'{"text": "a"}\n\n{"text": }\n', "line 3: malformed JSON"),
        (b'{"text": "a"}\n{"text": "b"', "line 2: malformed JSON"),
        (b'[{"text": "a"},\n{"text": "b"\n', "line 2: malformed JSON"),
        (b'{\n"text": "a"\n}\n', "line 1: malformed JSON"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not UTF-8"),
        (b'[\n{"text": "a"},\n{"text": "\xff"}]\n', "line 3: not UTF-8"),
        ('{"text": "a"}'.encode("utf-16"), "line 1: not UTF-8"),
        (b"[" * 200_000, "line 1: unreadable JSON"),
        (b'{"text": "a"}\n' + b"1" * 5_000, "line 2: unreadable JSON"),
        (b'{"text": "a"}\n"text"\n', "row 2 (line 2): expected an object, found text"),
        (b"[null]", "row 1: expected an object, found null"),
        (b'{"text": "a"}\n{"text": "b\x00"}\n', "line 2: a NUL byte"),
        (b'{"text": "a"}\n' + bytes(300), "line 2: a NUL byte"),
        (b'[{"text": "a"},\n{"text": \x00}]', "line 2: a NUL byte"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError) as failed:
        load(file, DataFormat.TEXT)
    assert str(file) in failed.value.message
    assert said in failed.value.message
    assert failed.value.hint


@pytest.mark.parametrize("opening", [b"", b"["], ids=["lines", "array"])
def test_a_line_of_200_megabytes_is_refused_by_its_number(opening: bytes, tmp_path: Path) -> None:
    """Of a file of lines no more is read than an example may have."""
    file = tmp_path / "rows.json"
    with file.open("wb") as stream:
        stream.write(opening + b'{"text": "a"}' + (b"," if opening else b"") + b'\n{"text": "')
        for _ in range(200):
            stream.write(b"x" * 1_000_000)
        stream.write(b'"}\n' + (b"]" if opening else b""))
    tracemalloc.start()
    with pytest.raises(DataError) as failed:
        load(file, DataFormat.TEXT)
    highest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    where = "row 2: `text` has 200000000 characters" if opening else "line 2: longer than 64.00 MiB"
    assert f"{file}, {where}" in failed.value.message
    assert "cut long texts into several examples" in failed.value.hint
    assert opening or highest < 3 * LONGEST_ROW_BYTES


def test_paths_that_lead_nowhere_are_data_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_hub(path: str, split: str) -> Dataset:
        raise AssertionError(f"asked the hub for {path} [{split}]")

    monkeypatch.setattr(datasets, "load_dataset", no_hub)
    (tmp_path / "table.csv").write_text("text\na\n")
    (tmp_path / "folder").mkdir()
    nowhere = [
        "/no/such/folder",
        "no/such/file.json",
        "rows.jsonl",
        "./rows",
        "a/b/c",
        "~nobody-here/x",
        "a\0b",
    ]
    paths = [str(tmp_path / "table.csv"), str(tmp_path / "folder"), *nowhere, "x" * 5_000 + "/y/z"]
    for path in paths:
        with pytest.raises(DataError) as failed:
            load(path)
        assert failed.value.hint, path


def test_an_empty_file_among_others_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(DataError, match=r"b\.jsonl holds no examples"):
        load(tmp_path)


@pytest.mark.parametrize("path", ["", "builtin:", "builtin:java_docs"])
def test_a_path_that_is_no_choice_is_a_config_error(path: str) -> None:
    with pytest.raises(ConfigError, match="python_docs"):
        load(path)


def test_no_damage_to_a_file_ends_in_anything_but_rows_or_a_data_error(tmp_path: Path) -> None:
    chance = random.Random(0)
    rows = [row for _, row, _ in LEGAL.values()]
    outcomes: dict[str, int] = {"rows": 0, "error": 0}
    for number in range(600):
        some = chance.choices(rows, k=1) * 3
        content = bytearray(
            json.dumps(some).encode() if number % 2 else b"\n".join(json.dumps(r).encode() for r in some)
        )
        for _ in range(chance.randrange(1, 4)):
            place = chance.randrange(len(content))
            match chance.randrange(3):
                case 0:
                    content[place] = chance.choice(b'{}[]",:\\0aN\n\x00\xff')
                case 1:
                    del content[place : place + chance.randrange(1, 30)]
                case _:
                    content[place:place] = content[:place]
            content = content or bytearray(b"{}")
        (tmp_path / "rows.json").write_bytes(content)
        try:
            loaded = load(tmp_path / "rows.json")
        except DataError:
            outcomes["error"] += 1
        else:
            outcomes["rows"] += 1
            assert len(loaded) > 0
    assert min(outcomes.values()) > 20, outcomes


# ---------------------------------------------------------------------------------------------------- the hub


def fake_hub(result: Callable[[str, str], Dataset]) -> Callable[..., Dataset]:
    """A `load_dataset` that answers what a function says."""

    def load_dataset(path: str, *, split: str) -> Dataset:
        return result(path, split)

    return load_dataset


def test_a_hub_id_is_loaded_with_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def answer(path: str, split: str) -> Dataset:
        asked.append((path, split))
        return Dataset.from_list([{"messages": [ASK, TELL], "id": 1}] * 4)

    monkeypatch.setattr(datasets, "load_dataset", fake_hub(answer))
    loaded = load_examples(DataSpec(path="some/dataset", split="train[:10%]", num_examples=3))
    assert loaded.to_list() == [{"messages": [ASK, TELL]}] * 3
    assert asked == [("some/dataset", "train[:10%]")]


def test_a_bad_hub_row_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": None}]
    monkeypatch.setattr(datasets, "load_dataset", fake_hub(lambda path, split: Dataset.from_list(rows)))
    with pytest.raises(DataError, match=r"^some-set \[train\], row 2: `output` is missing"):
        load("some-set")


@pytest.mark.parametrize(
    "failure",
    [
        datasets.exceptions.DatasetNotFoundError("no such data set"),
        datasets.exceptions.DatasetGenerationError("broken files"),
        ConnectionError("the hub can't be reached"),
        ValueError("Unknown split 'trian'"),
        RuntimeError("Dataset scripts are no longer supported"),
        PermissionError("cache"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_failure_of_the_hub_is_a_data_error_with_a_hint(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str, split: str) -> Dataset:
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", fake_hub(fail))
    with pytest.raises(DataError) as failed:
        load("some/dataset")
    assert "`some/dataset`" in failed.value.message
    assert str(failure) in failed.value.message
    assert failed.value.hint


def test_an_empty_hub_split_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", fake_hub(lambda path, split: Dataset.from_list([])))
    with pytest.raises(DataError, match="holds no examples"):
        load("some/dataset")


# -------------------------------------------------------------------------------------------------- splitting


@pytest.fixture
def ten(tmp_path: Path) -> DataSpec:
    """Ten rows of text, `0` to `9`."""
    return DataSpec(path=write_lines(tmp_path / "ten.jsonl", [{"text": str(number)} for number in range(10)]))


@pytest.mark.parametrize("num_held_out", range(1, 10))
def test_the_last_examples_are_held_out(num_held_out: int, ten: DataSpec) -> None:
    evaluation = EvaluationSpec(enabled=True, num_examples=num_held_out)
    trained, held_out = split_examples(load_examples(ten), ten, evaluation)
    assert held_out is not None
    assert len(held_out) == num_held_out
    assert [*trained["text"], *held_out["text"]] == [str(number) for number in range(10)]


def test_nothing_is_held_out_unless_asked(ten: DataSpec) -> None:
    trained, held_out = split_examples(
        load_examples(ten), ten, EvaluationSpec(path="/ignored", num_examples=99)
    )
    assert len(trained) == 10
    assert held_out is None


@pytest.mark.parametrize("num_held_out", [10, 11, 64])
def test_something_must_be_left_to_train_on(num_held_out: int, ten: DataSpec) -> None:
    with pytest.raises(DataError, match=f"holding out {num_held_out} of the 10"):
        split_examples(load_examples(ten), ten, EvaluationSpec(enabled=True, num_examples=num_held_out))


def test_held_out_examples_can_come_from_elsewhere(ten: DataSpec, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "other.jsonl", [{"text": f"other {number}"} for number in range(5)])
    evaluation = EvaluationSpec(enabled=True, path=path, num_examples=3)
    trained, held_out = split_examples(load_examples(ten), ten, evaluation)
    assert len(trained) == 10
    assert held_out is not None
    assert held_out["text"][:] == ["other 0", "other 1", "other 2"]


# ----------------------------------------------------------------------------------------------- the consumer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges, whose chat template writes role, colon, content, semicolon."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<eos>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    made.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    return made


@each_legal
def test_the_trainer_itself_takes_each_layout(
    layout: DataFormat, row: Row, expected: Row, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path / "out"), max_length=512, use_cpu=True, bf16=False, report_to="none"
        ),
        train_dataset=load(write_lines(tmp_path / "rows.jsonl", [row])),
        processing_class=tokenizer,
    )
    prepared: Any = trainer.train_dataset
    (example,) = prepared
    turns = [*expected.get("messages", [])]
    if isinstance(expected.get("prompt"), list):
        turns = [*expected["prompt"], *expected["completion"]]
    rendered = "".join(f"{turn['role']}:{turn['content']};" for turn in turns)
    plain = expected.get("text") or f"{expected.get('prompt')}{expected.get('completion')}"
    assert tokenizer.decode(example["input_ids"]) == (rendered or f"{plain}<eos>")


@each_legal
def test_conversations_need_a_chat_template(
    layout: DataFormat, row: Row, expected: Row, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    examples = load(write_lines(tmp_path / "rows.jsonl", [row]))
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    require_chat_template(tokenizer, examples, "rows.jsonl", "org/base")
    if "messages" in expected or isinstance(expected.get("prompt"), list):
        with pytest.raises(DataError, match=r"rows\.jsonl.*`org/base` has no chat template") as failed:
            require_chat_template(bare, examples, "rows.jsonl", "org/base")
        assert "prompt_completion" in failed.value.hint
    else:
        require_chat_template(bare, examples, "rows.jsonl", "org/base")


# ------------------------------------------------------------------------------------------ the built-in data


@pytest.fixture(scope="module")
def python_docs() -> list[tuple[str, str]]:
    """Questions and answers of the built-in data."""
    turns = load("builtin:python_docs")["messages"]
    assert all([turn["role"] for turn in pair] == ["user", "assistant"] for pair in turns)
    return [(asked["content"], answered["content"]) for asked, answered in turns]


def test_the_answers_are_the_signatures_and_docstrings(python_docs: list[tuple[str, str]]) -> None:
    answers = dict(python_docs)
    members: dict[str, Any] = {
        "textwrap.dedent": textwrap.dedent,
        "textwrap.TextWrapper.fill": textwrap.TextWrapper.fill,
        "json.dumps": json.dumps,
        "os.path.join": os.path.join,
        "len": len,
        "str.split": str.split,
        "random.Random.shuffle": random.Random.shuffle,
    }
    for name, member in members.items():
        answer = answers[f"What does `{name}` do in Python, and what is its signature?"]
        docstring = inspect.getdoc(member) or ""
        assert answer.startswith(f"`{name}{inspect.signature(member)}`\n\n{docstring[:1_000]}")


def test_there_are_thousands_of_distinct_pairs_of_sane_length(python_docs: list[tuple[str, str]]) -> None:
    assert 2_500 < len(python_docs) < 6_000
    assert len({question for question, _ in python_docs}) == len(python_docs)
    lengths = [len(answer) for _, answer in python_docs]
    assert min(lengths) > 10
    assert max(lengths) < 4_000


def test_neighbours_come_from_different_modules(python_docs: list[tuple[str, str]]) -> None:
    modules = [question.split("`")[1].split(".")[0] for question, _ in python_docs]
    same = sum(first == second for first, second in itertools.pairwise(modules))
    assert same / len(modules) < 0.1


def test_it_is_quick_silent_and_limited() -> None:
    printed = io.StringIO()
    begun = time.process_time()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        some = load("builtin:python_docs", num_examples=20)
    assert time.process_time() - begun < 3
    assert len(some) == 20
    assert "arning" not in printed.getvalue()


def test_nothing_of_this_process_or_machine_gets_into_it(tmp_path: Path) -> None:
    """Interpreters with different secrets, folders and hash seeds agree, and import no impostor."""
    code = textwrap.dedent("""
        import hashlib, json, os
        from launcher.job import DataSpec
        from launcher.worker.data import load_examples
        text = json.dumps(load_examples(DataSpec(path="builtin:python_docs")).to_list())
        assert os.environ["API_TOKEN"] not in text and os.getcwd() not in text
        print(hashlib.sha256(text.encode()).hexdigest())
    """)
    hashes = set()
    for number in (1, 2):
        folder = tmp_path / f"home{number}"
        folder.mkdir()
        for impostor in ("zipapp.py", "sched.py"):
            (folder / impostor).write_text(f"def run_{number}():\n    'An impostor.'\nprint('impostor')\n")
        environment = {
            **os.environ,
            "API_TOKEN": f"canary-{number}-{number}",
            "HOME": str(folder),
            "PYTHONHASHSEED": str(number),
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        hashes.add(done.stdout)
    assert len(hashes) == 1
    assert len(hashes.pop().strip()) == hashlib.sha256().digest_size * 2
