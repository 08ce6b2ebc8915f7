from __future__ import annotations

import logging
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from label_servers import PHRASES, Running, clips, running

from mapo_lightning.semantics import server_pool as servers
from mapo_lightning.semantics.describer import NoAnswer, StreamingDescriber
from mapo_lightning.semantics.openai_server import OpenAIDescriber
from mapo_lightning.semantics.phrase import parse_reply
from mapo_lightning.semantics.server_pool import OutageLog, Server, ServerPool, as_they_come
from mapo_lightning.semantics.settings import ServerConfig, VlmConfig
from mapo_lightning.types import ConfigError, DescriberError

NOWHERE = "http://127.0.0.1:9/v1"  # the discard port: nobody listens


def describer(
    *urls: str, clock: Callable[[], float] = time.monotonic, **words: Any
) -> OpenAIDescriber:
    settings = {"retries": 3} | words
    server = ServerConfig(",".join(urls), **settings)
    return OpenAIDescriber(VlmConfig(kind="openai", server=server), clock)


@pytest.mark.slow
def test_answers_come_in_order_and_repeat(server: Running) -> None:
    asked = describer(server.url)
    assert isinstance(asked, StreamingDescriber)
    films = clips(20)
    first = asked.describe(films)
    assert {reply.text for reply in first} <= set(PHRASES)
    assert len({reply.text for reply in first}) > 2
    assert describer(server.url, concurrency=1).describe(films[::-1]) == first[::-1]
    assert pickle.loads(pickle.dumps(asked)).describe(films[:2]) == first[:2]
    assert asked.describe([]) == []


@pytest.mark.slow
@pytest.mark.parametrize(("schema", "extra"), [("offered", 0), ("ignored", 0), ("refused", 1)])
def test_schema_is_tried_once_and_what_works_is_remembered(schema: str, extra: int) -> None:
    with running(schema=schema) as server:
        replies = describer(server.url).describe(clips(12))
        assert server.stats()["calls"] == 12 + extra
        assert all(reply.text.startswith("{") for reply in replies) == (schema == "offered")
        assert all(parse_reply(reply.text).status != "unreadable" for reply in replies)
        off = describer(server.url, structured="brackets").describe(clips(12))
        assert server.stats()["calls"] == 24 + extra
        if schema != "offered":
            assert off == replies


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["429", "500", "503", "cut", "garbage", "empty"])
def test_queries_that_fail_are_sent_again(server: Running, fault: str) -> None:
    films = clips(6)
    asked = describer(server.url)
    right = asked.describe(films)
    before = server.stats()["calls"]
    server.break_next(fault, fault)
    assert asked.describe(films) == right
    assert server.stats()["calls"] == before + 6 + 2


def test_a_query_without_an_answer_in_time_is_sent_again(server: Running) -> None:
    (right,) = describer(server.url).describe(clips(1))
    before = server.stats()["calls"]
    server.break_next("silent")
    assert describer(server.url, timeout_seconds=1.0).describe(clips(1)) == [right]
    assert server.stats()["calls"] - before >= 2


def test_what_a_server_asks_for_is_respected(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = describer(server.url, concurrency=1)
    asked.describe(clips(1))
    server.break_next("429", "429")
    paused: list[float] = []
    pause = ServerPool.pause

    def noted(pool: ServerPool, one: Server, seconds: float) -> None:
        paused.append(seconds)
        pause(pool, one, seconds)

    monkeypatch.setattr(ServerPool, "pause", noted)
    asked.describe(clips(1))
    assert paused == [0.3, 0.3]
    assert not asked._servers.is_out


def test_a_paused_server_gets_no_query_before_its_time() -> None:
    now = [100.0]
    pool = ServerPool(["a"], lambda: now[0])
    server = pool.pick()
    assert server is not None
    pool.pause(server, 5.0)
    now[0] += 4.9
    assert pool.pick() is None
    now[0] += 0.2
    assert pool.pick() is server


def test_window_that_only_fails_is_left_out(server: Running) -> None:
    white = np.full((4, 32, 32, 3), 255, np.uint8)
    replies = describer(server.url, retries=1).describe([*clips(3), white, *clips(9)])
    assert [isinstance(reply, NoAnswer) for reply in replies] == [n == 3 for n in range(13)]
    assert replies[3] == NoAnswer(
        "2 attempts failed, the last with HTTP 500: white pictures make this model stumble"
    )


@pytest.mark.parametrize("fault", ["400", "401", "404"])
def test_refusal_stops_with_a_sentence_and_without_the_key(
    server: Running, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAPO_VLM_API_KEY", "very-secret")
    server.break_next(*[fault] * 4)
    with pytest.raises(DescriberError, match=rf"rejects the query \(HTTP {fault}") as caught:
        describer(server.url, concurrency=1).describe(clips(1))
    assert "very-secret" not in str(caught.value)
    assert server.stats()["keys"] == ["Bearer very-secret"]


def test_key_stays_out_of_name_and_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret")
    asked = describer(NOWHERE)
    assert "very-secret" not in asked.name
    assert b"very-secret" not in pickle.dumps(asked)


@pytest.mark.slow
def test_pool_shares_work_and_opens_the_circuit_of_the_dead(server: Running) -> None:
    with running(seconds=0.02, schema="ignored") as other:
        before = server.stats()["answered"]
        asked = describer(NOWHERE, server.url, other.url)
        assert asked.describe(clips(30)) == describer(server.url).describe(clips(30))
        assert other.stats()["answered"] > 3
        assert server.stats()["answered"] - before > 33
        other.kill()
        assert len(asked.describe(clips(10))) == 10


def test_outage_waits_for_the_server(caplog: pytest.LogCaptureFixture) -> None:
    with running(schema="ignored") as server:
        asked = describer(server.url)
        right = asked.describe(clips(4))
        server.kill()
        noticed, notice = threading.Event(), logging.Handler()
        notice.emit = lambda record: noticed.set()  # type: ignore[method-assign]
        repair = threading.Thread(target=lambda: noticed.wait() and server.start(server.port))
        repair.start()
        servers.log.addHandler(notice)
        with caplog.at_level(logging.WARNING):
            found = [item for group in asked.describe_each(clips(4)) for item in group.items()]
        servers.log.removeHandler(notice)
        repair.join()
        assert [reply for _, reply in sorted(found)] == right
    lines = [record.getMessage() for record in caplog.records]
    assert sum("no label server answers" in line for line in lines) == 1
    assert sum("servers answer again after" in line for line in lines) == 1


def test_outage_gives_none_at_once_and_recovers() -> None:
    now = [0.0]
    with running(schema="ignored") as server:
        asked = describer(server.url, on_outage="skip", clock=lambda: now[0])
        right = asked.describe(clips(4))
        server.kill()
        # Its clock stands still, so it cannot wait.
        assert asked.describe(clips(4)) == [NoAnswer("no label server answers", outage=True)] * 4
        server.start(server.port)
        now[0] += 60.0
        asked.describe(clips(1))  # a server that was out gets one query first
        assert asked.describe(clips(4)) == right


def test_outage_stops_where_asked_to() -> None:
    asked = describer(NOWHERE, on_outage="error", timeout_seconds=0.5)
    with pytest.raises(DescriberError, match=r"no label server answers .*connection failed"):
        asked.describe(clips(2))


def test_one_line_a_minute_for_many_processes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(servers.time, "time", lambda: now[0])
    logs = [OutageLog(tmp_path / "outage") for _ in range(3)]
    for _ in range(130):  # 130 s, three processes, each complaining every second
        for each in logs:
            each.waiting("nobody answers")
        now[0] += 1.0
    for each in logs:
        each.over()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "no answer for 0 s: nobody answers",
        "no answer for 60 s: nobody answers",
        "no answer for 120 s: nobody answers",
        "servers answer again after 130 s",
    ]


def test_nothing_is_asked_while_as_many_answers_wait_to_be_stored() -> None:
    begun: list[int] = []
    stop = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        results = as_they_come(pool, [partial(begun.append, n) for n in range(6)], stop)
        stored = 0
        while stored < 6:
            new = next(results)
            time.sleep(0.1)  # the store takes its time
            assert len(begun) <= stored + 2
            stored += len(new)
        assert next(results, None) is None
        assert stop.is_set()
        failing = as_they_come(pool, [partial(int, "one"), time.monotonic], threading.Event())
        with pytest.raises(ValueError, match="one"):
            list(failing)


def test_pool_tries_a_failed_server_with_one_question() -> None:
    now = [0.0]
    pool = ServerPool(["a"], lambda: now[0])
    for _ in range(2):
        server = pool.pick()
        assert server is not None
        pool.failed(server, "x")
    assert pool.is_out
    assert pool.pick() is None
    now[0] = server.open_until
    assert pool.pick() is server
    assert pool.pick() is None  # others wait until this one has come back
    pool.succeeded(server)
    assert pool.pick() is not None


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "base_url must name a server"),
        ("ftp://x/v1", r"base_url must hold http\(s\) addresses, got 'ftp://x/v1'"),
        ("http://me:secret@host/v1", r"must not hold a password or a key \(host\)"),
    ],
)
def test_addresses_are_checked(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VlmConfig(kind="openai", server=ServerConfig(url))
