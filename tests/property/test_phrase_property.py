from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mapo_lightning.semantics.embed import HashedSlots
from mapo_lightning.semantics.factory import build_labeler
from mapo_lightning.semantics.phrase import (
    MAX_SLOT,
    SLOTS,
    Phrase,
    clean_text,
    format_phrase,
    parse_reply,
)
from mapo_lightning.semantics.settings import VlmConfig

WORD = st.text("abcdefghijklmnopqrstuvwxyz\u00e9\u4e2d0123456789", min_size=1, max_size=9)
SLOT = st.lists(WORD, min_size=1, max_size=6).map(" ".join)
PHRASES = st.builds(Phrase, *[SLOT] * len(SLOTS))
NASTY = st.text(max_size=400) | st.lists(
    st.sampled_from(
        ["[", "]", "{", "}", "null", '"', ":", ",", "\n", "**", "action", "left", "\x1b[1m"]
    )
    | st.text(max_size=8),
    max_size=60,
).map("".join)


@pytest.mark.slow
@settings(max_examples=300)
@given(NASTY)
@example("[" * 5000)
@example("{" * 3000)
@example('{"action":' * 1500 + "}" * 1500)
@example("\ud800[a][b]")
@example("[a][b" + "]" * 4000)
@example("9" * 4096 + "}")
def test_parse_never_throws_and_is_bounded(text: str) -> None:
    phrase, status = parse_reply(text)
    assert (phrase is None) == (status in ("null", "unreadable"))
    if phrase is not None:
        assert phrase.action
        for slot in phrase:
            assert len(slot) <= MAX_SLOT
            assert slot.isprintable()
        assert np.isfinite(HashedSlots().encode(phrase)).all()
    assert clean_text(text, 256).isprintable()


@pytest.mark.slow
@settings(max_examples=300)
@given(PHRASES)
def test_parse_after_format_is_the_identity(phrase: Phrase) -> None:
    nulls = {"null", "none", "na", "nil", "no action", "no significant action"}
    template = {"executing body", "action", "target object", "moving direction"}
    assume(not any(slot in nulls | template or len(slot) > MAX_SLOT for slot in phrase))
    assert parse_reply(format_phrase(phrase)) == (phrase, "slots")


@pytest.mark.slow
@settings(max_examples=100)
@given(PHRASES)
def test_vectors_are_bounded_and_repeat(phrase: Phrase) -> None:
    vector = HashedSlots().encode(phrase)
    assert np.linalg.norm(vector) <= len(SLOTS) ** 0.5 + 1e-5
    np.testing.assert_array_equal(vector, HashedSlots().encode(phrase))


@pytest.mark.slow
@settings(max_examples=15)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=10), st.data())
def test_labels_do_not_depend_on_how_requests_are_split(
    kinds: list[int], data: st.DataObject
) -> None:
    def window(kind: int) -> np.ndarray:
        film = np.random.default_rng(kind).integers(0, 255, (4, 64, 64, 3)).astype(np.uint8)
        shift = kind % 4
        return np.stack([np.roll(film[0], t * shift, axis=1) for t in range(4)])

    windows = [window(kind) for kind in kinds]
    cut = data.draw(st.integers(0, len(kinds)))
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        whole = build_labeler(VlmConfig(), Path(one), "w")
        split = build_labeler(VlmConfig(), Path(two), "w")
        together = whole.label_frames(windows, "x")
        parts = split.label_frames(windows[:cut], "x") + split.label_frames(windows[cut:], "x")
        assert whole.stats == split.stats
        whole.close()
        split.close()
    for a, b in zip(together, parts, strict=True):
        np.testing.assert_array_equal(a.vector, b.vector)
        assert a[1:] == b[1:]
