"""``vlm.direction=flow``: the model says who does what, the flow of the frames where it goes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from label_servers import running
from replies import HOSTILE
from scenes import moving_square, still

from mapo_lightning.config.compose import compose
from mapo_lightning.run.config import RunConfig
from mapo_lightning.semantics.describer import Metered, NoAnswer, Reply, StreamingDescriber
from mapo_lightning.semantics.embed import HashedSlots
from mapo_lightning.semantics.factory import build_describer, build_labeler
from mapo_lightning.semantics.flow import FlowDescriber
from mapo_lightning.semantics.labeler import Label, Labeler
from mapo_lightning.semantics.measured_direction import (
    MeasuredDirection,
    StreamingMeasuredDirection,
    fill_direction,
)
from mapo_lightning.semantics.openai_server import OpenAIDescriber
from mapo_lightning.semantics.phrase import Phrase, parse_reply
from mapo_lightning.semantics.server_pool import OutageLog
from mapo_lightning.semantics.settings import ServerConfig, VlmConfig
from mapo_lightning.semantics.store import LabelStore
from mapo_lightning.types import ConfigError, DescriberError, Frames

UP = 6  # of scenes.WAYS
STATE = np.ones(3, np.float16)


class Says:
    """A model that says the same about everything."""

    name, in_worker = "says", False

    def __init__(self, *replies: str | NoAnswer) -> None:
        self.replies = replies

    def describe(self, clips: Sequence[Frames]) -> list[Reply | NoAnswer]:
        return [r if isinstance(r, NoAnswer) else Reply(r, STATE) for r in self.replies]


def moving() -> Frames:
    return moving_square(np.random.default_rng(0), UP, 12.0)


def label(tmp_path: Path, reply: str | NoAnswer, clip: Frames) -> Label:
    describer = fill_direction(Says(reply), FlowDescriber())
    store = LabelStore(tmp_path / "store", "w", durable=False)
    (found,) = Labeler(describer, store, HashedSlots()).label_frames([clip], "v.mp4")
    return found


@pytest.mark.parametrize(
    ("reply", "who"),
    [
        ("[robot][lowers][cup][right][5 cm]", ("robot", "lowers", "cup")),
        ("[robot][holds][cup][null][null]", ("robot", "holds", "cup")),  # it named neither
        ('{"body": "the [left] arm", "action": "opens"}', ("the [left] arm", "opens", "")),
        ("A hand pushes the ball to the right by 5 cm.", ("A hand", "pushes", "the ball")),
        ("<think>[a][b][c][d][e]</think>[robot][moves][cup][left][]", ("robot", "moves", "cup")),
    ],
)
def test_who_does_what_is_the_models_and_where_is_measured(
    tmp_path: Path, reply: str, who: tuple[str, ...]
) -> None:
    found = label(tmp_path, reply, moving())
    assert found.phrase is not None
    assert found.phrase[:3] == who
    assert found.phrase.direction == "up"
    assert found.phrase.displacement.endswith("percent of the frame width")
    assert found.status == ("prose" if reply.startswith("A hand") else "slots")
    assert found.text == reply.rpartition("</think>")[2]  # what the model itself has said
    (stored,) = LabelStore(tmp_path / "store", "r").items().values()
    assert stored.phrase == found.phrase
    np.testing.assert_array_equal(stored.hidden, STATE)


def test_a_motion_that_cannot_be_measured_is_not_claimed(tmp_path: Path) -> None:
    found = label(tmp_path, "[robot][holds][cup][right][5 cm]", still(np.random.default_rng(0), 2))
    assert found.phrase == Phrase("robot", "holds", "cup", "", "")
    assert found.known


@pytest.mark.parametrize(
    ("reply", "status"), [("null", "null"), ("There is no significant action.", "null")]
)
def test_whether_something_happens_is_for_the_model_to_say(
    tmp_path: Path, reply: str, status: str
) -> None:
    found = label(tmp_path, reply, moving())
    assert (found.known, found.status, found.phrase) == (False, status, None)


@pytest.mark.parametrize("reply", [NoAnswer("shy"), "<think>hm", "I'm sorry, I can't.", "[a][b"])
def test_no_answer_stays_none(tmp_path: Path, reply: str | NoAnswer) -> None:
    found = label(tmp_path, reply, moving())
    assert not found.answered
    assert not found.known


def test_strange_replies_are_known_exactly_where_the_model_is(tmp_path: Path) -> None:
    clips = [moving()] * len(HOSTILE)
    replies = fill_direction(Says(*HOSTILE), FlowDescriber()).describe(clips)
    for text, reply in zip(HOSTILE, replies, strict=True):
        assert isinstance(reply, Reply)
        assert reply.text == text
        if reply.phrase is not None:
            said = parse_reply(text).phrase
            assert said is None or reply.phrase[:3] == said[:3]
            assert reply.phrase.direction == "up"
    assert sum(reply.phrase is not None for reply in replies) > 10


def test_a_describer_that_miscounts_is_named(tmp_path: Path) -> None:
    describer = fill_direction(Says("null", "null"), FlowDescriber())
    labeler = Labeler(describer, LabelStore(tmp_path, "w"), HashedSlots())
    with pytest.raises(DescriberError, match=r"'says direction flow-v1 .*2 replies for 1 windows"):
        labeler.label_frames([moving()], "v.mp4")


@pytest.mark.slow
def test_answers_of_a_server_are_completed_as_they_arrive(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running() as server:
        cfg = VlmConfig(kind="openai", direction="flow", server=ServerConfig(server.url))
        describer = build_describer(cfg)
        assert isinstance(describer, StreamingDescriber)
        assert isinstance(describer, StreamingMeasuredDirection)
        assert describer.concurrency == cfg.server.concurrency
        clips = [np.roll(moving(), n, axis=2) for n in range(12)]
        with caplog.at_level(logging.WARNING):
            groups = list(describer.describe_each(clips))
        found = {number: reply for group in groups for number, reply in group.items()}
        assert sorted(found) == list(range(12))
        phrases = [reply.phrase for reply in found.values() if isinstance(reply, Reply)]
        assert {phrase.direction for phrase in phrases if phrase} == {"up"}
        assert {"hand", "A cat"} >= {phrase.body for phrase in phrases if phrase}
        # Who measures the cost is told that of the model: 9 tokens in by that server's account.
        assert isinstance(describer, Metered)
        assert describer.usage[:3] == (12, 12, 12 * 9)
        # Who stops listening stops the queries as well.
        answers = describer.describe_each(clips)
        next(iter(answers))
        answers.close()  # type: ignore[attr-defined]
        assert describer.model._pool is not None  # type: ignore[attr-defined]
        describer.model._pool.shutdown(wait=True)  # type: ignore[attr-defined]


def test_labels_of_either_kind_are_kept_apart(tmp_path: Path) -> None:
    server = ServerConfig("http://127.0.0.1:9/v1")
    plain = build_describer(VlmConfig(kind="openai", server=server))
    filled = build_describer(VlmConfig(kind="openai", server=server, direction="flow"))
    coarse = VlmConfig(kind="openai", server=server, direction="flow", flow_min_percent=3.0)
    names = {plain.name, filled.name, build_describer(coarse).name}
    assert len(names) == 3
    assert filled.name.startswith(plain.name)


def test_outages_are_logged_in_the_store(tmp_path: Path) -> None:
    server = ServerConfig("http://127.0.0.1:9/v1")
    cfg = VlmConfig(kind="openai", server=server, direction="flow")
    describer = build_labeler(cfg, tmp_path, "w").describer
    assert isinstance(describer, MeasuredDirection)
    assert isinstance(describer.model, OpenAIDescriber)
    assert isinstance(describer.model.outage, OutageLog)
    assert describer.model.outage.stamp == tmp_path / "labels" / "outage"


@pytest.mark.parametrize("kind", ["flow", "none", "templates"])
def test_there_must_be_a_model_to_complete(root: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"^vlm\.direction must be model with kind={kind}"):
        compose([f"vlm={kind}", "vlm.direction=flow"], RunConfig, root / "conf")
