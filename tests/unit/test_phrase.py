from __future__ import annotations

import pytest

from mapo_lightning.semantics.phrase import (
    MAX_SLOT,
    PROMPT,
    SLOTS,
    Phrase,
    clean_text,
    format_phrase,
    parse_reply,
)

ARM = Phrase("Robot arm", "Lifting", "Small black object", "Upwards", "One arm's length")
HAND = Phrase("hand", "opens", "door", "left", "10 cm")


def test_prompt_asks_for_every_slot() -> None:
    assert PROMPT.count("[") == len(SLOTS)
    assert PROMPT.endswith("Example 3:null.")


@pytest.mark.parametrize(
    "reply",
    [
        "[hand][opens][door][left][10 cm]",
        " [hand] [opens] [door] [left] [10 cm]. ",
        "The action is:\n\n**[hand][opens][door][left][10 cm]**\n",
        "1. [hand][opens][door][left][10 cm]\n2. [foot][kicks][ball][right][1 m]",
        "[[hand][opens][door][left][10 cm]]",
        "[hand, opens, door, left, 10 cm]",
        '["hand", "opens", "door", "left", "10 cm"]',
        "[Executing body: hand][Action: opens][door][left][10 cm]",
        "\x1b[31m[hand]\x1b[0m[opens][do\x00or][left][10\u200b cm]",
        '{"body":"hand","action":"opens","target":"door","direction":"left",'
        '"displacement":"10 cm"}',
        '```json\n{"Executing body": "hand", "Action": "opens", "Target object": "door",\n'
        '"Moving direction": "left", "Displacement generated": "10 cm"}\n```',
        "Executing body: hand\n- **Action**: opens\n- Target object: door\n"
        "- Moving direction: left\n- Displacement generated: 10 cm",
        "\u3010hand\u3011\u3010opens\u3011\u3010door\u3011\u3010left\u3011\u301010 cm\u3011",
    ],
)
def test_slots_in_any_dress(reply: str) -> None:
    assert parse_reply(reply) == (HAND, "slots")


def test_published_answer() -> None:
    assert parse_reply(format_phrase(ARM)) == (ARM, "slots")


@pytest.mark.parametrize(
    ("reply", "phrase"),
    [
        ("[joint][bend][10 degrees]", Phrase("joint", "bend", "", "", "10 degrees")),
        ("[hand][opens]", Phrase("hand", "opens", "", "", "")),
        ("[hand][opens][upwards][2 cm]", Phrase("hand", "opens", "", "upwards", "2 cm")),
        ("[hand][opens][door][2 cm]", Phrase("hand", "opens", "door", "", "2 cm")),
        ("[hand][opens][door][null][n/a]", Phrase("hand", "opens", "door", "", "")),
        ("[hand][opens][left][right]", Phrase("hand", "opens", "right", "left", "")),
        ("[hand][opens][1 cm][2 cm]", Phrase("hand", "opens", "2 cm", "", "1 cm")),
        ("[hand] with\n[opens] and\n[door]", Phrase("hand", "opens", "door", "", "")),
        ("[hand; opens; door]", Phrase("hand", "opens", "door", "", "")),
        ("Action: opens\nTarget object: door", Phrase("", "opens", "door", "", "")),
        ('{"x": 1} or {"action": "opens", "body": "hand"}', Phrase("hand", "opens", "", "", "")),
        ('{"action": ["opens"], "body": {"a": "hand"}}', Phrase("hand", "opens", "", "", "")),
        ('{"action": "opens", "body": [1, 2]} {}', Phrase("", "opens", "", "", "")),
    ],
)
def test_fewer_slots_go_where_they_belong(reply: str, phrase: Phrase) -> None:
    assert parse_reply(reply) == (phrase, "slots")


@pytest.mark.parametrize(
    ("reply", "phrase"),
    [
        (
            "A hand lifted a brick and moved it the distance of one arm.",
            Phrase("A hand", "lifted", "a brick", "up", "the distance of one arm"),
        ),
        (
            "A leg kicked the ball two meters away.",
            Phrase("A leg", "kicked", "the ball", "away", "two meters"),
        ),
        ("The person is moving to the left.", Phrase("The person", "moving", "", "left", "")),
        ("to the right, slowly", Phrase("", "moves", "", "right", "")),
    ],
)
def test_prose(reply: str, phrase: Phrase) -> None:
    assert parse_reply(reply) == (phrase, "prose")


@pytest.mark.parametrize(
    "reply",
    [
        *("null", "Null.", "[null]", "**null**", "`null`", "Example 3:null.", "[null]" * 5, "none"),
        *("No significant action is seen.", "[hand][null][][][]", '{"action": null}'),
    ],
)
def test_nothing_happens(reply: str) -> None:
    assert parse_reply(reply) == (None, "null")


@pytest.mark.parametrize("reply", ["", " \n", "\x00", "[][][][][]", "\U0001f600" * 9, "x" * 10**6])
def test_garbage_is_unreadable(reply: str) -> None:
    assert parse_reply(reply) == (None, "unreadable")


def test_a_list_of_more_than_five_in_one_bracket_is_no_phrase() -> None:
    assert parse_reply("[red, green, blue, white, black, grey]").status == "unreadable"


def test_repeating_the_question_is_no_answer() -> None:
    question = PROMPT[PROMPT.index("[") : PROMPT.rindex("]") + 1]
    assert parse_reply(question) == (None, "unreadable")


def test_slots_are_bounded_and_plain() -> None:
    phrase = parse_reply(f"[{'a' * 999}][\x1b[1mopens\x07][door][left][1 cm]").phrase
    assert phrase is not None
    assert phrase.body == "a" * MAX_SLOT
    assert phrase.action == "opens"


def test_clean_text_cuts_and_joins() -> None:
    assert clean_text("a\r\n\tb\x1b]0;title\x07c", 10) == "a bc"
    assert clean_text("word " * 10, 6) == "word w"
