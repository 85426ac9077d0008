"""The secrets of a process: those of its environment, the tokens that `hf auth login` has stored for it, and the
passwords of its `.netrc` (Weights & Biases keeps its key there).

Who prints for people, or keeps what others print, strikes these out (redaction.py).
"""

from __future__ import annotations

import netrc
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from launcher.redaction import SHORTEST, secrets_of

STORED_NAME: Final = "HF_TOKEN"
"""What a stored token is called where it is struck out: the variable that would hold it."""
NETRC_NAME: Final = "NETRC"
"""What a password of `.netrc` is called: the variable that names the file."""
LARGEST_BYTES: Final = 1 << 16
"""A longer file holds no tokens."""


def known_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """All secrets that a process may come to print: each with the name of its variable.

    Files that can't be read hold none: the process could not print them either.

    Args:
        environment: Of the process.
    """
    stored = {token: STORED_NAME for file in token_files(environment) for token in _tokens_in(file)}
    return {**_netrc_passwords(environment), **stored, **secrets_of(environment)}


def token_files(environment: Mapping[str, str]) -> tuple[Path, ...]:
    """Where huggingface_hub (0.34 to 2.4, constants.py) keeps the token in use, and beside it all others."""
    home = environment.get("HOME") or "~"
    cache = environment.get("XDG_CACHE_HOME") or f"{home}/.cache"
    folder = environment.get("HF_HOME") or f"{cache}/huggingface"
    token = Path(environment.get("HF_TOKEN_PATH") or f"{folder}/token")
    return token, token.with_name("stored_tokens")


def _netrc_passwords(environment: Mapping[str, str]) -> dict[str, str]:
    """Passwords of the file that curl, git and requests read; one that is malformed is read by none of them."""
    file = Path(environment.get("NETRC") or f"{environment.get('HOME') or '~'}/.netrc")
    with suppress(OSError, RuntimeError, UnicodeDecodeError, netrc.NetrcParseError):
        file = file.expanduser()
        if file.stat().st_size <= LARGEST_BYTES:
            passwords = (entry[2] for entry in netrc.netrc(file).hosts.values())
            return {word: NETRC_NAME for word in passwords if word and len(word) >= SHORTEST}
    return {}


def _tokens_in(file: Path) -> list[str]:
    """The token that a file consists of, or those of its lines `hf_token = ...`."""
    with suppress(OSError, RuntimeError, UnicodeDecodeError):
        file = file.expanduser()
        if file.stat().st_size > LARGEST_BYTES:
            return []
        lines = [line.rpartition("=")[2].strip() for line in file.read_text(encoding="utf-8").splitlines()]
        return [  # neither names of tokens nor the time at which one expires
            line
            for line in lines
            if len(line) >= SHORTEST and not line.startswith("[") and not line.isdigit()
        ]
    return []
