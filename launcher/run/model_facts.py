"""Finds out what a model is before its weights are needed: from the catalogue, a folder, or the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.architecture import DEQUANTIZED_AS_READ, architecture_mistakes, stored_quantization
from launcher.errors import ConfigError, DataError
from launcher.job import ModelSpec, StoredDtype
from launcher.run.fetch import parse_packaged_path

Catalogue = Callable[[str], Mapping[str, Any] | None]


def resolve_model(model: ModelSpec, catalogue: Catalogue) -> ModelSpec:
    """Fills in path and architecture.

    A local folder's own config.json counts. A hub id that is built in needs no network; any other hub id's
    config.json is downloaded (or found in the hub cache).

    Raises:
        ConfigError: When there is neither a path nor a built-in model.
        DataError: When config.json can't be had or read.
    """
    model = replace(model, code_digest="")  # nobody but this function says that there is code to run
    path = model.path or model.id
    if not path:
        raise ConfigError("`model.path` is empty", "give a hub id, a local folder, or choose `model=<name>`")
    try:
        folder = Path(path).expanduser()
        is_folder = folder.is_dir()
    except (OSError, RuntimeError) as failure:  # a name too long, `~name` of nobody
        raise DataError(
            f"`model.path={path}` can't be looked for: {failure}", "give a folder or a hub id"
        ) from failure
    if is_folder:
        described = _described_by(_read_config(folder / "config.json"), _own_facts(model, path))
        return replace(described, code_digest=_code_digest(described, folder))
    if path == model.id or parse_packaged_path(path) is not None:
        return replace(model, path=path)
    entry = catalogue(path)
    if entry is not None:
        return replace(_own_facts(model, path), id=path, architecture=dict(entry["architecture"]))
    file = _hub_config(path, model.revision)
    described = _described_by(_read_config(file), replace(_own_facts(model, path), id=path))
    # the hub's cache keeps each commit in a folder of its name
    return replace(described, code_digest=file.parent.name if _runs_own_code(described) else "")


def _runs_own_code(model: ModelSpec) -> bool:
    return model.trust_remote_code and bool(model.architecture.get("auto_map"))


def _code_digest(model: ModelSpec, folder: Path) -> str:
    """Digest of the Python files beside a config.json that names code of its own; empty when none may run."""
    if not _runs_own_code(model):
        return ""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("**/*.py")):
        try:
            digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
        except OSError as failure:
            raise DataError(
                f"`{file}` can't be read: {failure}",
                "it is code of the model; see that this user may read it",
            ) from failure
    return digest.hexdigest()


def _described_by(config: dict[str, Any], model: ModelSpec) -> ModelSpec:
    """The model that a config.json describes; it also says in which dtype the weights were saved."""
    _require_plain_weights(config, model.path)
    names = {"bfloat16": StoredDtype.BF16, "float16": StoredDtype.FP16, "float32": StoredDtype.FP32}
    stored = names.get(str(config.get("dtype") or config.get("torch_dtype")), StoredDtype.BF16)
    return replace(model, architecture=config, stored_dtype=stored)


def _require_plain_weights(config: Mapping[str, Any], path: str) -> None:
    """Weights that are stored quantised would be planned as what they were before; mxfp4 is undone as it is read."""
    method = stored_quantization(config)
    if method not in ("", DEQUANTIZED_AS_READ):
        raise ConfigError(
            f"`model.path={path}` holds weights that are quantised already: config.json has a "
            f"quantization_config with quant_method={method}",
            "name the model that it was made of; `method=qlora` quantises that one while it is read",
        )


def _own_facts(model: ModelSpec, path: str) -> ModelSpec:
    """The spec without what the chosen catalogue entry said of another model."""
    return replace(model, path=path, id="", num_parameters=None, num_parameters_source="")


def _read_config(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        config: Any = json.loads(text)
    except OSError as failure:
        raise DataError(
            f"`{file}` can't be read: {failure}", "`model.path` must hold a config.json, or be a hub id"
        ) from failure
    except ValueError as failure:
        raise DataError(
            f"`{file}` is not JSON: {failure}", "correct the file at that place, or fetch the model again"
        ) from failure
    except RecursionError as failure:
        raise DataError(f"`{file}` is nested too deeply to be read", "fetch the model again") from failure
    if not isinstance(config, dict) or "model_type" not in config:
        raise DataError(f"`{file}` has no `model_type`", "is it the config.json of a transformers model?")
    if mistakes := architecture_mistakes(config):
        lines = text.splitlines()
        said = [f"`{file}`{_line_of(key, lines)}: `{key}` {what}" for key, what in mistakes]
        raise DataError("\n".join(said), "correct the file, or fetch the model again")
    return config


def _line_of(key: str, lines: Sequence[str]) -> str:
    """Where a key stands in a JSON text, in words; empty where it is not on exactly one line."""
    name = json.dumps(key.rpartition(".")[2])
    found = [number for number, line in enumerate(lines, 1) if name in line]
    return f", line {found[0]}" if len(found) == 1 else ""


def _hub_config(hub_id: str, revision: str | None) -> Path:
    # what needs no hub, wrong configurations above all, does not wait for its library
    from huggingface_hub import hf_hub_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(hf_hub_download(hub_id, "config.json", revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as failure:
        raise DataError(
            f"config.json of `{hub_id}` can't be had: {str(failure).partition(chr(10))[0]}",
            "check `model.path` (a folder must exist; a hub id needs the network), or choose `model=<name>`",
        ) from failure
