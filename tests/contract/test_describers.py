"""What holds for every describer; a new one adds one line to DESCRIBERS."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from mapo_lightning.semantics.describer import Describer, NullDescriber, Reply
from mapo_lightning.semantics.flow import FlowDescriber
from mapo_lightning.semantics.phrase import parse_reply
from mapo_lightning.types import Frames

DESCRIBERS = {
    "none": NullDescriber,
    "flow": FlowDescriber,
    "flow_coarse": lambda: FlowDescriber(min_percent=3.0, min_area=0.02),
}


@pytest.fixture(params=DESCRIBERS)
def describer(request: pytest.FixtureRequest) -> Describer:
    return DESCRIBERS[request.param]()


def clips() -> list[Frames]:
    """Windows of all shapes: sliding noise, one frame, two, tiny, large, black, a cut."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (96, 96, 3)).astype(np.uint8)
    slide = np.stack([np.roll(base, 3 * t, axis=1) for t in range(4)])
    cut = np.concatenate([slide[:2], 255 - slide[2:]])
    shapes = [(1, 64, 64, 3), (2, 64, 80, 3), (4, 16, 16, 3), (4, 300, 200, 3), (8, 64, 64, 3)]
    random = [rng.integers(0, 255, shape).astype(np.uint8) for shape in shapes]
    return [slide, cut, np.zeros((4, 64, 64, 3), np.uint8), *random]


def test_keeps_the_protocol(describer: Describer) -> None:
    assert isinstance(describer, Describer)
    assert describer.name
    assert isinstance(describer.in_worker, bool)


def test_one_readable_reply_per_clip(describer: Describer) -> None:
    replies = describer.describe(clips())
    assert len(replies) == len(clips())
    for reply in replies:
        assert isinstance(reply, Reply)
        assert parse_reply(reply.text).status != "unreadable"
        assert reply.hidden is None or reply.hidden.dtype == np.float16
    assert describer.describe([]) == []


def test_answers_repeat(describer: Describer) -> None:
    assert describer.describe(clips()) == describer.describe(clips())


def test_company_does_not_matter(describer: Describer) -> None:
    alone = [describer.describe([clip])[0] for clip in clips()]
    assert describer.describe(clips()) == alone
    assert describer.describe(clips()[::-1]) == alone[::-1]


def test_frames_are_left_alone(describer: Describer) -> None:
    shown = clips()
    for clip in shown:
        clip.setflags(write=False)
    describer.describe(shown)
    for clip, original in zip(shown, clips(), strict=True):
        np.testing.assert_array_equal(clip, original)


def test_layout_in_memory_does_not_matter(describer: Describer) -> None:
    turned = [np.asfortranarray(clip) for clip in clips()]
    assert describer.describe(turned) == describer.describe(clips())


def test_still_scene_is_null(describer: Describer) -> None:
    frame = np.random.default_rng(1).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    assert describer.describe([np.stack([frame] * 4)])[0].text == "null"


def test_travels_to_a_process(describer: Describer) -> None:
    replies = describer.describe(clips())  # after use, with whatever it has built inside
    copy = pickle.loads(pickle.dumps(describer))
    assert copy.name == describer.name
    assert copy.describe(clips()) == replies


def test_names_differ() -> None:
    assert len({make().name for make in DESCRIBERS.values()}) == len(DESCRIBERS)
