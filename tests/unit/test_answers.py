"""What is an answer, and what is none."""

from __future__ import annotations

import pytest

from mapo_lightning.semantics.answers import count_thoughts, read_answer, stored_fault
from mapo_lightning.semantics.describer import NoAnswer
from mapo_lightning.semantics.phrase import parse_reply
from mapo_lightning.semantics.store import StoredLabel

SLOTS = "[hand][opens][door][left][10 cm]"
WRONG = "[robot][drops][vase][up][9 m]"


def reason(text: str, cut: bool = False) -> str:
    found = read_answer(text, cut)
    assert isinstance(found, NoAnswer), found
    assert not found.outage
    return found.reason


@pytest.mark.parametrize(
    "text",
    [
        f"<think>{WRONG}</think>{SLOTS}",
        f"{WRONG} or so.\n</think>\n\n{SLOTS}",
        f"<think></think>\n<think>{WRONG}</think>\n{SLOTS}",
        f"<thinking>{WRONG}</thinking>{SLOTS}",
        f"[THINK]{WRONG}[/THINK]{SLOTS}",
        f"\u25c1think\u25b7{WRONG}\u25c1/think\u25b7{SLOTS}",
        f"<|channel|>analysis<|message|>{WRONG}<|channel|>final<|message|>{SLOTS}",
        f"<think>{WRONG}</think>So: <answer>{SLOTS}</answer>",
        f"The answer is <|begin_of_box|>{SLOTS}<|end_of_box|>.",
        f"{SLOTS}\n\nExplanation: the hand ope",
        f"I'm sorry for the delay. {SLOTS}",
        '```json\n{"body": "hand", "action": "opens", "target": "door", "direction": "left", '
        '"displacement": "10 cm"}\n```\nThis is bec',
    ],
)
def test_an_answer_is_taken_from_where_it_is(text: str) -> None:
    answer = read_answer(text, cut=True)  # all that is missing is chatter
    assert isinstance(answer, str)
    phrase = parse_reply(answer).phrase
    assert phrase is not None
    assert tuple(phrase) == ("hand", "opens", "door", "left", "10 cm")


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "?!",
        "A dog jumps.",
        "[hand][opens][door]",
        "The person can't reach the cup.",
        "None",
    ],
)
def test_what_says_something_is_an_answer_as_it_stands(text: str) -> None:
    assert read_answer(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "I cannot see any significant action in this video.",
        "I don't detect any movement.",
        "I'm sorry, but there is no action here.",
    ],
)
def test_seeing_nothing_move_is_no_refusal(text: str) -> None:
    assert read_answer(text) == text
    assert parse_reply(text).status == "null"


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't assist with that request, as it shows a person.",
        "I\u2019m sorry, I can\u2019t help.",
        "Sorry, I am not able to describe people.",
        "I cannot provide a description of the video that moves me.",
        "I am unable to view videos.",
        "As an AI language model, I do not watch videos.",
        "Unfortunately, I can't process images.",
        "I apologize, but this content moves beyond my guidelines.",
        "The image was flagged by our safety system.",
        "Your request was blocked.",
    ],
)
def test_a_refusal_is_no_answer(text: str) -> None:
    assert reason(text).startswith("it refuses: '")


@pytest.mark.parametrize(
    ("text", "cut", "why"),
    [
        (f"<think>{WRONG}", False, "it thinks"),
        (f"<think>{WRONG}", True, "it thinks"),
        (f"<think>x</think><think>{WRONG}", False, "it thinks"),
        ("", False, "it says nothing"),
        (" \n\x00\u200b", False, "it says nothing"),
        (f"<think>{WRONG}</think>\n", False, "it says nothing"),
        ("<answer></answer>", False, "it says nothing"),
        ("A hand lifts the ball and moves it to", True, "cut short"),
        ("[hand][lifts][ball][left]", True, "cut short"),
        ("[hand][lifts][ba", False, "cut short"),
        ("[hand][lifts][ball][left][", False, "cut short"),
        ('{"executing_body": "hand", "act', False, "cut short"),
        ('```json\n{"executing_body": "hand", "action": "lifts"', False, "cut short"),
        ("nul", True, "cut short"),
    ],
)
def test_half_an_answer_is_none(text: str, cut: bool, why: str) -> None:
    assert why in reason(text, cut)


def test_thoughts_are_counted_where_they_end() -> None:
    assert [count_thoughts(t) for t in ("", "<think>", "a</think>b", "</think></think>")] == [
        0, 0, 1, 2,
    ]  # fmt: skip


def stored(text: str, describer: str = "openai m prompt 0 tokens 16 auto") -> StoredLabel:
    """As version 0.1.0 stored whatever it got."""
    phrase, status = parse_reply(text)
    return StoredLabel(text[:256], status, phrase, None, describer, "a.mp4 frames 0..3 step 1")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it says nothing"),
        (f"<think>{WRONG}", "thoughts"),
        (f"<think>{WRONG}</think>{SLOTS}", "thoughts"),  # its pieces may be those of the thought
        ("I'm sorry, but I can't assist with what it shows.", "it refuses"),
        ("[hand][lifts][ba", "cut short"),
        ('{"executing_body": "hand", "action": "li', "cut short"),
        ("A hand lifts the ball and moves it slowly to", "cut short"),
    ],
)
def test_a_stored_label_that_is_no_answer_is_found(text: str, why: str) -> None:
    found = stored_fault(stored(text))
    assert found is not None
    assert why in found


@pytest.mark.parametrize(
    "label",
    [
        stored(SLOTS),
        stored("null"),
        stored("?!"),
        stored("A hand lifts the ball"),  # short of its tokens, without a full stop
        stored("A hand lifts the ball and moves it slowly to the right."),
        stored("A hand lifts the ball and moves it slowly to the right", "flow-v1 side=128"),
        stored(SLOTS + " because " + "the hand [sic] opens " * 20 + "[and"),  # shortened by us
        stored("A hand " + "really " * 60 + "lifts the ball."),
    ],
)
def test_a_stored_answer_stays(label: StoredLabel) -> None:
    assert stored_fault(label) is None
