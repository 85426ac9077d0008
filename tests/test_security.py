"""Nothing that a model, a data set or a run folder holds is run; secrets stay where they are; runs are private.

Every attack is real: a pickle that writes a file when it is read, a model with code of its own, a worker that prints a
token. The canary must appear nowhere.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from packaging.requirements import Requirement

from launcher import cli
from launcher.cluster import Cluster, LaunchSpec, Node
from launcher.config import load_job
from launcher.documents import write_document
from launcher.errors import ConfigError, DataError
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import Engine, JobSpec, ModelSpec
from launcher.planning import trust_notes
from launcher.redaction import Redactor, redacted, secret_in, secrets_of
from launcher.run import ledger_file, node
from launcher.run.launch import launch_worker, prepare_run
from launcher.run.render import worker_environment
from launcher.run_paths import RunPaths
from launcher.run_status import NodeFailure
from launcher.stored_secrets import known_secrets
from scripts.audit import audit
from tests.test_launch import ORDER, PROGRAM
from tests.tiny_job import tiny_order, write_tiny_model

ROOT = Path(__file__).resolve().parents[1]
CANARY = "canary" + "0123456789abcdef"
SECRETS = {
    "HF_TOKEN": CANARY,
    "WANDB_API_KEY": CANARY + "-wandb",
    "AWS_SECRET_ACCESS_KEY": "aws-" + CANARY,
    "HTTPS_PROXY": f"http://me:{CANARY}-proxy@127.0.0.1:1",
}


# ---------------------------------------------------------------------------------------------- secrets


SECRET_NAMES = (
    "HF_TOKEN", "MYTOKEN", "GITHUB_TOKEN_2", "token1", "WANDB_API_KEY", "OPENAI_APIKEY", "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY", "PRIVATE_KEY", "SSH_PRIVATE_KEY", "DEPLOY_KEY", "client_secret", "DJANGO_SECRETS",
    "PGPASSWORD", "MYSQL_PWD", "DB_PASS", "PASS", "SMTP_PASSWD", "GPG_PASSPHRASE", "GITHUB_PAT", "AZURE_CREDENTIALS",
    "RABBITMQ_PASSWORD_HASH", "AWS_SESSION_TOKEN", "SIGNING_PRIVATE_KEY", "SENTRY_DSN", "DSN",
    "AZURE_STORAGE_CONNECTION_STRING", "DB_CONN_STR",
)  # fmt: skip
HARMLESS_NAMES = (
    "TOKENIZERS_PARALLELISM", "MAX_NEW_TOKENS", "HF_TOKEN_PATH", "PWD", "OLDPWD", "COMPASS", "BYPASS_CACHE",
    "PASSTHROUGH", "GIT_ASKPASS", "PGPASSFILE", "SSH_AUTH_SOCK", "KEYBOARD", "MONKEY", "PATH", "PYTHONPATH",
    "SECRETARY", "PATTERN", "DB_PASSWORD_FILE", "AWS_WEB_IDENTITY_TOKEN_FILE", "TOKEN_URL", "XAUTHORITY",
    "CUDA_HOME", "RDSN", "STRING", "CONNECTIONS", "DSNAME",
)  # fmt: skip


def test_secrets_are_known_by_the_names_of_their_variables() -> None:
    for name in (*SECRET_NAMES, *HARMLESS_NAMES):
        assert secrets_of({name: CANARY}) == ({CANARY: name} if name in SECRET_NAMES else {}), name
    harmless = {"API_TOKEN": "short", "HTTP_PROXY": "http://proxy.example:3128"}
    assert secrets_of(harmless) == {}
    assert set(secrets_of(harmless | SECRETS).values()) == set(SECRETS)


@pytest.mark.parametrize(
    ("value", "secret"),
    [
        ("https://ghx0123456789abcdefABCD@github.com/me/it.git", "ghx0123456789abcdefABCD"),
        ("https://0123456789abcdef0123456789abcdef@o1.ingest.example/2", "0123456789abcdef0123456789abcdef"),
        ("git+https://tok0123456789abcdefghi:x-oauth-basic@host/it", "tok0123456789abcdefghi"),
        ("AUTHORIZATION: basic dXNlcjpwYXNzd29yZA==", "dXNlcjpwYXNzd29yZA=="),
        ("x=1,Authorization=Bearer%20abcdefgh12345", "abcdefgh12345"),
        ("Server=tcp:db;User ID=me;Password=pass word;Pwd=horse-battery;Encrypt=yes", "horse-battery"),
        ("AccountName=me;AccountKey=c2VjcmV0a2V5c2VjcmV0==;EndpointSuffix=core", "c2VjcmV0a2V5c2VjcmV0=="),
    ],
)
def test_secrets_inside_of_values_are_known_by_what_is_around_them(value: str, secret: str) -> None:
    assert secrets_of({"ANY": value}).get(secret) == "ANY"
    assert secret not in redacted(f"failed: {value}", secrets_of({"ANY": value}))


@pytest.mark.parametrize(
    "value",
    [
        "someone@example.com",
        "me@host.example:/data/runs",
        "ssh://git@github.com/me/it.git",
        "ssh://deployment-account-2024@host/it",
        "https://someone@example.com/it",
        "https://a.long.name.of.somebody@example.com/it",
        "https://github.com/me/it0123456789abcdefghij",
        "https://huggingface.co/org/model-0123456789-abcdefghij@main",
        "Authorization: Basic",
        "authorization is basic here",
        "data/train@2024.jsonl",
    ],
)
def test_ordinary_addresses_are_no_secrets(value: str) -> None:
    assert secrets_of({"ANY": value}) == {} and secret_in(value) == ""


def test_passwords_of_netrc_are_secrets(tmp_path: Path) -> None:
    file = tmp_path / ".netrc"
    file.write_text(
        f"machine api.wandb.ai\n  login user\n  password {CANARY}\nmachine b login c password short\n"
    )
    file.chmod(0o600)
    assert known_secrets({"HOME": str(tmp_path)}) == {CANARY: "NETRC"}
    moved = file.rename(tmp_path / "elsewhere")
    assert known_secrets({"HOME": str(tmp_path)}) == {}
    assert known_secrets({"HOME": str(tmp_path), "NETRC": str(moved)}) == {CANARY: "NETRC"}
    moved.write_text("machine without an end password")
    assert known_secrets({"HOME": str(tmp_path), "NETRC": str(moved)}) == {}


def test_a_token_of_a_login_is_a_secret(tmp_path: Path) -> None:
    """Stored by huggingface_hub itself, in a process with a home of its own."""
    tokens = [f"hf_{letter * 34}" for letter in "AB"]
    program = (
        "import sys; from huggingface_hub import _login as login\n"
        "for name, token in zip('ab', sys.argv[1:]): login._save_token(token, name)\n"
        "login._set_active_token('b', add_to_git_credential=False)"
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    for number, places in enumerate(
        ({"HF_HOME": "hub"}, {"HOME": "home"}, {"XDG_CACHE_HOME": "xdg"}, {"HF_TOKEN_PATH": "mine/token"})
    ):
        environment = plain | {"HOME": str(tmp_path / f"{number}")}
        environment |= {name: str(tmp_path / f"{number}-{place}") for name, place in places.items()}
        assert known_secrets(environment).keys().isdisjoint(tokens)
        subprocess.run(
            [sys.executable, "-c", program, *tokens], env=environment, check=True, capture_output=True
        )
        assert dict.fromkeys(tokens, "HF_TOKEN").items() <= known_secrets(environment).items(), places
        assert known_secrets(environment | {"MY_TOKEN": CANARY})[CANARY] == "MY_TOKEN"


def test_nothing_that_is_printed_holds_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Not the errors of the launcher itself, nor what a run left, whoever wrote it there."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(CANARY + "-login")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    paths = RunPaths(tmp_path / "run")
    prepare_run(paths, ORDER, {})
    write_document(paths.failure(0), NodeFailure(6, f'401 for {CANARY}-login and {CANARY}"quoted'))
    for arguments, code in (
        ([f"recipe={CANARY}"], 2),
        (["action=status", f"run_dir={tmp_path / CANARY}"], 2),
        (["action=status", f"run_dir={paths.root}"], 0),
        (["action=status", f"run_dir={paths.root}", "output=json"], 0),
    ):
        assert cli.run(arguments) == code
        printed = "".join(capsys.readouterr())
        assert "[HF_TOKEN]" in printed and CANARY not in printed, arguments
    assert json.loads(printed)["message"] == '401 for [HF_TOKEN] and [HF_TOKEN]"quoted'


def test_a_text_names_the_variable_in_place_of_its_value() -> None:
    text = redacted(f"401: Bearer {CANARY}-wandb, {CANARY}.", secrets_of(SECRETS))
    assert text == "401: Bearer [WANDB_API_KEY], [HF_TOKEN]."


def test_a_stream_is_redacted_wherever_its_pieces_end() -> None:
    secrets = {"abcabcabd": "ONE", "bcabca-xyz": "TWO"}
    text = b"abcabc abcabcabd|abcabcabcabd bcabca-xy bcabca-xyz abcabcab"
    whole = Redactor(secrets)
    expected = whole.feed(text) + whole.rest()
    assert expected == b"abcabc [ONE]|abc[ONE] bcabca-xy [TWO] abcabcab"
    for size in range(1, len(text)):
        stream = Redactor(secrets)
        pieces = [stream.feed(text[at : at + size]) for at in range(0, len(text), size)]
        assert b"".join(pieces) + stream.rest() == expected, size


def test_a_stream_without_secrets_waits_for_nothing() -> None:
    assert Redactor({}).feed(b"a progress bar 5%\r") == b"a progress bar 5%\r"
    assert Redactor({CANARY: "HF_TOKEN"}).feed(b"a progress bar 5%\r") == b"a progress bar 5%\r"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (f"export HF_TOKEN={CANARY}", "a value for HF_TOKEN"),
        (f"my_password: '{CANARY}'", "a value for my_password"),
        ("login hf_" + "A1b2" * 8, "an access token"),
        (f"pip install -i https://me:{CANARY}@index.example/simple x", "a password in an address"),
    ],
)
def test_a_job_that_holds_a_secret_is_refused_without_repeating_it(line: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(["action=plan", f'launch.setup=["{line}"]'])
    assert f"`launch.setup.0` holds {what}" in caught.value.message
    assert CANARY not in str(caught.value) and "A1b2A1b2" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    ["export HF_TOKEN=$MINE", 'export HF_TOKEN="$MINE"', "module load cuda", "tokenizer=llama-tokenizer"],
)
def test_a_secret_that_a_variable_holds_is_none(line: str) -> None:
    assert secret_in(line) == ""


def everything_below(folder: Path) -> Mapping[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("cluster", list(Cluster))
def test_no_rendered_file_holds_a_secret_of_the_environment(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    launch = LaunchSpec(cluster=cluster, image="image", volume="claim", volume_path=str(tmp_path))
    hardware = HardwareSpec(name="a100_80g", kind=DeviceKind.CUDA)
    order = replace(ORDER, job=replace(ORDER.job, launch=launch, hardware=hardware))
    prepare_run(RunPaths(tmp_path / "run"), order, {})
    files = everything_below(tmp_path / "run")
    assert len(files) >= 4
    assert [name for name, content in files.items() if CANARY.encode() in content] == []


def test_what_a_worker_prints_of_its_secrets_is_struck_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    program = PROGRAM + textwrap.dedent("""
        print("token", os.environ["HF_TOKEN"][:9], end="", flush=True)
        time.sleep(0.3)
        print(os.environ["HF_TOKEN"][9:], "is out")
        report("key " + os.environ["WANDB_API_KEY"])
        sys.stderr.write(os.environ["HTTPS_PROXY"])
        sys.stderr.flush()
        kept = run / "logs" / "none_x1" / "attempt_0" / "0"   # as torchrun keeps a rank's output
        kept.mkdir(parents=True)
        (kept / "stdout.log").write_text("before " + os.environ["WANDB_API_KEY"] + " after\\n" + os.environ["HF_TOKEN"])
        end()
    """)
    paths = RunPaths(tmp_path / "run")
    prepare_run(paths, ORDER, {})
    command = (sys.executable, "-c", program, str(paths.root))
    monkeypatch.setattr(node, "worker_command", lambda paths, plan, node: command)
    shown: list[str] = []
    launch_worker(paths, ORDER, shown.append)
    assert "key [WANDB_API_KEY]" in shown
    log = paths.log.read_text()
    assert "token canary01" in log or "token [HF_TOKEN] is out" in log
    assert "http://me:[HTTPS_PROXY]@127.0.0.1:1" in log
    kept = paths.logs.joinpath("none_x1", "attempt_0", "0", "stdout.log").read_text()
    assert (
        kept == f"before {'[WANDB_API_KEY]':*<{len(CANARY + '-wandb')}} after\n{'[HF_TOKEN]':*<{len(CANARY)}}"
    )
    assert [name for name, content in everything_below(tmp_path).items() if CANARY.encode() in content] == []


# -------------------------------------------------------------------------------- code in what is read


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.file),)


def test_no_checkpoint_runs_code_whatever_the_library_asks_for(tmp_path: Path) -> None:
    """DeepSpeed 0.19 reads its checkpoints with `weights_only=False`; the workers' environment forbids it."""
    import torch

    marker = tmp_path / "ran"
    torch.save({"state": Payload(marker)}, tmp_path / "state.pt")
    read = "import sys, torch; torch.load(sys.argv[1], weights_only=False)"
    hardware = HardwareSpec(name="cpu", kind=DeviceKind.CPU)
    for additions, runs in ((worker_environment(hardware, os.environ), False), ({}, True)):
        done = subprocess.run(
            [sys.executable, "-c", read, str(tmp_path / "state.pt")],
            env={**os.environ, **additions},
            capture_output=True,
            text=True,
            check=False,
        )
        assert marker.exists() is runs, done.stderr  # without it the attack works: the test can fail
        assert ("Weights only load failed" in done.stderr) is not runs


def test_the_index_of_a_sharded_checkpoint_holds_data_only(tmp_path: Path) -> None:
    """Written and read by torch's own functions; then with a payload in the place of the index."""
    import pickle

    import torch

    from launcher.worker.trusted import load_index, trusted_checkpoints

    checkpoint: Any = importlib.import_module("torch.distributed.checkpoint")
    plan = tiny_order(tmp_path, Engine.FSDP2, 3).plan
    state: dict[str, Any] = {
        "weight": torch.arange(6.0).reshape(2, 3),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "step": 3,
    }
    with trusted_checkpoints(plan):
        checkpoint.save(state, checkpoint_id=str(tmp_path / "sharded"), no_dist=True)
    wanted: dict[str, Any] = {
        "weight": torch.zeros(2, 3),
        "half": torch.zeros(2, dtype=torch.bfloat16),
        "step": 0,
    }
    with trusted_checkpoints(plan):
        checkpoint.load(wanted, checkpoint_id=str(tmp_path / "sharded"), no_dist=True)
    assert torch.equal(wanted["weight"], state["weight"]) and wanted["step"] == 3
    of_3_13 = b"cpathlib._local\nPosixPath\n(S'a'\nS'b'\ntR."  # as Python 3.13 writes it, in protocol 0
    assert load_index(BytesIO(of_3_13)) == Path("a/b")
    marker = tmp_path / "ran"
    (tmp_path / "sharded" / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    with (
        trusted_checkpoints(plan),
        pytest.raises(checkpoint.CheckpointException, match=r"names posix\.mkdir"),
    ):
        checkpoint.load(wanted, checkpoint_id=str(tmp_path / "sharded"), no_dist=True)
    assert not marker.exists()


@pytest.mark.parametrize("engine", [Engine.DEEPSPEED, Engine.FSDP2])
def test_enumerations_are_written_without_code_by_any_python(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Python 3.11.0 to 3.11.3 would write them (enum.py, `Enum.__reduce_ex__`)."""
    import pickle

    from launcher.worker.trusted import trusted_checkpoints

    names = {
        Engine.DEEPSPEED: ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
        Engine.FSDP2: ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    }
    module, name = names[engine]
    kind = getattr(importlib.import_module(module), name)
    member = next(iter(kind))
    monkeypatch.setattr(kind, "__reduce_ex__", lambda self, proto: (getattr, (type(self), self.name)))
    assert b"getattr" in pickle.dumps(member)
    with trusted_checkpoints(tiny_order(tmp_path, engine, 3).plan):
        written = pickle.dumps(member)
    assert b"getattr" not in written and pickle.loads(written) is member


def test_a_user_cannot_turn_it_off_by_accident() -> None:
    hardware = HardwareSpec(name="cpu", kind=DeviceKind.CPU)
    inherited = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "0"}
    assert worker_environment(hardware, inherited)["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return folder


def test_a_models_own_code_does_not_run_unless_the_job_says_so(tiny: Path, tmp_path: Path) -> None:
    from launcher.worker.ingredients import prepare

    folder, marker = shutil.copytree(tiny, tmp_path / "model"), tmp_path / "ran"
    (folder / "own.py").write_text(
        f"import os\nos.makedirs({str(marker)!r}, exist_ok=True)\n"
        "from transformers import LlamaConfig\nclass Own(LlamaConfig):\n    model_type = 'own'\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    order = tiny_order(folder, Engine.NONE, num_devices=1)
    with pytest.raises(DataError, match="can't be read"):
        prepare(order, RunPaths(tmp_path / "run"))
    assert not marker.exists()
    trusting = replace(order.job, model=replace(order.job.model, trust_remote_code=True))
    prepare(replace(order, job=trusting), RunPaths(tmp_path / "run"))
    assert marker.exists()


def test_a_plan_names_the_code_that_it_lets_run(tmp_path: Path) -> None:
    assert trust_notes(JobSpec(model=ModelSpec(path="org/model"))) == ()
    (note,) = trust_notes(JobSpec(model=ModelSpec(path="org/model", trust_remote_code=True)))
    assert "`org/model`" in note and "model.revision pins one" in note
    (note,) = trust_notes(JobSpec(model=ModelSpec(path="org/model", trust_remote_code=True, revision="1a")))
    assert "revision 1a" in note
    (note,) = trust_notes(JobSpec(model=ModelSpec(path=str(tmp_path), trust_remote_code=True)))
    assert "there now" in note and "revision" not in note


FORBIDDEN = {
    "pickle.load", "pickle.loads", "torch.load", "joblib.load", "dill.load", "os.system", "os.popen",
    "yaml.load", "yaml.unsafe_load", "eval", "exec", "shelve.open", "subprocess.getoutput",
}  # fmt: skip


def test_nothing_of_ours_unpickles_evaluates_or_asks_a_shell() -> None:
    found = []
    for file in sorted((ROOT / "launcher").rglob("*.py")):
        for item in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(item, ast.Call):
                continue
            shell = any(key.arg == "shell" and getattr(key.value, "value", True) for key in item.keywords)
            pickles = any(
                key.arg == "allow_pickle" and getattr(key.value, "value", True) for key in item.keywords
            )
            if ast.unparse(item.func) in FORBIDDEN or shell or pickles:
                found.append(f"{file.name}:{item.lineno} {ast.unparse(item.func)}")
    assert found == []


SAYING = """
import logging, os, signal, sys, traceback
from launcher.redaction import secrets_of
from launcher.worker.output import redacted_output

with redacted_output(secrets_of(os.environ)):
    token = os.environ["HF_TOKEN"]
    print("begin", token)
    logging.warning("bad %s", token)
    try:
        raise ValueError(token)
    except ValueError:
        traceback.print_exc()
    sys.stdout.write(token[:9])
    sys.stdout.write(token[9:] + " end " + token[:4])
    if len(sys.argv) > 1:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("killed", [False, True])
def test_a_rank_writes_no_secret_that_a_killed_launcher_would_leave(killed: bool, tmp_path: Path) -> None:
    with (tmp_path / "stdout.log").open("wb") as out, (tmp_path / "stderr.log").open("wb") as err:
        ended = subprocess.run(
            [sys.executable, "-c", SAYING, *(["kill"] if killed else [])],
            env={**os.environ, "HF_TOKEN": CANARY},
            cwd=ROOT,
            stdout=out,
            stderr=err,
            check=False,
        )
    assert ended.returncode == (-9 if killed else 0)
    said, warned = (tmp_path / "stdout.log").read_text(), (tmp_path / "stderr.log").read_text()
    assert said == "begin [HF_TOKEN]\n[HF_TOKEN] end " + ("" if killed else CANARY[:4])
    assert "bad [HF_TOKEN]" in warned and "ValueError: [HF_TOKEN]" in warned and CANARY not in warned


# ------------------------------------------------------------------------------------------------ access


def test_a_run_directory_is_its_users_alone(tmp_path: Path) -> None:
    previous = os.umask(0o002)
    try:
        prepare_run(RunPaths(tmp_path / "a" / "runs" / "run"), ORDER, {})
        ledger_file.write_rows(tmp_path / "a" / "runs", [])
        with ledger_file._connected(tmp_path / "a" / "runs") as connection:
            connection.execute("insert into runs values ('run', 1, '{}')")
            files = {file.name: file for file in (tmp_path / "a" / "runs").glob("ledger*")}
            modes = {name: stat.S_IMODE(file.stat().st_mode) for name, file in files.items()}
    finally:
        os.umask(previous)
    for folder in ("a", "a/runs", "a/runs/run"):
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700, folder
    assert modes == dict.fromkeys(("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm"), 0o600)


@pytest.mark.skipif(os.geteuid() != 0, reason="another user can be played by root alone")
def test_a_ledger_of_another_user_is_left_alone() -> None:
    """It can't be opened, as a damaged one; but it must not be renamed and made anew."""
    program = (
        "import os, pathlib, sys; from launcher.run.ledger import find_records; os.setuid(65534);"
        "print(*find_records(pathlib.Path(sys.argv[1])).notes)"
    )
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        Path(name).chmod(0o777)
        ledger_file.write_rows(Path(name), [ledger_file.Row("/gone", 1, "{}")])
        before = (Path(name) / "ledger.sqlite").read_bytes()
        said = subprocess.run(
            [sys.executable, "-c", program, name], capture_output=True, text=True, check=False
        )
        assert "is left alone: this user may not read it" in said.stdout, said.stderr
        assert [file.name for file in Path(name).iterdir()] == ["ledger.sqlite"]
        assert (Path(name) / "ledger.sqlite").read_bytes() == before


def test_a_folder_that_is_there_keeps_its_mode_and_can_be_shared(tmp_path: Path) -> None:
    shared = tmp_path / "run"
    shared.mkdir()
    shared.chmod(0o2750)
    prepare_run(RunPaths(shared), ORDER, {})
    assert stat.S_IMODE(shared.stat().st_mode) == 0o2750


def test_processes_of_one_machine_meet_on_the_loopback() -> None:
    found = node._network_environment(Node(), {})
    assert found.keys() == {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}
    for name in found.values():
        assert "127.0.0.1" in {address.address for address in psutil.net_if_addrs()[name]}
    assert "GLOO_SOCKET_IFNAME" not in node._network_environment(Node(), {"GLOO_SOCKET_IFNAME": "eth7"})


# ------------------------------------------------------------------------------------------ dependencies


def test_every_dependency_has_a_range_that_holds_what_is_installed() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, needed = pyproject["project"], pyproject["build-system"]["requires"]
    extras = [item for some in project["optional-dependencies"].values() for item in some]
    for text in (*project["dependencies"], *extras, *needed):
        requirement = Requirement(text)
        operators = {item.operator for item in requirement.specifier}
        assert operators == {">=", "<"}, text
    for text in project["dependencies"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(version(requirement.name), prereleases=True), text
    (loader,) = (item for item in map(Requirement, project["dependencies"]) if item.name == "datasets")
    assert not loader.specifier.contains("3.6.0"), "before 4 a data set may bring a script that is run"


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        (
            "import sys; sys.exit('no connection to the advisories')",
            0,
            "skipped: no connection to the advisories",
        ),
        ("import time; time.sleep(60)", 0, "skipped: "),
        (
            'print(\'{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}\')',
            0,
            "1 packages, no holes",
        ),
        (
            'print(\'{"dependencies": [{"name": "a", "version": "1", "vulns": '
            '[{"id": "CVE-1", "fix_versions": ["2"]}]}]}\')',
            1,
            "a 1: CVE-1, mended in 2",
        ),
    ],
    ids=["unreachable", "silent", "clean", "vulnerable"],
)
def test_an_audit_finds_or_says_why_it_was_skipped(program: str, code: int, said: str) -> None:
    found, text = audit([sys.executable, "-c", program], 5.0)
    assert found == code and said in text
