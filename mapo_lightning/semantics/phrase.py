"""The five slots of a semantic action: the prompt for them, and the parser of answers."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any, Literal, NamedTuple

from mapo_lightning.semantics import vocabulary

PROMPT = (
    "Please describe possible actions(if there appears significant action then describe it else "
    "output null) in this video with format:[Executing body][Action][Target object]"
    "[Moving direction][Displacement generated]. Example 1:A hand lifted a brick and moved it "
    "the distance of one arm. Example 2:A leg kicked the ball two meters away. Example 3:null."
)
"""The published prompt, verbatim: a functional constant of the method."""

SLOTS = ("body", "action", "target", "direction", "displacement")
"""Names of the five slots, in the order of the prompt."""

MAX_TEXT = 256
"""Longest reply that is kept, in characters."""
MAX_SOURCE = 4096
"""Longest name of what a label is about, in characters: a file's name and up to 256 frames."""
MAX_SLOT = 64
"""Longest slot that is kept, in characters."""
MAX_READ = 4096
"""Characters of a reply that are read; bounds the cost of a runaway answer."""

Status = Literal["slots", "prose", "null", "unreadable"]
"""How a reply was read: as slots, as a free sentence, as "no action", or not at all."""

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_JSON = json.JSONDecoder()
_BRACKET = re.compile(r"\[([^\[\]]*)\]")
_LABEL = re.compile(
    r"^[\s*\-#\d.)`\"']*(executing body|body|action|target object|target|moving direction"
    r"|direction|displacement generated|displacement)[*\"'`]*\s*[:=]\s*",
    re.IGNORECASE,
)
_NULLS = frozenset({"", "null", "none", "n/a", "na", "nil", "no action", "no significant action"})
_NOTHING = re.compile(
    r"^.{0,30}\bnull\W*$|(?:\bno|(?:\b(?:not|cannot|unable to)|n['\u2019]t) (?:\w+ ){0,3}any) "
    r"(?:\w+ ){0,2}(?:actions?|movements?|motion|changes?)\b",
    re.IGNORECASE,
)  # "Example 3: null.", "There is no significant action in this video."
_WIDE = str.maketrans("\u3010\u3011\uff3b\uff3d", "[][]")  # brackets of Chinese text
_EDGES = " \t.,;:!`*\"'_-#()"


class Phrase(NamedTuple):
    """A semantic action: who does what to which object, in which direction, how far."""

    body: str
    action: str
    target: str
    direction: str
    displacement: str


class Parsed(NamedTuple):
    """Content of a reply, and how it was read."""

    phrase: Phrase | None
    """None if the reply says that nothing happens, or cannot be read."""
    status: Status


def clean_text(text: str, limit: int) -> str:
    """Make text safe to store and to print: no control or escape characters, one line, bounded.

    Args:
        text: Anything.
        limit: Longest result, in characters.
    """
    plain = _ANSI.sub("", text[: 4 * MAX_READ])
    kept = (" " if c.isspace() else c for c in plain)
    visible = "".join(c for c in kept if not unicodedata.category(c).startswith("C"))
    return " ".join(visible.split())[:limit].strip()


def format_phrase(phrase: Phrase) -> str:
    """Write a phrase in the prompt's format: ``[body][action]...``."""
    return "".join(f"[{slot}]" for slot in phrase)


def parse_reply(text: str) -> Parsed:
    """Read a describer's answer; never raises.

    Bracketed slots (also inside prose, markdown or numbered lists), a JSON object, labelled
    lines, free prose and ``null`` are understood. ``parse_reply(format_phrase(p)).phrase == p``
    for every phrase whose slots are already clean.

    Args:
        text: The reply, of any length and content; the first 4096 characters count.

    Returns:
        The phrase, each slot at most 64 characters, and how it was found.
    """
    lines = [clean_text(line, MAX_READ) for line in text[:MAX_READ].splitlines()]
    flat = " ".join(line for line in lines if line)
    if _is_null(flat):
        return Parsed(None, "null" if flat.strip(_EDGES + "[]{}") else "unreadable")
    for slots in (_json_slots(flat), _bracket_slots(lines), _labelled_slots(lines)):
        if slots is not None:
            return _from_slots(slots)
    if _NOTHING.search(flat):
        return Parsed(None, "null")
    # Brackets without slots repeat the prompt, or are mere punctuation.
    found = vocabulary.read_sentence(_BRACKET.sub(" ", flat))
    if found is None:
        return Parsed(None, "unreadable")
    return Parsed(Phrase(*(clean_text(slot, MAX_SLOT) for slot in found)), "prose")


def _is_null(text: str) -> bool:
    return text.strip(_EDGES + "[]{}").lower() in _NULLS


def _from_slots(slots: list[str]) -> Parsed:
    tidy = [clean_text(_LABEL.sub("", slot), MAX_SLOT) for slot in slots]
    tidy = ["" if _is_null(slot) else slot for slot in tidy]
    phrase = Phrase(*_place(tidy))
    return Parsed(phrase, "slots") if phrase.action else Parsed(None, "null")


def _place(slots: list[str]) -> list[str]:
    """Fit two to five slots into five: the third and later ones by their content."""
    if len(slots) >= len(SLOTS):
        return slots[: len(SLOTS)]
    placed = [slots[0], slots[1], "", "", ""]
    for slot in slots[2:]:
        if vocabulary.is_distance(slot) and not placed[4]:
            placed[4] = slot
        elif vocabulary.direction_of(slot) and not placed[3]:
            placed[3] = slot
        else:
            free = next((i for i in (2, 3, 4) if not placed[i]), 4)
            placed[free] = slot
    return placed


def _bracket_slots(lines: list[str]) -> list[str] | None:
    """Slots of the first line with at least two, otherwise those of the whole reply."""
    found = [_BRACKET.findall(line.translate(_WIDE)) for line in (*lines, " ".join(lines))]
    # Slots that repeat the prompt are no answer.
    found = [[s for s in slots if s.strip().lower() not in vocabulary.TEMPLATE] for slots in found]
    slots = next((slots for slots in found if len(slots) >= 2), found[-1])
    if len(slots) == 1:
        slots = [part.strip(_EDGES) for part in re.split(r"[;|,]", slots[0])]
        slots = slots if len(slots) <= len(SLOTS) else []
    return slots[: len(SLOTS)] if len(slots) >= 2 else None


def _json_slots(text: str) -> list[str] | None:
    """Slots of the first JSON object that names one of them."""
    for start in (match.start() for match in re.finditer(r"\{", text)):
        try:
            value, _ = _JSON.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        # "Executing body", "target_object" ...: the slot's name is part of every such key.
        named = {name: v for name in SLOTS for k, v in value.items() if name in k.lower()}
        if named:
            return [_leaf(named.get(name)) for name in SLOTS]
    return None


def _leaf(value: Any) -> str:
    """The text of a JSON value, also where it is wrapped: ["lifts"], {"name": "lifts"}."""
    while isinstance(value, list | dict) and len(value) == 1:
        (value,) = value.values() if isinstance(value, dict) else value
    return "" if value is None or isinstance(value, list | dict) else str(value)


def _labelled_slots(lines: list[str]) -> list[str] | None:
    named: dict[str, str] = {}
    for line in lines:
        match = _LABEL.match(line)
        if match:
            label = match.group(1).lower()
            name = next(slot for slot in SLOTS if slot in label)
            named.setdefault(name, line[match.end() :].strip(_EDGES))
    return [named.get(name, "") for name in SLOTS] if len(named) >= 2 else None
