"""Sentences become five slots: templates of Something-Something V2, slots, and free prose."""

from __future__ import annotations

import pytest

from mapo_lightning.semantics import templates, vocabulary
from mapo_lightning.semantics.answers import read_answer
from mapo_lightning.semantics.phrase import MAX_SLOT, MAX_TEXT, Phrase, parse_reply
from mapo_lightning.semantics.templates import (
    TemplateDescriber,
    direction_on_screen,
    read_caption,
)

READ = {
    "Pushing [a green cup] from left to right": "hand|pushing|a green cup|right|",
    "Pulling [book] from right to left": "hand|pulling|book|left|",
    "Moving [cup] up": "hand|moving up|cup|up|",
    "Moving [cup] closer to [plate]": "hand|moving closer to|cup, plate||",
    "Moving [cup] away from [plate]": "hand|moving away from|cup, plate||",
    "Moving [cup] away from the camera": "hand|moving|cup|away from the camera|",
    "Moving [cup] and [plate] closer to each other": (
        "hand|moving and closer to each other|cup, plate||"
    ),
    "Approaching [a tree] with your camera": "camera|approaching|a tree|towards the camera|",
    "Moving away from [a tree] with your camera": (
        "camera|moving away from|a tree|away from the camera|"
    ),
    "Turning the camera left while filming [a tree]": "camera|turning|a tree|right|",
    "Turning the camera upwards while filming [a tree]": "camera|turning|a tree|down|",
    "[Leaf] falling like a feather or paper": "Leaf|falling like a feather or paper||down|",
    "[Ball] being deflected from [wall]": "Ball|being deflected from|wall||",
    "[Car] colliding with [car] and both come to a halt": (
        "Car|colliding with and both come to a halt|car||"
    ),
    "Putting [number of] [something] onto [something]": (
        "hand|putting onto|number of something, something||"
    ),
    "Putting [a pen], [a cup] and [a book] on the table": (
        "hand|putting, and on the table|a pen, a cup, a book||"
    ),
    "Poking [box] so it slightly moves": "hand|poking so it slightly moves|box||slightly",
    "Pretending to pick [cup] up": "hand|pretending to pick up|cup||",
    "Lifting [cup] up completely, then letting it drop down": (
        "hand|lifting up completely, then letting it drop down|cup||"
    ),
    "Dropping [coin] into [cup]": "hand|dropping into|coin, cup|down|",
    "Closing [something]": "hand|closing|something||",
    "[hand][opens][drawer][left][10 cm]": "hand|opens|drawer|left|10 cm",
    "A robot arm opens a door by its handle.": "A robot arm|opens|a door||",
    "a hand pushes a cup from left to right": "a hand|pushes|a cup|right|",
    "She raises the box with her left hand": "She|raises|the box|up|",
    "He slides the cup closer to the plate": "He|slides|the cup closer||",
    "The car moves towards the camera": "The car|moves||towards|",
    "Simmering": "|Simmering|||",
}


@pytest.mark.parametrize(("sentence", "slots"), READ.items())
def test_a_sentence_in_five_slots(sentence: str, slots: str) -> None:
    assert read_caption(sentence) == Phrase(*slots.split("|"))


@pytest.mark.parametrize("sentence", READ)
def test_the_label_holds_the_sentence_and_the_slots_that_are_read_again(sentence: str) -> None:
    (reply,) = TemplateDescriber().read([sentence])
    said = read_answer(reply.text)
    assert said == reply.text
    assert parse_reply(reply.text) == (read_caption(sentence), "slots")
    plain = " ".join(sentence.replace("[", " ").replace("]", " ").split())
    assert plain in reply.text or reply.text == sentence


def test_silence_is_null() -> None:
    silence = ["", " ", "null", "None.", "No significant action."]
    assert [reply.text for reply in TemplateDescriber().read(silence)] == ["null"] * 5


@pytest.mark.parametrize(
    "sentence",
    [
        "word " * 150,
        "Putting " + "[a very long name of a thing that is put somewhere else] " * 20,
        "moves {a} <answer>cup</answer> [left",
        "<think>a hand opens a door</think>",
        "I cannot open the door",
        "opens \x1b[31m the \u202edoor\n",
    ],
)
def test_hostile_sentences_become_readable_labels(sentence: str) -> None:
    (reply,) = TemplateDescriber().read([sentence])
    assert len(reply.text) <= MAX_TEXT
    found = parse_reply(str(read_answer(reply.text)))
    assert found.status == "slots"
    assert found.phrase is not None
    assert all(len(slot) <= MAX_SLOT for slot in found.phrase)
    assert "\x1b" not in reply.text


@pytest.mark.parametrize("template", templates._DIRECTIONS)
def test_every_direction_in_the_table_is_a_word_that_vectors_know(template: str) -> None:
    said = templates._DIRECTIONS[template]
    (way,) = {vocabulary.DIRECTIONS[word] for word in vocabulary.direction_words(said)}
    assert any(way)
    opposite = {"left": "right", "up": "down", "upwards": "downwards", "towards": "away from"}
    for one, two in opposite.items():  # where the opposite exists, it says the opposite
        words = template.split()
        other = template.replace(f"{one} to {two}", f"{two} to {one}")
        if other == template and one in words and f"turning the camera {one}" in template:
            other = template.replace(f"camera {one}", f"camera {two}")
        if other != template:
            turned = templates._DIRECTIONS[other]
            (back,) = {vocabulary.DIRECTIONS[w] for w in vocabulary.direction_words(turned)}
            assert back == tuple(-x for x in way)


@pytest.mark.parametrize(
    ("label", "direction"),
    [
        ("Pushing something from left to right", "right"),
        ("Pulling [something] from right to left", "left"),
        ("Moving something down", "down"),
        ("Dropping something onto something", ""),  # seen from above it goes elsewhere
        ("Turning the camera left while filming something", ""),  # of the camera or the picture?
        ("Moving something towards the camera", ""),
        ("Holding something", ""),
        ("", ""),
    ],
)
def test_the_truth_about_a_picture_is_what_the_template_says_of_it(
    label: str, direction: str
) -> None:
    assert direction_on_screen(label) == direction
