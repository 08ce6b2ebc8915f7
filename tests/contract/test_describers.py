"""What holds for every describer; a new one adds one entry to DESCRIBERS."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from label_servers import Running, running
from tiny_models import save_qwen

from mapo_lightning.semantics.describer import (
    Describer,
    NullDescriber,
    Reply,
    StreamingDescriber,
)
from mapo_lightning.semantics.flow import FlowDescriber
from mapo_lightning.semantics.in_process import InProcessDescriber
from mapo_lightning.semantics.measured_direction import fill_direction
from mapo_lightning.semantics.openai_server import OpenAIDescriber
from mapo_lightning.semantics.phrase import parse_reply
from mapo_lightning.semantics.settings import ServerConfig, VlmConfig
from mapo_lightning.semantics.templates import TemplateDescriber
from mapo_lightning.types import Frames


@dataclass(frozen=True)
class Places:
    """What describers are built from."""

    model: Path
    """Folder of a tiny Qwen2.5-VL."""
    server: Running


@dataclass(frozen=True)
class Entry:
    """A describer, and where the contract lets it differ from others."""

    make: Callable[[Places], Describer]
    still_is_null: bool
    """It measures motion, so a still scene is null; a language model says what it likes."""
    hidden_dim: int | None = None
    """Width of the hidden state it gives, which may differ by a few ulps between batches."""
    in_worker: bool = True
    streams: bool = False
    """It waits for a server, and hands over answers as they arrive."""


def qwen(places: Places) -> Describer:
    return InProcessDescriber(
        VlmConfig(kind="transformers", model=str(places.model), max_new_tokens=8, batch_size=3)
    )


def server(places: Places) -> Describer:
    return OpenAIDescriber(VlmConfig(kind="openai", server=ServerConfig(places.server.url)))


DESCRIBERS = {
    "none": Entry(lambda _: NullDescriber(), still_is_null=True),
    "flow": Entry(lambda _: FlowDescriber(), still_is_null=True),
    "flow_coarse": Entry(lambda _: FlowDescriber(3.0, min_area=0.02), still_is_null=True),
    "templates": Entry(lambda _: TemplateDescriber(), still_is_null=True),
    "transformers": Entry(qwen, still_is_null=False, hidden_dim=64, in_worker=False),
    "openai": Entry(server, still_is_null=False, streams=True),
    "transformers_flow": Entry(
        lambda places: fill_direction(qwen(places), FlowDescriber()),
        still_is_null=False,
        hidden_dim=64,
        in_worker=False,
    ),
    "openai_flow": Entry(
        lambda places: fill_direction(server(places), FlowDescriber()),
        still_is_null=False,
        streams=True,
    ),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    with running() as server:
        yield Places(save_qwen(tmp_path_factory.mktemp("qwen")), server)


@pytest.fixture(params=DESCRIBERS)
def entry(request: pytest.FixtureRequest) -> Entry:
    return DESCRIBERS[request.param]


@pytest.fixture
def describer(entry: Entry, places: Places) -> Describer:
    return entry.make(places)


def clips() -> list[Frames]:
    """Windows of all shapes: sliding noise, one frame, two, tiny, large, black, a cut."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (96, 96, 3)).astype(np.uint8)
    slide = np.stack([np.roll(base, 3 * t, axis=1) for t in range(4)])
    cut = np.concatenate([slide[:2], 255 - slide[2:]])
    shapes = [(1, 64, 64, 3), (2, 64, 80, 3), (4, 16, 16, 3), (4, 300, 200, 3), (8, 64, 64, 3)]
    random = [rng.integers(0, 255, shape).astype(np.uint8) for shape in shapes]
    return [slide, cut, np.zeros((4, 64, 64, 3), np.uint8), *random]


def assert_same(found: Sequence[Reply], wanted: Sequence[Reply]) -> None:
    """The same words, and the same hidden states but for the rounding of half precision."""
    assert [reply.text for reply in found] == [reply.text for reply in wanted]
    for one, two in zip(found, wanted, strict=True):
        assert (one.hidden is None) == (two.hidden is None)
        if one.hidden is not None and two.hidden is not None:
            ulp = float(np.finfo(np.float16).eps) * float(np.abs(two.hidden).max())
            np.testing.assert_allclose(one.hidden, two.hidden, rtol=0.0, atol=4 * ulp)


def test_keeps_the_protocol(describer: Describer, entry: Entry) -> None:
    assert isinstance(describer, Describer)
    assert isinstance(describer, StreamingDescriber) == entry.streams
    assert describer.name
    assert describer.in_worker is entry.in_worker


@pytest.mark.slow
def test_one_readable_reply_per_clip(describer: Describer, entry: Entry) -> None:
    replies = describer.describe(clips())
    assert len(replies) == len(clips())
    for reply in replies:
        assert isinstance(reply, Reply)
        assert parse_reply(reply.text).status != "unreadable"
        if entry.hidden_dim is None:
            assert reply.hidden is None
        else:
            assert reply.hidden is not None
            assert reply.hidden.dtype == np.float16
            assert reply.hidden.shape == (entry.hidden_dim,)
            assert np.isfinite(reply.hidden).all()
    assert list(describer.describe([])) == []


@pytest.mark.slow
def test_answers_repeat(describer: Describer) -> None:
    assert_same(describer.describe(clips()), describer.describe(clips()))


@pytest.mark.slow
def test_company_does_not_matter(describer: Describer) -> None:
    alone = [describer.describe([clip])[0] for clip in clips()]
    assert_same(describer.describe(clips()), alone)
    assert_same(describer.describe(clips()[::-1]), alone[::-1])


@pytest.mark.slow
def test_frames_are_left_alone(describer: Describer) -> None:
    shown = clips()
    for clip in shown:
        clip.setflags(write=False)
    describer.describe(shown)
    for clip, original in zip(shown, clips(), strict=True):
        np.testing.assert_array_equal(clip, original)


@pytest.mark.slow
def test_layout_in_memory_does_not_matter(describer: Describer) -> None:
    turned = [np.asfortranarray(clip) for clip in clips()]
    assert_same(describer.describe(turned), describer.describe(clips()))


@pytest.mark.slow
def test_still_scene_is_null_where_motion_is_measured(describer: Describer, entry: Entry) -> None:
    frame = np.random.default_rng(1).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    (reply,) = describer.describe([np.stack([frame] * 4)])
    allowed = {"null"} if entry.still_is_null else {"null", "slots", "prose"}
    assert parse_reply(reply.text).status in allowed


def test_streams_every_window_once(describer: Describer, entry: Entry) -> None:
    if not entry.streams:
        assert not hasattr(describer, "describe_each")
        return
    assert isinstance(describer, StreamingDescriber)
    assert describer.concurrency >= 1
    groups = list(describer.describe_each(clips()))
    assert sum(map(len, groups)) == len(clips())
    replies = {number: reply for group in groups for number, reply in group.items()}
    in_order = [replies[number] for number in range(len(clips()))]
    assert in_order == list(describer.describe(clips()))


@pytest.mark.slow
def test_travels_to_a_process(describer: Describer) -> None:
    replies = describer.describe(clips())  # after use, with whatever it has built inside
    copy = pickle.loads(pickle.dumps(describer))
    assert copy.name == describer.name
    assert_same(copy.describe(clips()), replies)


def test_names_differ(places: Places) -> None:
    assert len({each.make(places).name for each in DESCRIBERS.values()}) == len(DESCRIBERS)
