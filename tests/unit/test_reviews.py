from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mapo_lightning.semantics.describer import Reply
from mapo_lightning.semantics.embed import HashedSlots
from mapo_lightning.semantics.factory import build_labeler
from mapo_lightning.semantics.labeler import Labeler, frames_identity, label_key
from mapo_lightning.semantics.phrase import Phrase
from mapo_lightning.semantics.reviews import FORMAT, Reviews, read_reviews
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.semantics.store import LabelStore, StoredLabel
from mapo_lightning.types import ConfigError, Frames

KEYS = ["0" * 31 + digit for digit in "123"]


def write(folder: Path, *rows: tuple[str, str], **change: Any) -> str:
    marks = [{"key": key, "mark": mark, "video": "v.mp4"} for key, mark in rows]
    path = folder / "reviews.json"
    path.write_text(json.dumps({"format": FORMAT, "marks": marks} | change))
    return str(path)


def test_reviews_are_read_as_written(tmp_path: Path) -> None:
    path = write(tmp_path, (KEYS[0], "accept"), (KEYS[1], "reject"), (KEYS[2], "reject"))
    found = read_reviews(path)
    assert found[:3] == (frozenset(KEYS[:1]), frozenset(KEYS[1:]), {})
    assert found.row(KEYS[0]) == {"key": KEYS[0], "mark": "accept", "video": "v.mp4"}
    assert found.row("0" * 32) == {}
    assert read_reviews("") == Reviews()


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        (None, "FileNotFoundError"),
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"format": "other", "marks": []}', "its format is 'other'"),
        (json.dumps({"format": FORMAT}), "KeyError"),
        (json.dumps({"format": FORMAT, "marks": [{"key": "../x", "mark": "reject"}]}), "'../x'"),
        (json.dumps({"format": FORMAT, "marks": [{"key": KEYS[0], "mark": "eval"}]}), "eval"),
        ("[" * 100_000, "RecursionError"),
    ],
)
def test_what_is_not_reviews_is_refused(content: str | None, finding: str, tmp_path: Path) -> None:
    path = tmp_path / "reviews.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"reviews\.json.*export them from the gallery") as raised:
        read_reviews(str(path))
    assert finding in str(raised.value)


WORDS = ["a hand", "lifts", "a cup", "up", "10 cm"]


def corrected(folder: Path, slots: object, **more: Any) -> str:
    row = {"key": KEYS[0], "mark": "correct", "slots": slots, **more}
    path = folder / "reviews.json"
    path.write_text(json.dumps({"format": FORMAT, "marks": [row]}))
    return str(path)


def test_corrected_words_are_read_and_say_who_wrote_them(tmp_path: Path) -> None:
    more = {"was": ["x"] * 5, "by": "Ada\x1b[31m", "at": "2026-11-28T12:00:00Z", "frames": 3}
    found = read_reviews(corrected(tmp_path, [*WORDS[:4], "10\x00 cm\n"], **more))
    assert found.corrected == {KEYS[0]: Phrase(*WORDS)}
    assert found.row(KEYS[0]) == {
        "key": KEYS[0], "mark": "correct", "slots": WORDS, "by": "Ada",
        "at": "2026-11-28T12:00:00Z", "was": ["x"] * 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("slots", "finding"),
    [
        (WORDS[:4], "has not 5 slots"),
        ("hand", "has not 5 slots"),
        ([*WORDS[:4], 7], "is no text"),
        (["", " ", "", "", ""], "is empty: reject it instead"),
    ],
)
def test_corrected_words_that_are_none_are_refused(
    slots: object, finding: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=finding):
        read_reviews(corrected(tmp_path, slots))


def test_corrected_words_train_in_place_of_the_answer(tmp_path: Path) -> None:
    windows = [np.full((4, 8, 8, 3), value, np.uint8) for value in (1, 2)]
    key = label_key("moves", frames_identity(windows[0]))
    reviews = Reviews(corrected={key: Phrase(*WORDS)})
    asking = Labeler(Moves(), LabelStore(tmp_path, "w"), HashedSlots(), reviews)
    for _ in range(2):  # fresh, and from the store, which is not changed
        first, second = asking.label_frames(windows, "x")
        assert (first.phrase, first.corrected, first.known) == (Phrase(*WORDS), True, True)
        assert (first.vector == HashedSlots().encode(Phrase(*WORDS))).all()
        assert first.text.startswith("[hand][moves][cup][left]")
        assert not second.corrected
    assert asking.stats.corrected == 2


def test_a_null_answer_can_be_corrected_and_a_hidden_state_cannot(tmp_path: Path) -> None:
    path = corrected(tmp_path, WORDS)
    labeler = build_labeler(VlmConfig(reviews=path), tmp_path, "w")
    label = labeler._embed(KEYS[0], StoredLabel("null", "null", None, None, "d", "s"))
    assert (label.phrase, label.known, label.status) == (Phrase(*WORDS), True, "slots")
    with pytest.raises(ConfigError, match="hidden states, which no person can correct"):
        build_labeler(VlmConfig("transformers", hidden_dim=8, reviews=path), tmp_path, "w")


def test_a_label_cannot_be_both(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"accepts and rejects the label {KEYS[0]}"):
        read_reviews(write(tmp_path, (KEYS[0], "accept"), (KEYS[0], "reject")))


class Moves:
    name, in_worker = "moves", True

    def describe(self, clips: Sequence[Frames]) -> list[Reply]:
        return [Reply(f"[hand][moves][cup][left][{clip.flat[0]} cm]") for clip in clips]


def test_a_rejected_label_is_null_for_training_and_stays_in_the_store(tmp_path: Path) -> None:
    windows = [np.full((4, 8, 8, 3), value, np.uint8) for value in (1, 2, 3)]
    keys = [label_key("moves", frames_identity(window)) for window in windows]
    reviews = Reviews(accepted=frozenset(keys[:1]), rejected=frozenset(keys[1:2]))
    asking = Labeler(Moves(), LabelStore(tmp_path, "w"), HashedSlots(), reviews)
    for _ in range(2):  # fresh, and from the store
        labels = asking.label_frames(windows, "x")
        assert [label.known for label in labels] == [True, False, True]
        assert not labels[1].vector.any()
        assert labels[1].status == "null"
    assert asking.stats.rejected == 2
    assert asking.stats.null == 2
    assert asking.store.items()[keys[1]].phrase is not None
    free = Labeler(Moves(), LabelStore(tmp_path, "w2"), HashedSlots())
    assert all(label.known for label in free.label_frames(windows, "x"))
    assert free.stats.asked == 0


def test_a_run_reads_its_reviews(tmp_path: Path) -> None:
    path = write(tmp_path, (KEYS[0], "reject"))
    assert build_labeler(VlmConfig(reviews=path), tmp_path, "w").reviews.rejected == {KEYS[0]}
    with pytest.raises(ConfigError, match="nowhere"):
        build_labeler(VlmConfig(reviews=str(tmp_path / "nowhere")), tmp_path, "w")
