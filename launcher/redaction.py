"""Secrets: which words of an environment are some, and texts without them. Nothing here reads the environment itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

SECRET_NAME: Final = re.compile(
    r"PASSWORD|PASSWD|PASSPHRASE"
    r"|(?:TOKEN|SECRETS?|CREDENTIALS?|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)(?:_|\d*$)"
    r"|(?:^|_)(?:PASS|PAT)(?:_|$)"
    r"|_(?:KEYS?|PW|PWD)$"
    r"|(?:^|_)(?:DSN|CONN(?:ECTION)?_?STR(?:ING)?)$",
    re.IGNORECASE,
)
"""Names of variables that hold secrets: HF_TOKEN, MYTOKEN, AWS_SECRET_ACCESS_KEY, PGPASSWORD, DB_PASS, SENTRY_DSN. What
may be a part of harmless words (PWD, COMPASS, TOKENIZERS) counts at their ends or beginnings only."""
PLACE_NAME: Final = re.compile(r"_?(PATH|FILE|DIR|HOME|URL|URI|SOCK)$", re.IGNORECASE)
"""Names of variables that say where a secret is."""
URL_PASSWORD: Final = re.compile(r"://[^/\s:@]*:([^/\s@]+)@")
"""A password in an address, as in those of proxies and package indexes."""
URL_USER: Final = re.compile(
    r"\bhttps?://((?=[^/\s:@]*\d)(?=[^/\s:@]*[A-Za-z])[\w.~%+-]{20,})(?::[^/\s@]*)?@"
)
"""A token in the place of a user's name, as code hosts and package indexes take it: `https://TOKEN@host`. Names of people
and of accounts are shorter, or have no digit."""
AUTHORIZED: Final = re.compile(
    r"\bauthorization[\"']?\s*[:=]\s*[\"']?(?:basic|bearer|token)(?:\s|%20)+([\w+/=.~%-]{8,})", re.IGNORECASE
)
"""A header of HTTP with what it is about: `Authorization: Basic dXNlcjpwYXNzd29yZA==`."""
CONNECTED: Final = re.compile(
    r"(?:^|[;\s])(?:Password|Pwd|AccountKey|SharedAccessKey|AccessKey|Secret)=([^;\s]+)", re.IGNORECASE
)
"""The secret part of a connection string; the rest may be said."""
SHORTEST: Final = 8
"""Characters below which a value is taken for no secret: `1` or `true` would be struck out everywhere."""
KNOWN_SHAPES: Final = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|sk-[A-Za-z0-9_-]{20,}"
    r"|AKIA[0-9A-Z]{16})\b"
)
"""Tokens that are known by their look: Hugging Face, GitHub, GitLab, OpenAI, AWS."""
ASSIGNED: Final = re.compile(
    r"(?i)\b(\w*(?:TOKEN|API_?KEY|PASSWORD|PASSWD|PASSPHRASE|SECRET|ACCESS_?KEY|PRIVATE_?KEY|_PASS))\s*[=:]\s*['\"]?(?!\$)[^\s'\"$]{8,}"
)
"""A secret that is written out where a shell or a program is told of it; one that is taken from a variable is none."""


def secrets_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The secrets of an environment: each with the name of its variable."""
    found = {}
    for name, value in environment.items():
        if SECRET_NAME.search(name) and not PLACE_NAME.search(name) and len(value) >= SHORTEST:
            found[value] = name
        for kind in (URL_PASSWORD, URL_USER, AUTHORIZED, CONNECTED):
            for part in kind.findall(value):
                if len(part) >= SHORTEST:
                    found[part] = name
    return found


def redacted(text: str, secrets: Mapping[str, str]) -> str:
    """A text with the name of the variable in the place of each secret."""
    for value in sorted(secrets, key=len, reverse=True):  # one may be part of another
        text = text.replace(value, f"[{secrets[value]}]")
    return text


def redacted_document(value: Any, secrets: Mapping[str, str]) -> Any:
    """A JSON document without secrets: in every text of it; keys are the schema's."""
    if isinstance(value, str):
        return redacted(value, secrets)
    if isinstance(value, Mapping):
        return {key: redacted_document(item, secrets) for key, item in value.items()}
    return [redacted_document(item, secrets) for item in value] if isinstance(value, list | tuple) else value


def secret_in(text: str) -> str:
    """What looks like a secret in a text, in words that don't repeat it; empty where nothing does."""
    if found := ASSIGNED.search(text):
        return f"a value for {found[1]}"
    if KNOWN_SHAPES.search(text) or URL_USER.search(text) or AUTHORIZED.search(text):
        return "an access token"
    return "a password in an address" if URL_PASSWORD.search(text) else ""


class Redactor:
    """Strikes secrets out of a stream that comes in pieces, wherever the pieces end.

    Args:
        secrets: As `secrets_of` gives them.
    """

    def __init__(self, secrets: Mapping[str, str]) -> None:
        ordered = sorted(secrets, key=len, reverse=True)
        self._secrets = {value.encode(): f"[{secrets[value]}]".encode() for value in ordered}
        self._held = b""

    def feed(self, chunk: bytes) -> bytes:
        """What can be passed on now; the beginning of what may become a secret waits for the next piece."""
        text = self._held + chunk
        for value, name in self._secrets.items():
            text = text.replace(value, name)
        longest = max(map(len, self._secrets), default=1)
        starts = range(max(0, len(text) - longest + 1), len(text))
        start = next(
            (at for at in starts if any(value.startswith(text[at:]) for value in self._secrets)), len(text)
        )
        self._held = text[start:]
        return text[:start]

    def rest(self) -> bytes:
        """What was still held, when nothing comes after it."""
        held, self._held = self._held, b""
        return held
