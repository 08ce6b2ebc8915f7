"""Hides secrets in whatever leaves the process: printed, logged or tracked text."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"

_SECRET_WORDS = frozenset(
    ("key", "apikey", "token", "password", "passwd", "passphrase", "secret", "credentials")
)
_URI_CREDENTIALS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*://)[^/\s'\"]+@")
_QUERY_SECRET = re.compile(
    r"(?P<name>[?&][A-Za-z_\-]*(?:key|token|password|secret|signature)=)[^&\s'\"]+", re.IGNORECASE
)
# Shapes of well-known access tokens: found in free text as well, for example in a diff.
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_\-]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|glpat-[A-Za-z0-9_\-]{16,}|dapi[0-9a-f]{32})"
)
_INTERPOLATION = re.compile(r"\$\{[^}]*\}")


def is_secret_name(name: str) -> bool:
    """Tell whether a setting of this name holds a secret.

    Args:
        name: Last part of a dotted key, such as ``api_key``.

    Returns:
        True where one of the words of the name is a word for a secret. ``max_tokens`` is not one.
    """
    words = re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return not _SECRET_WORDS.isdisjoint(words)


def redact_text(text: str) -> str:
    """Replace credentials in addresses and well-known access tokens by ``***``."""
    text = _URI_CREDENTIALS.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _QUERY_SECRET.sub(rf"\g<name>{HIDDEN}", text)
    return _TOKEN.sub(HIDDEN, text)


def redact(value: Any, name: str = "") -> Any:
    """Copy a plain tree with its secrets replaced by ``***``.

    Args:
        value: Dicts, lists and leaves.
        name: The key under which ``value`` stands; decides whether a string is a secret.

    Returns:
        The same tree. Interpolations such as ``${oc.env:TOKEN}`` stay: they name no secret.
    """
    if isinstance(value, dict):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, name) for item in value]
    if not isinstance(value, str):
        return value
    if is_secret_name(name) and value and not _INTERPOLATION.fullmatch(value):
        return HIDDEN
    return redact_text(value)
