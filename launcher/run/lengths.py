"""Lengths of a job's examples: counted in a child process, kept by what was counted and with what."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from launcher.data_lengths import DataLengths, LengthOrder
from launcher.documents import read_document, write_document
from launcher.errors import ConfigError, DataError, LauncherError, LaunchError
from launcher.run.fetch import parse_packaged_path
from launcher.run.render import import_path
from launcher.run_record import WORKER_MARK

WORKER = "launcher.worker.lengths"
BUILTIN_PREFIX = "builtin:"
LIBRARIES = ("transformers", "tokenizers", "trl", "datasets")
SOURCES = (
    "trainers.py",
    "workload.py",
    "classification.py",
    "worker/data.py",
    "worker/layouts.py",
    "worker/lengths.py",
    "worker/python_docs.py",
    "worker/source_rows.py",
    "worker/tasks.py",
)
"""Our own files that read, lay out and tokenize examples."""
TOKENIZER_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
"""Files of a model folder that a tokenizer may be read from, its chat template among them."""
KINDS: Mapping[int, type[LauncherError]] = {kind.exit_code: kind for kind in (ConfigError, DataError)}


def count_lengths(order: LengthOrder, folder: Path, *, offline: bool = False) -> DataLengths:
    """Lengths of a job's training examples: kept ones, or counted now, which takes some seconds.

    Args:
        order: What to count with which tokenizer.
        folder: Of kept lengths.
        offline: Whether the hub must not be asked.

    Raises:
        ConfigError: When the job names data that don't exist.
        DataError: When data or tokenizer can't be read.
        LaunchError: When the child process fails otherwise.
    """
    kept = _kept_file(order, folder)
    if kept is not None:
        try:
            return read_document(kept, DataLengths)
        except LaunchError:  # not there, or of another version
            pass
    counted = _count(order, {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if offline else {})
    kept = kept or _kept_file(order, folder)  # a tokenizer of a hub is known once it was read
    if kept is not None:
        write_document(kept, counted)
    return counted


def is_at_hand(order: LengthOrder) -> bool:
    """Whether data and tokenizer lie on this machine, so that counting asks nobody and converts nothing."""
    path = order.job.data.path
    has_data = path.startswith(BUILTIN_PREFIX) or (bool(path) and Path(path).expanduser().exists())
    if not has_data:
        return False
    if order.converted:
        return Path(order.converted).is_dir()
    return _tokenizer_folder(order) is not None


def _count(order: LengthOrder, environment: Mapping[str, str]) -> DataLengths:
    with tempfile.TemporaryDirectory(prefix="launcher-lengths-") as name:
        asked, answer = Path(name) / "order.json", Path(name) / "answer.json"
        write_document(asked, order)
        command = [sys.executable, "-m", WORKER, str(asked), str(answer)]
        surroundings = {**os.environ, **import_path(os.environ), **environment}
        child = subprocess.run(
            command, env=surroundings, capture_output=True, text=True, errors="replace", check=False
        )
        if child.returncode == 0:
            return read_document(answer, DataLengths)
    lines = child.stderr.split("\n")  # splitlines would split at the mark
    said = "\n".join(line.removeprefix(WORKER_MARK) for line in lines if line.startswith(WORKER_MARK))
    if said:
        message, _, hint = said.partition("\n\nhint: ")
        raise KINDS.get(child.returncode, LaunchError)(message, hint)
    last = next((line for line in reversed(lines) if line.strip()), "")
    raise LaunchError(
        f"counting the tokens of {order.job.data.path} ended with exit code {child.returncode}: {last}",
        "data.max_length=<tokens> plans without reading the data",
    )


def _kept_file(order: LengthOrder, folder: Path) -> Path | None:
    """Where lengths are kept; None where nothing tells whether data and tokenizer are still the same."""
    job = order.job
    data, tokenizer = _data_digest(job.data.path), _tokenizer_digest(order)
    if data is None or tokenizer is None:
        return None
    facts = {
        "data": [data, job.data.format.value, job.data.num_examples],
        "held out": [job.evaluation.enabled, job.evaluation.path, job.evaluation.num_examples],
        "tokenizer": tokenizer,
        "task": job.model.task.value,
        "versions": [*(version(name) for name in LIBRARIES), platform.python_version()],
        "source": _digest_of(Path(__file__).resolve().parent.parent / name for name in SOURCES),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return folder / f"{digest}.json"


def _data_digest(path: str) -> str | None:
    """What stands for the data; None for those of a hub, which may change any time."""
    if path.startswith(BUILTIN_PREFIX):
        return f"{path} {platform.python_version()} {platform.platform()}"
    local = Path(path).expanduser()
    if local.is_file():
        return _digest_of([local])
    if local.is_dir():
        return _digest_of(sorted(file for file in local.iterdir() if file.suffix in (".json", ".jsonl")))
    return None


def _tokenizer_digest(order: LengthOrder) -> str | None:
    if parse_packaged_path(order.job.model.path) is not None:
        return order.job.model.path  # the package's content is known by its version
    folder = _tokenizer_folder(order)
    if folder is None:
        return None
    files = sorted(file for file in folder.iterdir() if file.suffix in TOKENIZER_SUFFIXES)
    return _digest_of(file for file in files if not file.name.endswith(".index.json"))


def _tokenizer_folder(order: LengthOrder) -> Path | None:
    """The folder that the tokenizer is read from, if it lies on this machine."""
    folder = Path(order.weights).expanduser()
    if folder.is_dir():
        return folder
    found = try_to_load_from_cache(order.weights, "tokenizer_config.json", revision=order.job.model.revision)
    return Path(found).parent if isinstance(found, str) else None


def _digest_of(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
