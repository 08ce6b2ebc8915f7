"""Semantic actions from sentences that came with the videos: no model is asked, no frame is read.

Three forms of a sentence are understood: the templates of Something-Something V2 with their objects
in brackets (``Pushing [a green cup] from left to right``), five slots in brackets, and free prose.

A direction is filled in only where the sentence leaves no doubt: of the 174 templates, those in
`_DIRECTIONS`. All others have an empty direction, such as ``Moving [something] closer to
[something]``, which names no direction in the picture.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mapo_lightning.semantics import vocabulary
from mapo_lightning.semantics.describer import Reply
from mapo_lightning.semantics.phrase import (
    MAX_READ,
    MAX_SLOT,
    MAX_TEXT,
    SLOTS,
    Phrase,
    clean_text,
    format_phrase,
    parse_reply,
)
from mapo_lightning.types import Frames

_ON_SCREEN = {
    "pulling something from left to right": "right",
    "pulling something from right to left": "left",
    "pushing something from left to right": "right",
    "pushing something from right to left": "left",
    "moving something up": "up",
    "moving something down": "down",
}
"""Templates that name a direction in the picture themselves: what describers are judged by."""

_DIRECTIONS = _ON_SCREEN | {
    # Up and down in the room. Filmed from above, they are no direction on the screen, so these
    # serve as labels but not as the truth about a picture.
    "picking something up": "up",
    "lifting something up completely without letting it drop down": "up",
    "lifting up one end of something without letting it drop down": "up",
    "lifting something with something on it": "up",
    "dropping something behind something": "down",
    "dropping something in front of something": "down",
    "dropping something into something": "down",
    "dropping something next to something": "down",
    "dropping something onto something": "down",
    "something falling like a feather or paper": "down",
    "something falling like a rock": "down",
    "moving something towards the camera": "towards the camera",
    "moving something away from the camera": "away from the camera",
    # Directions are those of the picture: what a camera turns away from moves the other way.
    "approaching something with your camera": "towards the camera",
    "moving away from something with your camera": "away from the camera",
    "turning the camera left while filming something": "right",
    "turning the camera right while filming something": "left",
    "turning the camera upwards while filming something": "down",
    "turning the camera downwards while filming something": "up",
}
"""Template, in lower case and without brackets -> direction."""

_OBJECT = re.compile(r"\[([^\[\]]*)\]")
_NEIGHBOURS = re.compile(r"\]\s*\[")  # "[two] [cups]" is one object
_FIVE_SLOTS = re.compile(rf"(?:\[[^\[\]]*\]\s*){{{len(SLOTS)}}}")
_WAYS = re.compile(
    r"\bfrom (?:left to right|right to left)\b|\b(?:towards|away from) the camera\b"
    r"|\bwith your camera\b|\bthe camera (?:left|right|upwards|downwards) while filming\b"
)
_SLIGHTLY = re.compile(r"\bslightly\b|\bjust a little bit\b")
_DEPTH = frozenset(word for word, way in vocabulary.DIRECTIONS.items() if way[2])
# A caption is people's text; these would be read as part of an answer (see `answers.read_answer`).
_MARKS = str.maketrans("[]{}<>\u25c1\u25b7", "        ")


class TemplateDescriber:
    """Puts sentences that came with the videos into the five slots."""

    name = "templates-v1"
    in_worker = True

    def describe(self, clips: Sequence[Frames]) -> list[Reply]:
        """Answer ``null`` to every window: no sentence came with these frames."""
        return [Reply("null") for _ in clips]

    def read(self, captions: Sequence[str]) -> list[Reply]:
        """Answer for windows whose sentences are known; see `CaptionReader.read`."""
        return [Reply(_answer(caption)) for caption in captions]


def read_caption(text: str) -> Phrase | None:
    """Put a sentence into the five slots.

    Args:
        text: A template with its objects in brackets, five slots in brackets, or free prose.

    Returns:
        The action, each slot at most 64 characters; None if the sentence is empty or says that
        nothing happens. A sentence without a known verb becomes the action as a whole.
    """
    plain = clean_text(text, MAX_READ)
    if _FIVE_SLOTS.fullmatch(plain):
        return parse_reply(plain).phrase
    if _OBJECT.search(plain):
        return _read_template(plain)
    if not plain or parse_reply(plain).status == "null":
        return None
    found = vocabulary.read_sentence(plain) or ("", plain, "", "", "")
    phrase = Phrase(*(clean_text(slot, MAX_SLOT) for slot in found))
    # "Closer" and "away" are directions of the picture only where they are about the camera.
    vague = phrase.direction in _DEPTH and "camera" not in plain.lower()
    return phrase._replace(direction="") if vague else phrase


def direction_on_screen(label: str) -> str:
    """Direction that a class of Something-Something V2 names in the picture; '' if it names none.

    Args:
        label: The template, with or without its brackets.
    """
    return _ON_SCREEN.get(_key(label), "")


def _key(template: str) -> str:
    joined = _NEIGHBOURS.sub(" ", template)
    return " ".join(_OBJECT.sub("something", joined).lower().split())


def _read_template(text: str) -> Phrase:
    """Body, action, objects and direction of a template with its objects in brackets.

    The action is the sentence without its objects: it is what tells "poking so that it falls over"
    from "poking so that it spins around".
    """
    key, joined = _key(text), _NEIGHBOURS.sub(" ", text)
    objects = [" ".join(name.split()) for name in _OBJECT.findall(joined)]
    words = _OBJECT.sub(" ", joined).lower()
    body = "camera" if "your camera" in key or key.startswith("turning the camera") else "hand"
    if joined.startswith("["):  # "[Something] falling like a rock": it does so by itself
        body = objects.pop(0) or "something"
    action = " ".join(_WAYS.sub(" ", words).split()).strip(" ,.")
    return Phrase(
        clean_text(body, MAX_SLOT),
        _shorten(re.sub(r"\s+,", ",", action)),
        clean_text(", ".join(name for name in objects if name), MAX_SLOT),
        _DIRECTIONS.get(key, ""),
        "slightly" if _SLIGHTLY.search(words) else "",
    )


def _shorten(text: str) -> str:
    """At most `MAX_SLOT` characters, of whole words."""
    return text if len(text) <= MAX_SLOT else text[: MAX_SLOT + 1].rpartition(" ")[0]


def _answer(caption: str) -> str:
    """The sentence for people, and behind it the slots that are read from it."""
    phrase = read_caption(caption)
    if phrase is None:
        return "null"
    tidy = Phrase(*(" ".join(slot.translate(_MARKS).split()) for slot in phrase))
    slots = format_phrase(tidy)
    if _FIVE_SLOTS.fullmatch(caption.strip()):
        return slots
    sentence = clean_text(caption.translate(_MARKS), MAX_TEXT)
    return f"{clean_text(sentence, max(0, MAX_TEXT - len(slots) - 1))} {slots}".strip()
