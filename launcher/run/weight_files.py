"""Whether a local model folder can be loaded, as far as file names, sizes and headers tell; no weight is read.

What only the libraries can tell (shapes, missing tensors, a tokenizer's ids) is the worker's to say.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from launcher.errors import DataError

INDEX: Final = "model.safetensors.index.json"
WEIGHTS: Final = "model.safetensors"
PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZERS: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
    "tokenizer_config.json",
)
"""Files of which a tokenizer has at least one."""
LARGEST_HEADER_BYTES: Final = 100_000_000
"""The safetensors library refuses more (safetensors 0.8, tensor.rs, `MAX_HEADER_SIZE`)."""
AGAIN: Final = "fetch the model again"


def check_model_folder(folder: Path) -> None:
    """Makes sure that a folder holds a model's weights, whole, and a tokenizer.

    Args:
        folder: A local model folder; its config.json was read before.

    Raises:
        DataError: Naming the file, what is wrong with it, and what to do.
    """
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise DataError(
            f"`{folder}` holds no tokenizer: none of {', '.join(TOKENIZERS)}",
            "save it there: `AutoTokenizer.from_pretrained(<base model>).save_pretrained(<folder>)`",
        )
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        tensor_names(folder / WEIGHTS)
    elif index.is_file():
        _check_shards(folder, index)
    else:
        raise _no_weights(folder)


def tensor_names(file: Path) -> frozenset[str]:
    """Names of the tensors of a safetensors file, of which header and length are checked.

    The format: 8 bytes, little endian, give the length of a JSON header that names each tensor's dtype, shape and place
    in the bytes after it; the places fill these bytes without a gap (https://github.com/huggingface/safetensors, 0.8).

    Raises:
        DataError: When the file is cut off, too long, or no safetensors file.
    """
    try:
        num_bytes = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if start.startswith(b"version "):
                raise DataError(
                    f"`{file}` is a pointer of git-lfs, not the weights themselves",
                    "run `git lfs pull` in the model folder",
                )
            if not 2 <= length <= min(num_bytes - 8, LARGEST_HEADER_BYTES):
                raise DataError(
                    f"`{file}` is no safetensors file, or cut off: of {num_bytes} bytes a header would take {length}",
                    AGAIN,
                )
            header: Any = json.loads(stream.read(length).decode())
        places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        ends = [int(end) for _, end in places.values()]
    except OSError as failure:
        raise DataError(f"`{file}` can't be read: {failure}", "check its permissions") from failure
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as failure:
        raise DataError(f"`{file}` has a damaged header: {failure}", AGAIN) from failure
    expected = 8 + length + max(ends, default=0)
    if num_bytes != expected:
        raise DataError(
            f"`{file}` has {num_bytes} bytes, and its header tells of {expected}"
            + (": it was cut off" if num_bytes < expected else ""),
            AGAIN,
        )
    return frozenset(places)


def _check_shards(folder: Path, index: Path) -> None:
    try:
        weight_map: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = _by_file(weight_map)
    except OSError as failure:
        raise DataError(f"`{index}` can't be read: {failure}", "check its permissions") from failure
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as failure:
        raise DataError(f"`{index}` is no index of safetensors files: {failure}", AGAIN) from failure
    if not shards:
        raise DataError(f"`{index}` names no files", AGAIN)
    missing = sorted(name for name in shards if not (folder / name).is_file())
    if missing:
        raise DataError(
            f"`{folder}` lacks {len(missing)} of the {len(shards)} files that {INDEX} names, such as `{missing[0]}`",
            AGAIN,
        )
    for name, wanted in sorted(shards.items()):
        absent = sorted(wanted - tensor_names(folder / name))
        if absent:
            raise DataError(
                f"`{folder / name}` lacks the tensor `{absent[0]}`, which {INDEX} places there", AGAIN
            )


def _by_file(weight_map: Mapping[str, str]) -> dict[str, set[str]]:
    shards: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"`{name}` is no file name")
        shards.setdefault(name, set()).add(tensor)
    return shards


def _no_weights(folder: Path) -> DataError:
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if (folder / "adapter_config.json").is_file():
        return DataError(
            f"`{folder}` holds an adapter, not a model: there is adapter_config.json, and no {WEIGHTS}",
            "`model.path=<the base model>`, or a merged model (`method.merge=true`)",
        )
    if pickles:
        return DataError(
            f"`{folder}` holds weights as pickle files only (`{pickles[0]}`); reading one may run what is in it",
            f"save the model as safetensors where you trust the file: `save_pretrained` writes {WEIGHTS}",
        )
    return DataError(f"`{folder}` holds no weights: neither {WEIGHTS} nor {INDEX}", AGAIN)
