"""Turns a GGUF file into a folder that transformers loads like any other model."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from launcher.errors import DataError

MALFORMED: Final = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    struct.error,
    TypeError,
    ValueError,
)
"""What the GGUF parsers were seen to raise on damaged files."""


def convert_gguf(folder: Path, target: Path) -> Path:
    """Converts the one GGUF file of a folder into a transformers model folder, once.

    Weights are dequantised and stored in bfloat16 safetensors, beside config.json and the tokenizer with its
    chat template. The target appears complete or not at all, and is left alone once it is there; processes
    that convert at once each write a folder of their own, and the first to finish wins. 135 M parameters take
    about 35 s, most of it spent on parsing the GGUF file's metadata in Python.

    Args:
        folder: Holds exactly one `.gguf` file.
        target: Model folder to make; its parent is made too.

    Returns:
        `target`.

    Raises:
        DataError: There is not exactly one GGUF file, it can't be converted, or `target` holds something
            else.
    """
    if is_model_folder(target):
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target} is there, but is no model folder", hint="delete it, and it is made again")
    gguf = _only_gguf(folder)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        _write_model(gguf, partial)
        _publish(partial, target)
    except OSError as error:
        raise DataError(
            f"{gguf} could not be converted into {target}: {error}", hint="see that its disk has room"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def is_model_folder(folder: Path) -> bool:
    """Whether a folder holds a transformers model: config.json, tokenizer.json and safetensors."""
    has_facts = (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()
    return has_facts and any(folder.glob("*.safetensors"))


def _only_gguf(folder: Path) -> Path:
    """Returns the one GGUF file of a folder; DataError when there are none, several, or it is no GGUF."""
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise DataError(
            f"{folder} must hold exactly one .gguf file, found: {names}",
            hint="delete it, and it is fetched again",
        )
    with found[0].open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise DataError(f"{found[0]} is no GGUF file", hint="delete it, and fetch it again")
    return found[0]


def _write_model(gguf: Path, folder: Path) -> None:
    """Writes model and tokenizer of a GGUF file into a new folder; DataError when they can't be read.

    `dequantize=True` matters: without it transformers counts the model as quantised and refuses to save it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            output_loading_info=True,
        )
    except ImportError as error:
        raise DataError(f"{gguf} can't be read: {error}", hint="install the package `gguf`") from error
    except MALFORMED as error:
        raise DataError(f"{gguf} can't be read: {error}", hint="delete it if it may be damaged") from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):  # transformers would fill them with random numbers
        raise DataError(
            f"{gguf} lacks {len(missing)} weights of the model, such as `{missing[0]}`",
            hint="delete it, and it is fetched again",
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = folder / "config.json"
    _clean_config(config)
    for weights in folder.glob("*.safetensors"):  # saved as 0600: unreadable to others who share the cache
        weights.chmod(config.stat().st_mode)


def _clean_config(config: Path) -> None:
    """Removes the names that the GGUF file's author left in config.json; they name no folder or hub id."""
    facts = json.loads(config.read_text(encoding="utf-8"))
    kept = {key: value for key, value in facts.items() if not key.endswith("_name_or_path")}
    config.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _publish(partial: Path, target: Path) -> None:
    """Gives a finished folder its name; a target that another process finished meanwhile is as good."""
    try:
        partial.replace(target)
    except OSError:
        if not is_model_folder(target):
            raise
