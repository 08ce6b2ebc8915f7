"""Servers that answer oddly, or not at all: what is stored, what is left out, what is said."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from label_servers import NONE, PHRASES, WHOLE, Running, clips, running
from strangers import listening

from mapo_lightning.semantics.chat_completion import read_usage
from mapo_lightning.semantics.describer import NoAnswer, Reply, Usage
from mapo_lightning.semantics.factory import build_labeler
from mapo_lightning.semantics.labeler import Labeler
from mapo_lightning.semantics.openai_server import OpenAIDescriber
from mapo_lightning.semantics.settings import ServerConfig, VlmConfig
from mapo_lightning.types import DescriberError

RED = np.full((4, 32, 32, 3), (255, 0, 0), np.uint8)


def config(server: Running, structured: str = "brackets", **words: Any) -> VlmConfig:
    settings = ServerConfig(server.url, retries=1, structured=structured)  # type: ignore[arg-type]
    return VlmConfig(kind="openai", server=settings, **words)


def labeler(server: Running, folder: Path, **words: Any) -> Labeler:
    return build_labeler(config(server, **words), folder, "w")


@pytest.mark.slow
@pytest.mark.parametrize("kind", WHOLE)
def test_an_answer_is_taken_from_where_it_is(kind: str, server: Running) -> None:
    right = OpenAIDescriber(config(server)).describe(clips(6))
    before = server.stats()["calls"]
    server.break_next(always=kind)
    assert OpenAIDescriber(config(server)).describe(clips(6)) == right
    assert server.stats()["calls"] - before == 6


@pytest.mark.slow
@pytest.mark.parametrize("kind", NONE)
def test_what_is_no_answer_is_asked_again_and_never_stored(
    kind: str, server: Running, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, once, never = clips(3)
    asking = labeler(server, tmp_path)
    (right,) = asking.label_frames([once], "v.mp4 frames 4..7 step 1")
    asking = labeler(server, tmp_path / "fresh")
    asking.label_frames([first], "v.mp4 frames 0..3 step 1")
    server.break_next(kind)  # once only: the second time there is an answer
    (label,) = asking.label_frames([once], "v.mp4 frames 4..7 step 1")
    assert (label.text, label.answered) == (right.text, True)
    before = server.stats()["calls"]
    server.break_next(always=kind)
    with caplog.at_level(logging.WARNING):
        (label,) = asking.label_frames([never], "v.mp4 frames 8..11 step 1")
    assert server.stats()["calls"] - before == 2
    assert (label.known, label.answered) == (False, False)
    assert len(asking.store.items()) == 2
    assert (asking.stats.asked, asking.stats.unanswered, asking.stats.unreadable) == (3, 1, 0)
    assert "no label of v.mp4 frames 8..11 step 1: " in caplog.text
    server.break_next()
    assert asking.label_frames([never], "v.mp4 frames 8..11 step 1")[0].answered


@pytest.mark.slow
def test_an_answer_that_is_cut_gets_more_room() -> None:
    with running(schema="ignored", needs=200) as server:
        replies = OpenAIDescriber(config(server, max_new_tokens=64)).describe(clips(4))
        assert all(isinstance(r, Reply) and r.text in PHRASES for r in replies)
        assert server.stats()["calls"] == 8
        assert server.stats()["room"] == 256
        replies = OpenAIDescriber(config(server, max_new_tokens=32)).describe(clips(4))
        cut = [NoAnswer("its answer is cut short")] * 4
        assert [r for r in replies if isinstance(r, NoAnswer)] == cut[: len(replies)]


def test_an_error_with_status_200_is_a_failure_in_the_servers_words(server: Running) -> None:
    asked = OpenAIDescriber(config(server))
    right = asked.describe(clips(2))
    server.break_next("error")
    assert asked.describe(clips(2)) == right
    server.break_next(*["error"] * 2)
    (reply, other) = asked.describe(clips(2))
    assert {type(reply), type(other)} <= {NoAnswer, Reply}
    failures = [r.reason for r in (reply, other) if isinstance(r, NoAnswer)]
    assert all("CUDA out of memory" in reason for reason in failures)


def test_a_server_that_breaks_on_a_schema_is_asked_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running(schema="breaks") as server:
        asked = OpenAIDescriber(config(server, structured="auto"))
        replies = asked.describe(clips(12))
        assert all(isinstance(r, Reply) and r.text in PHRASES for r in replies)
        assert server.stats()["calls"] == 12 + 2  # believed after the second time
        assert "HTTP 500: grammar backend: no module named 'xgrammar'" in caplog.text
        asked.describe(clips(5))
        assert server.stats()["calls"] == 12 + 2 + 5


def test_one_failure_with_a_schema_is_no_reason_to_do_without() -> None:
    with running(schema="offered") as server:
        settings = ServerConfig(server.url, concurrency=1)
        asked = OpenAIDescriber(VlmConfig(kind="openai", server=settings))
        asked.describe(clips(1))
        for _ in range(4):
            server.break_next("500")
            asked.describe(clips(2))  # the second one goes well
        (reply,) = asked.describe(clips(1))
        assert isinstance(reply, Reply)
        assert reply.text.startswith("{")


@pytest.mark.slow
@pytest.mark.parametrize("structured", ["auto", "brackets"])
@pytest.mark.parametrize("at", [0, 5])
def test_a_window_that_a_content_filter_rejects_costs_this_window(
    at: int, structured: str, server: Running, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    films = clips(9)
    films.insert(at, RED)
    asking = labeler(server, tmp_path, structured=structured)
    with caplog.at_level(logging.WARNING):
        labels = asking.label_frames(films, "v.mp4")
    assert [label.answered for label in labels] == [n != at for n in range(10)]
    assert asking.stats.unanswered == 1
    assert len(asking.store.items()) == 9
    assert "no label of v.mp4: the label server" in caplog.text
    assert "HTTP 400: the image was flagged by our content filter" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("status", ["400", "413", "422"])
def test_a_server_that_rejects_every_window_stops_the_job(status: str, server: Running) -> None:
    asked = OpenAIDescriber(config(server))
    server.break_next(always=status)
    with pytest.raises(DescriberError, match=rf"rejects the query \(HTTP {status}: fault {status}"):
        asked.describe(clips(3))
    server.break_next()
    asked.describe(clips(3))
    server.break_next(always=status)  # from now on, although it answered before
    with pytest.raises(DescriberError, match="rejects the query"):
        asked.describe(clips(40))


@pytest.mark.slow
def test_a_model_that_never_answers_stops_the_job(server: Running, tmp_path: Path) -> None:
    asking = labeler(server, tmp_path)
    server.break_next(always="only_thinks")
    with pytest.raises(DescriberError, match=r"answered none of 32 windows.*vlm\.max_new_tokens"):
        asking.label_frames(clips(50), "v.mp4")
    assert asking.store.items() == {}


def test_so_many_windows_are_named_and_the_others_counted(
    server: Running, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asking = labeler(server, tmp_path)
    asking.label_frames(clips(1), "v.mp4")
    server.break_next(always="sorry")
    with caplog.at_level(logging.WARNING):
        asking.label_frames(clips(40), "v.mp4")
    lines = [r.getMessage() for r in caplog.records if "no label of" in r.getMessage()]
    assert len(lines) == 20
    assert lines[-1].endswith("further ones are only counted")
    assert asking.stats.unanswered == 40


@pytest.mark.parametrize(
    ("usage", "found"),
    [
        ({"prompt_tokens": 900, "completion_tokens": 20}, Usage(1, 1, 900, 20)),
        ({"prompt_tokens": 900}, Usage(1)),
        ({"prompt_tokens": "900", "completion_tokens": -1}, Usage(1)),
        ([900, 20], Usage(1)),
        (None, Usage(1)),
    ],
)
def test_tokens_are_counted_where_they_are_reported(usage: object, found: Usage) -> None:
    assert read_usage({"choices": [], "usage": usage}) == found
    assert read_usage("<html>") == Usage(1)
    assert found.plus(found).since(found) == found


def test_frames_and_the_key_never_follow_a_redirection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAPO_VLM_API_KEY", "canary-key")
    with listening() as elsewhere, listening(redirect=elsewhere.url) as chosen:
        server = ServerConfig(f"{chosen.url}/v1", retries=0, on_outage="error")
        asked = OpenAIDescriber(VlmConfig(kind="openai", server=server))
        with pytest.raises(DescriberError, match="sends the query on to another address"):
            asked.describe(clips(1))
        assert chosen.seen
        (_, sent), *_ = chosen.seen
        assert "canary-key" in sent
        assert "data:image/jpeg;base64," in sent  # the frames themselves, never an address
        assert (elsewhere.connections, elsewhere.seen) == (0, [])
