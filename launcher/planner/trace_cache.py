"""Traces on disk: a trace is made once per job structure, library versions and tracer source."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from launcher.documents import write_text
from launcher.domain import Domain, Exponents
from launcher.memory import Category, Phase
from launcher.planner.skyline import PhaseSkyline, Skyline
from launcher.planner.stream import Stream
from launcher.planner.swapping import Swapping
from launcher.planner.tracer import Subject, SubjectFacts
from launcher.planner.work import decode_table, encode_table

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "datasets",
    "numpy",
    "liger_kernel",
    "galore_torch",
    "apollo_torch",
)
TRACED = (
    "architecture.py",
    "callbacks.py",
    "classification.py",
    "cluster.py",
    "data_lengths.py",
    "documents.py",
    "domain.py",
    "engine_config.py",
    "engine_limits.py",
    "engines.py",
    "errors.py",
    "explanation.py",
    "hardware.py",
    "job.py",
    "leak.py",
    "libraries.py",
    "loading.py",
    "memory.py",
    "merge.py",
    "model.py",
    "nvme.py",
    "optimisation.py",
    "optimizers.py",
    "plan.py",
    "rates.py",
    "regions.py",
    "step_time.py",
    "trainers.py",
    "units.py",
    "vision.py",
    "whatif.py",
    "workload.py",
)
"""Files outside of the planner that it imports, directly or through each other."""
STREAM_ARRAYS = ("sizes_bytes", "categories", "modules", "operations", "events", "phases", "cuda_streams")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a trace runs through."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return versions


def source_digest(package: Path) -> str:
    """Digest of the planner's own source and of all of ours that it imports: another tracer, another trace."""
    digest = hashlib.sha256()
    files = [*(package / name for name in TRACED), *sorted((package / "planner").glob("*.py"))]
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


class TraceCache:
    """A folder of traces; without a folder, nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._environment = {
            "versions": library_versions(),
            "source": source_digest(Path(__file__).resolve().parent.parent),
        }

    def key(self, subject: Subject, what: Mapping[str, Any]) -> str:
        """The name of an entry: a digest of everything the trace depends on."""
        facts = {
            "subject": asdict(subject),
            "what": what,
            **self._environment,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def facts(self, key: str) -> SubjectFacts | None:
        """A subject's facts, if they are kept."""
        payload = self._read(key)
        if payload is None:
            return None
        try:
            return TypeAdapter(SubjectFacts).validate_python(payload)
        except ValidationError:
            return None

    def keep_facts(self, key: str, facts: SubjectFacts) -> None:
        """Keeps a subject's facts."""
        self._write(key, TypeAdapter(SubjectFacts).dump_python(facts, mode="json"))

    def skyline(self, key: str) -> Skyline | None:
        """A skyline, if it is kept."""
        payload = self._read(key)
        if payload is None:
            return None
        try:
            return _decode(payload)
        except (KeyError, TypeError, ValueError):
            return None

    def keep_skyline(self, key: str, skyline: Skyline) -> None:
        """Keeps a skyline."""
        self._write(key, _encode(skyline))

    def streams(self, key: str) -> dict[int, Stream] | None:
        """Streams by the number of traced layers, if they are kept."""
        payload = self._read(key)
        if payload is None:
            return None
        try:
            return {int(depth): _decode_stream(item) for depth, item in payload.items()}
        except (AttributeError, KeyError, TypeError, ValueError, zipfile.BadZipFile):
            return None

    def keep_streams(self, key: str, streams: Mapping[int, Stream]) -> None:
        """Keeps streams, by the number of traced layers."""
        self._write(key, {str(depth): _encode_stream(stream) for depth, stream in streams.items()})

    def _path(self, key: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{key}.json"

    def _read(self, key: str) -> Any:
        """The payload of an entry; None when there is none, or when it is not what was written."""
        path = self._path(key)
        if path is None:
            return None
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            payload = entry["payload"]
            return payload if entry["digest"] == _digest(payload) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write(self, key: str, payload: Any) -> None:
        path = self._path(key)
        if path is not None:
            text = json.dumps({"digest": _digest(payload), "payload": payload})
            write_text(path, text, is_synced=False)  # what a power loss leaves does not match its digest


def _digest(payload: Any) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()


def _encode(skyline: Skyline) -> dict[str, Any]:
    return {
        "domain": TypeAdapter(Domain).dump_python(skyline.domain),
        "exponents": [list(pair) for pair in skyline.exponents],
        "phases": [{"phase": item.phase.value, "rows": item.rows.tolist()} for item in skyline.phases],
        "resident": {name.value: _encode_size(size) for name, size in skyline.resident.items()},
        "batch_inputs": _encode_size(skyline.batch_inputs),
        "traced_accumulation": skyline.traced_accumulation,
        "host": None if skyline.host is None else _encode(skyline.host),
        "disk_bytes": dict(skyline.disk_bytes),
        "work": encode_table(skyline.work),
        "pinned": list(skyline.pinned),
        "swapping": None if skyline.swapping is None else asdict(skyline.swapping),
    }


def _decode(payload: Mapping[str, Any]) -> Skyline:
    return Skyline(
        domain=TypeAdapter(Domain).validate_python(payload["domain"]),
        exponents=tuple((int(i), int(j), int(step)) for i, j, step in payload["exponents"]),
        phases=tuple(
            PhaseSkyline(Phase(item["phase"]), np.array(item["rows"], dtype=np.float64))
            for item in payload["phases"]
        ),
        resident={Category(name): _decode_size(size) for name, size in payload["resident"].items()},
        batch_inputs=_decode_size(payload["batch_inputs"]),
        traced_accumulation=int(payload["traced_accumulation"]),
        host=None if payload["host"] is None else _decode(payload["host"]),
        disk_bytes={str(name): int(size) for name, size in payload["disk_bytes"].items()},
        work=decode_table(payload["work"]),
        pinned=tuple(int(size) for size in payload["pinned"]),
        swapping=TypeAdapter(Swapping | None).validate_python(payload["swapping"]),
    )


def _encode_stream(stream: Stream) -> dict[str, Any]:
    packed = io.BytesIO()
    np.savez_compressed(packed, **{name: getattr(stream, name) for name in STREAM_ARRAYS})
    return {
        "module_names": list(stream.module_names),
        "operation_names": list(stream.operation_names),
        "npz": base64.b64encode(packed.getvalue()).decode(),
    }


def _decode_stream(payload: Mapping[str, Any]) -> Stream:
    with np.load(io.BytesIO(base64.b64decode(payload["npz"])), allow_pickle=False) as arrays:
        return Stream(
            module_names=tuple(payload["module_names"]),
            operation_names=tuple(payload["operation_names"]),
            **{name: arrays[name] for name in STREAM_ARRAYS},
        )


def _encode_size(size: Mapping[Exponents, int]) -> list[list[int]]:
    return [[*exponents, coefficient] for exponents, coefficient in sorted(size.items())]


def _decode_size(size: list[list[int]]) -> dict[Exponents, int]:
    return {(i, j, step): coefficient for i, j, step, coefficient in size}
