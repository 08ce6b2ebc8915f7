"""What a player may say: messages of the page, checked before they mean anything."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from mapo_lightning.semantics.phrase import MAX_SLOT, SLOTS, Phrase, clean_text, parse_reply
from mapo_lightning.types import MapoError

MAX_MESSAGE = 65_536
"""Longest message, in characters."""
MAX_PHRASE = 1_000
"""Longest phrase, in characters."""
_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "act": {"action": list, "serial": int},
    "phrase": {"text": str},
    "slots": {"slots": list},
    "auto": {"on": bool},
    "run": {"on": bool},
    "speed": {"fps": int},
    "step": {},
    "rewind": {"steps": int},
    "go": {"number": int},
    "begin": {"start": int},
    "dream": {},
    "record": {"on": bool},
}
"""Every command, and its fields with their types."""


class CommandError(MapoError):
    """The player said something that cannot be done; the play goes on."""


def parse(text: str | bytes) -> dict[str, Any]:
    """Read a message: a JSON object whose ``do`` names a command, with exactly its fields.

    Raises:
        CommandError: It is anything else.
    """
    if isinstance(text, bytes):
        raise CommandError("a message of bytes was sent; commands are JSON text")
    if len(text) > MAX_MESSAGE:
        raise CommandError(
            f"a message of {len(text):,} characters was sent; at most {MAX_MESSAGE:,} are read"
        )
    try:
        command: Any = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise CommandError('a message was no JSON; send for example {"do": "step"}') from None
    name = command.get("do") if isinstance(command, dict) else None
    fields = _FIELDS.get(name) if isinstance(name, str) else None
    if fields is None:
        raise CommandError(f"there is no such command; the commands are {', '.join(_FIELDS)}")
    given = {key: value for key, value in command.items() if key != "do"}
    for key, kind in fields.items():
        value = given.get(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CommandError(f"'{name}' needs '{key}', of type {getattr(kind, '__name__', kind)}")
    if odd := set(given) - set(fields):
        raise CommandError(f"'{name}' has {len(odd)} unknown fields; it takes {list(fields)}")
    return {"do": name, **given}


def action_of(values: list[Any], width: int, reach: float) -> tuple[float, ...]:
    """Read an action, and keep every number in [-reach, reach].

    Raises:
        CommandError: It has another width, or something in it is no finite number.
    """
    if len(values) != width:
        raise CommandError(f"an action has {width} numbers here, got {len(values)}")
    found = []
    for value in values:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # Before float(): an integer of JSON may be beyond all floats.
        if not number or not abs(value) < 1e9 or not math.isfinite(value):
            raise CommandError("an action is made of finite numbers")
        found.append(max(-reach, min(reach, float(value))))
    return tuple(found)


def phrase_of(text: str) -> Phrase | None:
    """Read a typed phrase: slots in brackets, or plain words; None for an empty one.

    Raises:
        CommandError: It is too long, or no action can be found in it.
    """
    if len(text) > MAX_PHRASE:
        raise CommandError(
            f"a phrase has at most {MAX_PHRASE:,} characters, got {len(text):,}: say what moves, "
            "how, where to and how far"
        )
    if not clean_text(text, MAX_PHRASE):
        return None
    found = parse_reply(text)
    if found.phrase is None and found.status == "unreadable":
        raise CommandError(
            "no action is found in this phrase: name what moves and how, for example 'the disc "
            "moves to the left', or [disc][moves][pad][left][10 percent]"
        )
    return found.phrase


def slots_of(values: list[Any]) -> Phrase | None:
    """Read the five slots of a phrase; None where all are empty.

    Raises:
        CommandError: There are not five short texts.
    """
    if len(values) != len(SLOTS) or not all(isinstance(value, str) for value in values):
        raise CommandError(f"a phrase has {len(SLOTS)} slots, all text: {', '.join(SLOTS)}")
    if long := [name for name, x in zip(SLOTS, values, strict=True) if len(x) > MAX_SLOT]:
        raise CommandError(f"a slot has at most {MAX_SLOT} characters; shorten '{long[0]}'")
    tidy = Phrase(*(clean_text(value, MAX_SLOT) for value in values))
    return tidy if any(tidy) else None


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")
