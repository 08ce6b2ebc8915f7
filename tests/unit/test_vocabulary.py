from __future__ import annotations

import math

import numpy as np
import pytest

from mapo_lightning.semantics.phrase import parse_reply
from mapo_lightning.semantics.vocabulary import (
    COMPASS,
    DIRECTIONS,
    compass_word,
    direction_of,
    direction_words,
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("towards the Lower-Left", ["towards", "lower", "left"]),
        ("counter-clockwise", ["counterclockwise"]),
        ("Counter Clockwise", ["counterclockwise"]),
        ("counterclockwise", ["counterclockwise"]),
        ("anti-clockwise, then up", ["anticlockwise", "up"]),
        ("anticlockwise", ["anticlockwise"]),
        ("clockwise", ["clockwise"]),
        ("nowhere", []),
        ("from left to right", ["right"]),
        ("from the far right to the left", ["left"]),
        ("in from the left", []),
        ("with the left hand to the right", ["right"]),
        ("to the right, hand in hand", ["right"]),
    ],
)
def test_direction_words_of_a_text(text: str, words: list[str]) -> None:
    assert direction_words(text) == words
    assert direction_of(text) == (words[0] if words else "")


def test_a_hand_that_does_something_is_no_distance() -> None:
    phrase = parse_reply("A hand pushes the cup from left to right by 5 cm.").phrase
    assert phrase is not None
    assert (phrase.body, phrase.direction, phrase.displacement) == ("A hand", "right", "5 cm")
    phrase = parse_reply("A hand pushes the cup.").phrase
    assert phrase is not None
    assert phrase.displacement == ""


@pytest.mark.parametrize("way", ["counter-clockwise", "counter clockwise", "anti-clockwise"])
def test_a_sentence_that_says_counterclockwise_does_not_mean_clockwise(way: str) -> None:
    phrase = parse_reply(f"A hand turns the knob {way}.").phrase
    assert phrase is not None
    assert DIRECTIONS[phrase.direction] == (0.0, 0.0, 0.0, -1.0)


@pytest.mark.parametrize(("number", "word"), enumerate(COMPASS))
def test_the_compass_goes_clockwise_from_the_right(number: int, word: str) -> None:
    for degrees in (-22.0, 0.0, 22.0):
        angle = math.radians(45.0 * number + degrees)
        assert compass_word(np.array([math.cos(angle), math.sin(angle)])) == word
    right, up = (sum(DIRECTIONS[part][axis] for part in word.split()) for axis in (0, 1))
    angle = math.radians(45.0 * number)
    assert (right, up) == (round(math.cos(angle)), -round(math.sin(angle)))
