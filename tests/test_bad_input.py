"""Models and data that can't be trained on: refused before the first step, by file, with what to do.

The files are real: written by transformers and safetensors, then damaged. What JSON rows can be is in test_data.py.
"""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from launcher.architecture import LEARNED_POSITIONS, SPLIT_EVENLY, architecture_mistakes
from launcher.config import config_root, group_choices, load_job
from launcher.documents import write_document
from launcher.errors import ConfigError, DataError
from launcher.job import DataFormat, DataSpec, Engine, EvaluationSpec, ModelSpec
from launcher.memory import MemoryMeasurement, StepShape
from launcher.planning import resolve
from launcher.run.model_facts import resolve_model
from launcher.run.weight_files import check_model_folder
from launcher.run_paths import RunPaths
from launcher.worker.ingredients import Ingredients, prepare
from tests.tiny_job import tiny_order

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def sharded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, its weights in several files."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("sharded")
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(folder, max_shard_size="2MB")
    return folder


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A model to be damaged."""
    return shutil.copytree(tiny, tmp_path / "a model")


# ------------------------------------------------------------------------------------- config.json


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}, indent=2))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": -128}, "`hidden_size` is -128; it must be a whole number from 1"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` is 0"),
        ({"vocab_size": "257"}, "`vocab_size` is '257'"),
        ({"vocab_size": None}, "`vocab_size` is None"),
        ({"num_attention_heads": 3, "head_dim": None}, "3, which does not divide hidden_size=128"),
        ({"num_key_value_heads": 3}, "3, which does not divide num_attention_heads=4"),
        ({"num_attention_heads": True}, "`num_attention_heads` is True"),
        ({"intermediate_size": 0.5}, "`intermediate_size` is 0.5"),
        ({"intermediate_size": [8, 0]}, r"`intermediate_size` is [8, 0]"),
        ({"model_type": 7}, "`model_type` is 7; it must be the name of an architecture"),
        ({"text_config": {"hidden_size": 0}}, "`text_config.hidden_size` is 0"),
        ({"text_config": 5}, "`text_config` is 5; it must be an object"),
    ],
)
def test_impossible_numbers_are_named_with_file_and_line(
    copy: Path, changes: dict[str, Any], said: str
) -> None:
    change_config(copy, changes)
    with pytest.raises(DataError) as caught:
        resolve_model(ModelSpec(path=str(copy)), lambda _: None)
    assert f"`{copy / 'config.json'}`" in caught.value.message
    assert said in caught.value.message
    assert caught.value.hint
    name = said.split("`")[1].split(".")[-1] if "`" in said else ""
    lines = [
        number
        for number, line in enumerate((copy / "config.json").read_text().splitlines(), 1)
        if name in line
    ]
    if name and len(lines) == 1:
        assert f", line {lines[0]}: " in caught.value.message


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"text_config": {"quantization_config": {"quant_method": "awq", "bits": 4}}},
        {"quantization_config": {"load_in_4bit": True}},
    ],
)
def test_a_model_that_is_stored_quantised_is_refused(copy: Path, changes: dict[str, Any]) -> None:
    """It would be planned as what it was before."""
    change_config(copy, changes)
    with pytest.raises(
        ConfigError, match=r"quantised already.*quant_method=(bitsandbytes|awq|.none given.)"
    ) as caught:
        resolve_model(ModelSpec(path=str(copy)), lambda _: None)
    assert "method=qlora" in caught.value.hint


@pytest.mark.parametrize("key", ["method.name=qlora", "planner.choices.method=[lora,qlora]"])
def test_what_is_stored_quantised_is_not_quantised_again(copy: Path, key: str) -> None:
    change_config(copy, {"quantization_config": {"quant_method": "mxfp4"}})
    job = load_job([f"model.path={copy}", "hardware=l4_24g", key])
    with pytest.raises(ConfigError, match=r"method=qlora.*mxfp4") as caught:
        resolve(job, ())
    assert "method=lora" in caught.value.hint


def test_what_is_published_quantised_is_not_quantised_again() -> None:
    job = load_job(["recipe=gpt_oss_lora", "hardware=h100_80g", "method=qlora"])
    with pytest.raises(ConfigError, match=r"method=qlora.*mxfp4"):
        resolve(job, ())


def test_all_impossible_numbers_are_named_at_once(copy: Path) -> None:
    change_config(copy, {"hidden_size": 0, "vocab_size": 0})
    with pytest.raises(DataError, match=r"(?s)vocab_size.*hidden_size"):
        resolve_model(ModelSpec(path=str(copy)), lambda _: None)


def test_no_model_of_the_catalogue_is_impossible() -> None:
    for name in group_choices("model"):
        entry = yaml.safe_load((config_root() / "conf" / "model" / f"{name}.yaml").read_text())
        assert architecture_mistakes(entry["architecture"]) == ()


def test_what_is_known_of_architectures_is_what_transformers_says() -> None:
    for name in sorted(SPLIT_EVENLY):
        facts = AutoConfig.for_model(name).to_dict()
        heads = facts.get("num_attention_heads") or facts["n_head"]
        width = facts.get("hidden_size") or facts["n_embd"]
        assert facts.get("head_dim") in (None, width // heads), name
    for name, (key, default) in LEARNED_POSITIONS.items():
        assert getattr(AutoConfig.for_model(name), key) == default, name


def test_impossible_numbers_of_the_command_line_are_a_configuration_error() -> None:
    job = load_job(["model.architecture.num_hidden_layers=-2", "hardware=a100_40g"])
    with pytest.raises(ConfigError, match=r"model\.architecture\.num_hidden_layers is -2"):
        resolve(job, ())


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["data.max_length=2048"], "data.max_length"),
        (["planner.pin.max_length=1025"], "planner.pin.max_length"),
        (["planner.choices.max_length=[512,4096]"], "planner.choices.max_length"),
    ],
)
def test_a_sequence_longer_than_the_table_of_positions_is_refused(arguments: list[str], key: str) -> None:
    job = load_job(["model=gpt2", "hardware=a100_40g", "data.max_length=1024", *arguments])
    with pytest.raises(ConfigError, match=rf"{key}=\d+: gpt2 has a table of 1024 positions") as caught:
        resolve(job, ())
    assert f"{key}=1024 or less" in caught.value.hint
    assert resolve(load_job(["model=gpt2", "hardware=a100_40g", "data.max_length=1024"]), ())


# ------------------------------------------------------------------------------- weights, by file


def cut(name: str, num_bytes: int) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:num_bytes])

    return damage


def written(name: str, content: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


def swapped_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:16] = b"\xff" * 8
    file.write_bytes(content)


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def only_adapter(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text("{}")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


ONE_FILE: dict[str, tuple[Damage, str]] = {
    "cut off": (cut("model.safetensors", -1_000), "its header tells of"),
    "cut off in the header": (cut("model.safetensors", 100), "is no safetensors file, or cut off"),
    "empty": (cut("model.safetensors", 0), "of 0 bytes a header would take 0"),
    "no safetensors": (written("model.safetensors", b"\x80\x02pickle" * 99), "no safetensors file"),
    "a pointer": (written("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "git-lfs"),
    "damaged header": (swapped_header, "has a damaged header"),
    "missing": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "pickles": (only_pickles, "as pickle files only (`pytorch_model.bin`)"),
    "an adapter": (only_adapter, "holds an adapter, not a model"),
    "no tokenizer": (no_tokenizer, "holds no tokenizer"),
}


@pytest.mark.parametrize(("damage", "said"), ONE_FILE.values(), ids=list(ONE_FILE))
def test_a_damaged_model_folder_is_refused_before_anything_starts(
    copy: Path, damage: Damage, said: str
) -> None:
    check_model_folder(copy)
    damage(copy)
    with pytest.raises(DataError) as caught:
        check_model_folder(copy)
    assert str(copy) in caught.value.message
    assert said in caught.value.message
    assert caught.value.hint


def test_a_damaged_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    check_model_folder(sharded)
    shards = sorted(file.name for file in sharded.glob("*.safetensors"))
    assert len(shards) > 1
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    astray = dict.fromkeys(index["weight_map"], shards[0])
    damages: list[tuple[Damage, str]] = [
        (lambda folder: (folder / shards[1]).unlink(), f"such as `{shards[1]}`"),
        (cut(shards[1], -5), f"{shards[1]}` has"),
        (written("model.safetensors.index.json", b"{"), "is no index"),
        (written("model.safetensors.index.json", b'{"weight_map": {}}'), "names no files"),
        (
            written("model.safetensors.index.json", b'{"weight_map": {"a": "../x.safetensors"}}'),
            "is no file name",
        ),
        (
            written("model.safetensors.index.json", json.dumps({"weight_map": astray}).encode()),
            "lacks the tensor",
        ),
    ]
    for number, (damage, said) in enumerate(damages):
        folder = shutil.copytree(sharded, tmp_path / str(number))
        damage(folder)
        with pytest.raises(DataError) as caught:
            check_model_folder(folder)
        assert said in caught.value.message


# ------------------------------------------------------------------------- what the worker is told


def ingredients(folder: Path) -> Ingredients:
    return prepare(tiny_order(folder, Engine.NONE, num_devices=1), RunPaths(folder / "run"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut("model.safetensors", -1_000), "can't be loaded"),
        (
            lambda folder: change_config(folder, {"num_hidden_layers": 8}),
            "lack 18 weights of the model, such as",
        ),
        (
            lambda folder: change_config(folder, {"vocab_size": 300}),
            r"(257, 128) in the file, (300, 128) in the model",
        ),
        (only_pickles, "can't be loaded"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(copy: Path, damage: Damage, said: str) -> None:
    damage(copy)
    with pytest.raises(DataError) as caught:
        ingredients(copy).load()
    assert str(copy) in caught.value.message
    assert said in caught.value.message


@pytest.mark.parametrize(
    "damage",
    [
        written("tokenizer.json", b'{"a": '),
        written("tokenizer.json", b'{"a": 1}'),
        written("tokenizer_config.json", b"[]"),
        lambda folder: change_config(folder, {"model_type": "unheard_of"}),
    ],
)
def test_tokenizers_and_configs_that_transformers_cannot_read_are_data_errors(
    copy: Path, damage: Damage
) -> None:
    damage(copy)
    with pytest.raises(DataError, match="can't be read"):
        ingredients(copy)


def test_a_tokenizer_whose_end_has_no_row_is_refused(copy: Path) -> None:
    change_config(copy, {"vocab_size": 250})
    with pytest.raises(DataError, match=r"eos_token '<eos>' with id 256; the model's embedding has 250 rows"):
        ingredients(copy)


# ---------------------------------------------------------------------------- rows, as laid out


def trained(
    folder: Path,
    rows: list[dict[str, Any]],
    job_changes: dict[str, Any] | None = None,
    rehearses: bool = False,
    **changes: Any,
) -> list[str]:
    """What the worker's own training says of rows; it trains no step when they are refused."""
    from launcher.worker.progress import Progress
    from launcher.worker.train import train

    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSpec(path=str(file), format=DataFormat.AUTO, max_length=changes.get("max_length", 192))
    training = {"max_steps": 1, "global_batch_size": 1}
    order = tiny_order(
        folder, Engine.NONE, num_devices=1, training=training, **{"gradient_accumulation_steps": 1, **changes}
    )
    order = replace(order, job=replace(order.job, data=data, **(job_changes or {})), rehearses=rehearses)
    made = replace(prepare(order, RunPaths(folder / "run")), model=None, timeline=None, metrics=None)
    said: list[str] = []
    train(order.job, order.plan, made, Progress(), said.append)
    return said


def test_examples_without_a_token_to_learn_are_refused_together_and_counted_alone(copy: Path) -> None:
    masked = {"prompt": "x" * 100, "completion": "y"}
    with pytest.raises(
        DataError, match=r"none of the 4 examples of .*rows\.jsonl has a token to learn within 64"
    ) as caught:
        trained(copy, [masked] * 4, max_length=64)
    assert "data.max_length above 64" in caught.value.hint
    said = trained(copy, [masked, {"prompt": "x", "completion": "y"}, masked], max_length=64)
    assert "2 of 3 examples are left out: none has a token to learn within 64 tokens" in said


def test_what_a_length_cuts_off_is_counted(copy: Path) -> None:
    """A byte is a token, and each text ends with one more."""
    texts = [{"text": "a" * size} for size in (62, 63, 64, 99, 20)]
    evaluation = EvaluationSpec(enabled=True, num_examples=2, batch_size=1)
    said = trained(copy, texts, {"evaluation": evaluation}, max_length=64)
    assert (
        "1 of 3 examples are cut to 64 tokens: 1 of 192 tokens (0.5 %) are lost; the longest has 65" in said
    )
    assert (
        "1 of 2 held-out examples are cut to 64 tokens: 36 of 121 tokens (29.8 %) are lost; the longest has 100"
        in said
    )
    pair = {"prompt": "a" * 40, "completion": "b" * 40}
    said = trained(copy, [pair, {"prompt": "a", "completion": "b"}], max_length=64)
    assert (
        "1 of 2 examples are cut to 64 tokens: 17 of 84 tokens (20.2 %) are lost; the longest has 81" in said
    )
    assert not [line for line in trained(copy, texts, max_length=100) if "cut" in line]


def test_a_rehearsal_finds_that_there_is_nothing_to_learn(copy: Path) -> None:
    """It looks at the longest examples only: that few others are shorter it can't know."""
    masked = {"prompt": "x" * 100, "completion": "y"}
    with pytest.raises(DataError, match=r"none of the 4 examples of .*rows\.jsonl has a token to learn"):
        trained(copy, [masked] * 4, max_length=64, rehearses=True)
    with pytest.raises(DataError, match=r"none of the 256 longest examples .* within 64 tokens") as caught:
        trained(copy, [masked] * 300 + [{"prompt": "x", "completion": "y"}], max_length=64, rehearses=True)
    assert "launch.rehearse=false" in caught.value.hint


@pytest.mark.thorough
def test_an_example_that_the_rehearsal_passed_over_is_said(copy: Path) -> None:
    """Few characters of another script are more tokens than many letters: each has three bytes."""
    rows = [{"text": "a" * 50}] * 300 + [{"text": "漢" * 40}]
    assert not [line for line in trained(copy, rows) if "rehearsal" in line]
    seen = MemoryMeasurement(0, "by hand", (), {}, (StepShape(1, 51),))
    write_document(RunPaths(copy / "run").rehearsal.measured(0), seen)
    said = trained(copy, rows)
    assert [line for line in said if "has 121 tokens, the rehearsal's longest had 51" in line], said
    assert not [line for line in trained(copy, rows[:300]) if "rehearsal" in line]


def test_fewer_examples_than_a_batch_are_refused(copy: Path) -> None:
    with pytest.raises(DataError, match=r"makes 3 examples of up to 192 tokens, and the first batch needs 4"):
        trained(copy, [{"text": "abc"}] * 3, micro_batch_size=4)


def test_fewer_held_out_examples_than_a_batch_are_refused(copy: Path) -> None:
    changes = {"evaluation": EvaluationSpec(enabled=True, num_examples=2, batch_size=3)}
    with pytest.raises(DataError, match=r"makes 2 rows to evaluate on, and a batch has 3"):
        trained(copy, [{"text": "abc"}] * 6, changes)


def test_tokens_without_a_row_in_the_embedding_are_refused(copy: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(copy)
    assert trained(copy, [{"text": "abc"}] * 2)  # a token that no example has does no harm
    with pytest.raises(
        DataError, match=r"makes token 257 of .*rows\.jsonl, and the model's embedding has 257 rows"
    ):
        trained(copy, [{"text": "abc"}, {"text": "a <new> one"}])


@pytest.mark.parametrize(
    "rehearses",
    [pytest.param(False, id="run", marks=pytest.mark.thorough), pytest.param(True, id="rehearsal")],
)
def test_a_conversation_that_the_template_refuses_is_named(copy: Path, rehearses: bool) -> None:
    """By its line in the file, which a rehearsal takes the longest examples of first."""
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    (copy / "chat_template.jinja").write_text(template)
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    bad = [{"role": "system", "content": "b"}, *turns]
    longer = [{"role": "user", "content": "a" * 50}, turns[1]]
    rows = [{"messages": turns}, {"messages": bad}, {"messages": longer}, {"messages": turns}]
    said = r"rows\.jsonl, row 2 \(line 2\): .*no system here.*system, user, assistant"
    with pytest.raises(DataError, match=said) as caught:
        trained(copy, rows, rehearses=rehearses)
    assert f"`{copy}`" in caught.value.message and caught.value.hint
    held_out = copy / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    evaluation = EvaluationSpec(enabled=True, path=str(held_out), num_examples=4, batch_size=1)
    with pytest.raises(DataError, match=r"held_out\.jsonl, row 3 \(line 3\): "):
        trained(copy, [{"messages": turns}], {"evaluation": evaluation}, rehearses=rehearses)
    (copy / "chat_template.jinja").write_text("{% for m in messages %}")
    with pytest.raises(DataError, match="the chat template of") as caught:
        trained(copy, [{"messages": turns}], rehearses=rehearses)
    assert caught.value.hint


def test_conversations_without_a_template_name_data_and_model(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"rows\.jsonl are conversations") as caught:
        trained(copy, [{"messages": [{"role": "user", "content": "a"}]}])
    assert f"`{copy}`" in caught.value.message and "chat_template.jinja" in caught.value.hint


def test_a_config_that_is_no_json_is_named_with_its_line_and_a_cure(copy: Path) -> None:
    (copy / "config.json").write_text('{\n"model_type": \n}')
    with pytest.raises(DataError, match=r"config\.json` is not JSON: .*line 3") as caught:
        resolve_model(ModelSpec(path=str(copy)), lambda _: None)
    assert "fetch the model again" in caught.value.hint


def test_every_data_error_has_a_cure() -> None:
    calls = [
        (file.name, call)
        for file in sorted((config_root() / "launcher").rglob("*.py"))
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "DataError"
    ]
    assert len(calls) > 40
    bare = [
        f"{name}:{call.lineno}"
        for name, call in calls
        if len(call.args) + sum(keyword.arg == "hint" for keyword in call.keywords) < 2
    ]
    assert bare == []
