from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from mapo_lightning.semantics.embed import Encoder, HashedSlots, HiddenState, WithDirection
from mapo_lightning.semantics.phrase import Phrase
from mapo_lightning.types import ConfigError, DescriberError

BASE = Phrase("robot arm", "lifts", "black box", "up", "10 cm")


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def direction(text: str) -> np.ndarray:
    return HashedSlots().encode(Phrase("", "", "", text, ""))


def amount(text: str) -> np.ndarray:
    return HashedSlots().encode(Phrase("", "", "", "", text))


def test_shape_and_bounds() -> None:
    encoder = HashedSlots(dim_per_slot=32)
    vector = encoder.encode(BASE)
    assert isinstance(encoder, Encoder)
    assert (vector.shape, vector.dtype) == ((encoder.semantic_dim,), np.float32)
    assert encoder.semantic_dim == 160
    assert 1.0 < np.linalg.norm(vector) <= 5**0.5 + 1e-5
    assert not HashedSlots().encode(Phrase("", "", "", "", "")).any()


def test_result_is_a_copy() -> None:
    first = HashedSlots().encode(BASE)
    first[:] = 9
    assert HashedSlots().encode(BASE).max() < 2


def test_same_in_another_process() -> None:
    code = (
        "from mapo_lightning.semantics.embed import HashedSlots\n"
        "from mapo_lightning.semantics.phrase import Phrase\n"
        f"print(HashedSlots().encode({BASE!r}).tobytes().hex())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == HashedSlots().encode(BASE).tobytes().hex()


def test_word_forms_case_and_articles_do_not_matter() -> None:
    same = Phrase("The Robot arm", "lifting", "a black box", "Up", "10 cm")
    np.testing.assert_array_equal(HashedSlots().encode(same), HashedSlots().encode(BASE))


def test_other_words_differ() -> None:
    other = BASE._replace(target="door")
    assert cosine(HashedSlots().encode(other), HashedSlots().encode(BASE)) < 0.9


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("left", "right"),
        ("up", "downwards"),
        ("upper left", "lower right"),
        ("towards the camera", "away from the camera"),
        ("clockwise", "counter-clockwise"),
    ],
)
def test_opposite_directions(one: str, other: str) -> None:
    assert cosine(direction(one), direction(other)) < -0.2
    axis = 3 * 64
    np.testing.assert_allclose(
        direction(one)[axis : axis + 4], -direction(other)[axis : axis + 4], atol=1e-6
    )


def test_ways_of_saying_a_direction_agree() -> None:
    np.testing.assert_allclose(direction("towards the right")[192:196], direction("right")[192:196])
    assert cosine(direction("upper right"), direction("right")) > 0.3


def test_near_amounts_are_near() -> None:
    ten, twelve, ninety = (amount(f"{n} percent of the frame") for n in (10, 12, 90))
    assert np.linalg.norm(ten - twelve) < 0.3 * np.linalg.norm(ten - ninety)
    assert np.linalg.norm(amount("10 degrees") - ten) > 0.3
    assert amount("two meters")[4 * 64] == pytest.approx(amount("2 meters")[4 * 64])


def test_narrow_slots_are_refused() -> None:
    with pytest.raises(ConfigError, match="dim_per_slot must be at least 16, got 8"):
        HashedSlots(8)


def test_hidden_state_is_scaled() -> None:
    hidden = np.random.default_rng(0).normal(0, 30, 48).astype(np.float16)
    vector = HiddenState(48).encode(BASE, hidden)
    assert vector.dtype == np.float32
    assert float(np.sqrt(np.mean(vector**2))) == pytest.approx(1.0, abs=1e-3)
    assert cosine(vector, hidden.astype(np.float32)) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("hidden", [None, np.zeros(3, np.float16), np.full(48, np.nan, np.float16)])
def test_wrong_hidden_state_is_refused(hidden: np.ndarray | None) -> None:
    with pytest.raises(DescriberError, match="hidden state"):
        HiddenState(48).encode(BASE, hidden)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("left", "right"),
        ("to the upper left", "to the lower right"),
        ("towards the camera", "away from the camera"),
        ("clockwise", "counter-clockwise"),
    ],
)
@pytest.mark.parametrize("displacement", ["", "5 cm", "200 percent of its size"])
def test_joined_directions_stay_apart_where_the_encoder_sees_no_difference(
    one: str, other: str, displacement: str
) -> None:
    # The worst case: the same hidden state for both.
    hidden = np.random.default_rng(0).normal(size=3584).astype(np.float16)
    encoder = WithDirection(HiddenState(3584))
    assert isinstance(encoder, Encoder)
    there, back = (
        encoder.encode(BASE._replace(direction=way, displacement=displacement), hidden)
        for way in (one, other)
    )
    assert there.shape == (3592,) == (encoder.semantic_dim,)
    assert there.dtype == np.float32
    assert cosine(there, back) <= 0.2 + 1e-6
    assert np.sqrt(np.mean(there**2)) <= 1.0  # as loud as the hidden state alone


def test_joined_vector_is_the_encoders_and_eight_entries() -> None:
    hidden = np.ones(4, np.float16)
    encoder = WithDirection(HiddenState(4))
    up = encoder.encode(Phrase("hand", "lifts", "cup", "up", ""), hidden)
    np.testing.assert_allclose(up[:4], np.sqrt(0.5) * np.ones(4), atol=1e-6)
    np.testing.assert_allclose(up[4:8], [0.0, np.sqrt(0.4 * 4), 0.0, 0.0], atol=1e-6)
    assert not up[8:].any()
    nowhere = encoder.encode(Phrase("hand", "holds", "cup", "", ""), hidden)
    np.testing.assert_array_equal(nowhere[:4], up[:4])
    assert not nowhere[4:].any()
    near, far = (
        encoder.encode(Phrase("hand", "lifts", "cup", "up", far), hidden)
        for far in ("5 percent", "50 percent")
    )
    assert far[8] > near[8] > 0.0
    with pytest.raises(DescriberError, match="a hidden state of width 4 is needed"):
        encoder.encode(BASE, None)
