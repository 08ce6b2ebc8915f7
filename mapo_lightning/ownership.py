"""Tells settings that this user's programs have saved from settings that came with a file.

A run saves its settings, so that it can be resumed without typing them again. They also hold what a
stranger's file must not choose: addresses, folders, models to load. Saved settings therefore carry
a signature, HMAC-SHA256 with a random key that lies in the user's state folder. Whoever does not
have the key cannot sign. Without a key nothing counts as one's own.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import logging
import os
import secrets
from pathlib import Path

from mapo_lightning.files import FileLock, atomic_write

log = logging.getLogger(__name__)

MAX_SETTINGS = 1_000_000
"""Characters that saved settings may have."""
_BYTES = 32
_LINE = "# signature: "
_PURPOSE = b"mapo-lightning settings 1\n"


def sign(text: str) -> str:
    """Sign settings; the key is made at the first use.

    Returns:
        64 hexadecimal digits; empty where no key can be kept.
    """
    key = _key(make=True)
    return "" if key is None else _digest(key, text)


def is_own(text: str, signature: str) -> bool:
    """Tell whether this user has signed exactly this text."""
    key = _key(make=False)
    if key is None:
        return False
    return hmac.compare_digest(_digest(key, text).encode(), signature.encode("utf-8", "replace"))


def signed(text: str) -> str:
    """Return settings with their signature in front, as a comment of YAML."""
    return f"{_LINE}{sign(text)}\n{text}"


def own_text(path: Path) -> str | None:
    """Read a file of settings.

    Returns:
        Its text without the signature; None where it is missing or was not signed by this user.
    """
    try:
        if not path.is_file() or path.stat().st_size > 4 * MAX_SETTINGS:
            return None
        first, _, text = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    own = first.startswith(_LINE) and is_own(text, first.removeprefix(_LINE).strip())
    return text if own else None


def key_file() -> Path:
    """Return the path of the key.

    Raises:
        OSError: There is no home folder.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    if Path(state).is_absolute():
        return Path(state) / "mapo-lightning" / "key"
    try:
        return Path.home() / ".local" / "state" / "mapo-lightning" / "key"
    except RuntimeError as error:
        raise OSError(str(error)) from error


def _digest(key: bytes, text: str) -> str:
    return hmac.new(key, _PURPOSE + text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def _key(*, make: bool) -> bytes | None:
    try:
        path = key_file()
        if make and not path.exists():
            with FileLock(path.with_name("key.lock")):  # two first runs at once keep one key
                if not path.exists():
                    with atomic_write(path, durable=True, private=True) as draft:
                        draft.write_bytes(secrets.token_bytes(_BYTES))
        return _read(path)
    except FileNotFoundError:
        return None  # nothing has been signed yet
    except OSError as error:
        _complain(error.strerror or str(error))
        return None


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        others, key = os.fstat(file.fileno()).st_mode & 0o077, file.read(_BYTES + 1)
    if others:
        raise OSError(f"others may read '{path}': chmod 600 '{path}'")
    if len(key) != _BYTES:
        raise OSError(f"'{path}' is damaged: delete it")
    return key


@functools.cache  # once per reason
def _complain(reason: str) -> None:
    log.warning(
        "settings cannot be signed (%s): the runs of this user count as those of somebody else, "
        "and resuming them needs more words (docs/evaluate.md)",
        reason,
    )
