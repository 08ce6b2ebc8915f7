"""Words of motion: verbs, directions and distances, and how to find them in a sentence."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

TEMPLATE = frozenset(
    {"executing body", "action", "target object", "moving direction", "displacement generated"}
)
"""Slot names of the prompt, lower case."""

DIRECTIONS: dict[str, tuple[float, float, float, float]] = {
    "right": (1.0, 0.0, 0.0, 0.0),
    "rightwards": (1.0, 0.0, 0.0, 0.0),
    "rightward": (1.0, 0.0, 0.0, 0.0),
    "left": (-1.0, 0.0, 0.0, 0.0),
    "leftwards": (-1.0, 0.0, 0.0, 0.0),
    "leftward": (-1.0, 0.0, 0.0, 0.0),
    "up": (0.0, 1.0, 0.0, 0.0),
    "upwards": (0.0, 1.0, 0.0, 0.0),
    "upward": (0.0, 1.0, 0.0, 0.0),
    "upper": (0.0, 1.0, 0.0, 0.0),
    "down": (0.0, -1.0, 0.0, 0.0),
    "downwards": (0.0, -1.0, 0.0, 0.0),
    "downward": (0.0, -1.0, 0.0, 0.0),
    "lower": (0.0, -1.0, 0.0, 0.0),
    "towards": (0.0, 0.0, 1.0, 0.0),
    "toward": (0.0, 0.0, 1.0, 0.0),
    "closer": (0.0, 0.0, 1.0, 0.0),
    "backward": (0.0, 0.0, 1.0, 0.0),
    "backwards": (0.0, 0.0, 1.0, 0.0),
    "away": (0.0, 0.0, -1.0, 0.0),
    "forward": (0.0, 0.0, -1.0, 0.0),
    "forwards": (0.0, 0.0, -1.0, 0.0),
    "clockwise": (0.0, 0.0, 0.0, 1.0),
    "counterclockwise": (0.0, 0.0, 0.0, -1.0),
    "anticlockwise": (0.0, 0.0, 0.0, -1.0),
}
"""Direction word -> (right, up, towards the camera, clockwise), as the picture shows it."""

COMPASS = ("right", "lower right", "down", "lower left", "left", "upper left", "up", "upper right")
"""Eight directions on the screen, 45 degrees apart, clockwise from the right."""

_NO_WAY = re.compile(
    r"\bfrom (?:the |its |your )?(?:far )?(?:left|right|upper|lower)\b"  # where it comes from
    r"|\b(?:left|right|upper|lower)[- ](?=(?:hand|arm|leg|foot|finger|thumb|knee|elbow)s?\b)"
)
"""Words that are no direction of a motion: "from left to right" goes to the right."""
_COUNTERCLOCKWISE = re.compile(r"\b(counter|anti)[- ]clock")

_VERB_LIST = """approach bend bounce bring bring carry catch clean close cover cut dig dip drag draw
drop enter expand fall fill flip fold grab grasp hit hold insert jump kick lean leave lift lower
move open pan pick place play plug point pour press pull punch push put raise reach recede release
remove roll rotate run scoop shake show shrink shift sit slide slip spin spread squeeze stand step
stir stretch stuff sway sweep swing take tear throw tilt touch turn twist walk wave wipe zoom
insert crawl hop trot stride gallop kneel crouch straighten extend retract push wash"""
_IRREGULAR = {
    "bent": "bend", "brought": "bring", "caught": "catch", "drew": "draw", "dug": "dig",
    "fell": "fall", "fallen": "fall", "held": "hold", "left the": "leave", "ran": "run",
    "sat": "sit", "shook": "shake", "shown": "show", "slid": "slide", "spun": "spin",
    "stood": "stand", "swept": "sweep", "swung": "swing", "taken": "take", "took": "take",
    "threw": "throw", "thrown": "throw", "torn": "tear", "tore": "tear",
}  # fmt: skip
_IMPLIED = {"lift": "up", "raise": "up", "jump": "up", "drop": "down", "fall": "down"}
_IMPLIED |= {"lower": "down", "approach": "towards the camera", "recede": "away"}

_UNITS = (
    r"cm|mm|m|km|px|centi\w+|milli\w+|met(?:er|re)s?|inch(?:es)?|feet|foot|degrees?|deg|°|"
    r"percent|%|pixels?|arms?|hands?|steps?|times|body lengths?"
)
_NUMBER = r"\d+(?:\.\d+)?|an?|one|two|three|four|five|six|seven|eight|nine|ten|half|several|few"
_AMOUNT = re.compile(rf"\b(?:{_NUMBER})\s*(?:{_UNITS})(?![a-z])(?:'s length)?", re.IGNORECASE)
_DISTANCE = re.compile(
    rf"\b(?:the )?(?:distance|length|displacement) of (?:{_NUMBER}) \w+", re.IGNORECASE
)
_ADJECTIVE = re.compile(r"\b(?:small|slight|large|short|long|little)\b.*\b(?:disp|dist|amount)")
_BREAK = re.compile(
    r"[.,;!?]|\b(?:and|then|while|which|that|to|towards?|from|into|onto|up|down|away|left|right"
    r"|forwards?|backwards?|upwards?|downwards?|by|with|in|on|over|off|out)\b"
)


def _forms(verb: str) -> set[str]:
    """The verb with its endings, doubled consonant and dropped e included."""
    stem = verb.removesuffix("e")
    double = verb + verb[-1]
    return {verb, verb + "s", verb + "es", stem + "ed", stem + "ing", double + "ed", double + "ing"}


VERBS: dict[str, str] = {
    form: verb for verb in _VERB_LIST.split() for form in _forms(verb)
} | _IRREGULAR
"""Inflected form -> base form of the verbs of motion and handling."""

_STATES = frozenset({"left", "lower", "close", "open"})
"""Forms that are more often a direction or an adjective than a verb."""


def direction_words(text: str) -> list[str]:
    """Return all words of the text that are keys of `DIRECTIONS`, in order."""
    joined = _NO_WAY.sub(" ", _COUNTERCLOCKWISE.sub(r"\1clock", text.lower()))
    return [word for word in re.findall(r"[a-z]+", joined) if word in DIRECTIONS]


def direction_of(text: str) -> str:
    """Return the first direction word of the text, or '' if there is none."""
    return next(iter(direction_words(text)), "")


def compass_word(shift: NDArray[np.float64]) -> str:
    """Name the direction of a shift (right, down), (2,), by the nearest of `COMPASS`."""
    return COMPASS[round(float(np.arctan2(shift[1], shift[0])) / (np.pi / 4)) % 8]


def is_distance(text: str) -> bool:
    """Tell whether the text says how far: a number with a unit, or words for an amount."""
    low = text.lower()
    return bool(_AMOUNT.search(low) or _DISTANCE.search(low) or _ADJECTIVE.search(low))


def read_sentence(text: str) -> tuple[str, str, str, str, str] | None:
    """Find the five slots in free prose.

    Args:
        text: One or a few sentences, one line.

    Returns:
        (body, action, target, direction, displacement), '' for what is not mentioned; None if
        neither a known verb nor a direction is found.
    """
    verb = _find_verb(text)
    direction = direction_of(text if verb is None else text[verb.end() :])
    if verb is None:
        return ("", "moves", "", direction, _distance_in(text)) if direction else None
    base = VERBS[verb.group().lower()]
    before = re.split(r"[.,:;]", text[: verb.start()])[-1]
    body = re.sub(r"\b(?:is|are|was|were|being|has|have|been)\b", " ", before)
    rest = text[verb.end() :].lstrip()
    ends = [m.start() for m in (_BREAK.search(rest.lower()), _AMOUNT.search(rest)) if m]
    target = rest[: min(ends)] if ends else rest
    return (
        " ".join(body.split()),
        verb.group().lower(),
        " ".join(target.split()),
        direction or _IMPLIED.get(base, ""),
        _distance_in(rest),  # what comes before the verb is the body: "a hand" is no length there
    )


def _find_verb(text: str) -> re.Match[str] | None:
    for match in re.finditer(r"[A-Za-z]+", text):
        word = match.group().lower()
        if word in VERBS and word not in _STATES:
            return match
    return None


def _distance_in(text: str) -> str:
    found = _DISTANCE.search(text) or _AMOUNT.search(text)
    return found.group() if found else ""
