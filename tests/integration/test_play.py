"""`mapo-play` as it is typed: the real server, a real socket, and a browser where there is one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from program import PATIENCE, PLAY, SMALL, end, start, train
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.browser import Browser

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short run, with its checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder, *SMALL, "run_dir=run", "tracking.enabled=false", f"data.root={folder}/toy")
    return folder


@contextmanager
def served(folder: Path, *words: str) -> Iterator[tuple[str, Any]]:
    """Start the program; gives its address and its process."""
    with tempfile.TemporaryFile("w+") as said:
        process = start(folder, PLAY, *words, said=said)
        try:
            address = None
            while address is None:
                with contextlib.suppress(Exception):
                    process.wait(timeout=0.2)
                said.seek(0)
                text = said.read()
                address = re.search(r"Open (http://\S+)", text)
                assert process.poll() is None, text
            yield address[1], process
        finally:
            end(process)


def joined(address: str, **changed: Any) -> ClientConnection:
    """A player at an address that the program printed; another one may still be leaving."""
    host, _, query = address.removeprefix("http://").partition("/?")
    words = {"origin": f"http://{host}", "query": query} | changed
    while True:
        socket = connect(
            f"ws://{host}/play?{words['query']}", origin=words["origin"], proxy=None,
            additional_headers=words.get("headers"), open_timeout=PATIENCE, max_size=None,
        ).__enter__()  # fmt: skip
        with contextlib.suppress(ConnectionClosed):
            socket.hello = json.loads(socket.recv(timeout=PATIENCE))  # type: ignore[attr-defined]
            told(socket)
            return socket
        assert "another page is playing" in (socket.close_reason or "")


def told(socket: ClientConnection) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The next moment, and what was said before it."""
    events: list[dict[str, Any]] = []
    while True:
        data = socket.recv(timeout=PATIENCE)
        if isinstance(data, bytes):
            size = int.from_bytes(data[:4], "little")
            state = json.loads(data[4 : 4 + size])
            side = socket.hello["side"]  # type: ignore[attr-defined]
            panes = 1 + len(state["expected"])
            assert len(data) == 4 + size + panes * side * side * 3
            return state, events
        events.append(json.loads(data))


def do(socket: ClientConnection, name: str, **fields: Any) -> Any:
    socket.send(json.dumps({"do": name, **fields}))
    return told(socket)


def status(address: str, **headers: str) -> tuple[int, str, Any]:
    request = urllib.request.Request(address, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=PATIENCE) as answer:
            return answer.status, answer.read().decode("latin-1"), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


def test_an_agent_is_played(trained: Path) -> None:
    words = ["checkpoint=run/finetune/last.ckpt", "run_dir=films", "play.watch=2", "play.fps=60"]
    with served(trained, *words) as (address, process):
        socket = joined(address)
        assert do(socket, "act", action=[1.0, 0.0], serial=1)[0]["serial"] == 1
        do(socket, "record", on=True)
        state = do(socket, "run", on=True)[0]
        while state["number"] < 4:
            state = told(socket)[0]
        assert state["action"] == [1.0, 0.0]
        socket.send('{"do": "run", "on": false}')
        while state["running"]:
            state = told(socket)[0]
        number = state["number"]
        assert do(socket, "rewind", steps=2)[0]["number"] == number - 2
        state = do(socket, "step")[0]
        assert (state["number"], state["last"]) == (number - 1, number - 1)
        files = do(socket, "record", on=False)[1][0]["files"]
        host, key = address.split("/?")
        for name, begin in zip(files, ("ftyp", "PNG"), strict=True):
            code, body, _ = status(f"{host}/saved/{name}?{key}")
            assert (code, begin in body[:16]) == (200, True)
            assert (trained / "films" / name).is_file()
        assert status(f"{host}/saved/..%2F..%2Frun%2Fconfig.yaml?{key}")[0] == 404
        # Nonsense gets a sentence, and the play goes on.
        for text in ("{", '{"do": "fly"}', "x" * 100_000, b"\x00"):
            socket.send(text)
            state, events = told(socket)
            assert [event["is"] for event in events] == ["error"]
        assert do(socket, "step")[0]["number"] == number
        # One player at a time; who leaves frees the simulator for the next one.
        host = address.removeprefix("http://").partition("/")[0]
        query = address.partition("?")[2]
        second = connect(f"ws://{host}/play?{query}", origin=f"http://{host}", proxy=None)  # type: ignore[arg-type]
        with second as other, pytest.raises(ConnectionClosed, match="another page is playing"):
            other.recv(timeout=PATIENCE)
        socket.close()
        socket = joined(address)
        # A message beyond all bounds ends the connection, and no more.
        socket.send("x" * 2_000_000)
        with pytest.raises(ConnectionClosed):
            told(socket)
        socket = joined(address)
        assert do(socket, "step")[0]["number"] == 2
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=PATIENCE) == 0


def test_strangers_are_kept_out(trained: Path) -> None:
    with served(trained, "checkpoint=run/finetune/last.ckpt") as (address, _):
        code, body, headers = status(address)
        assert (code, "Play with the dream" in body) == (200, True)
        policy = headers["content-security-policy"]
        host = address.removeprefix("http://").partition("/")[0]
        assert "default-src 'none'" in policy
        assert f"connect-src ws://{host};" in policy
        assert "unsafe" not in policy
        assert headers["referrer-policy"] == "no-referrer"
        key = address.partition("=")[2]
        assert key not in body
        for wrong in (f"http://{host}/", f"http://{host}/?key={key[:-1]}", f"http://{host}/?key=é"):
            code, body, _ = status(wrong.replace("é", "%C3%A9"))
            assert (code, "the key is missing or wrong" in body) == (403, True)
        code, body, _ = status(address, Host="evil.example")
        assert (code, "another name" in body) == (403, True)
        for changed in (
            {"query": "key=x"},
            {"origin": "http://evil.example"},
            {"origin": None},
            {"origin": f"https://{host}"},
        ):
            with pytest.raises(InvalidStatus, match="403"):
                joined(address, **changed)
        joined(address).close()


def test_a_pretrained_model_is_told_what_to_dream(trained: Path) -> None:
    words = ["checkpoint=run/pretrain/last.ckpt", f"data.root={trained}/toy"]
    with served(trained, *words) as (address, _):
        socket = joined(address)
        assert socket.hello["driver"] == "phrase"  # type: ignore[attr-defined]
        _, events = do(socket, "phrase", text="the disc moves to the left")
        assert events == [{"is": "told", "slots": ["the disc", "moves", "", "left", ""]}]
        assert do(socket, "step")[0]["phrase"] == "[the disc][moves][][left][]"
        _, events = do(socket, "phrase", text="y" * 10_000)
        assert "at most 1,000 characters" in events[0]["text"]
        state, events = do(socket, "phrase", text="")
        assert (events[0]["slots"], state["phrase"]) == (None, "[the disc][moves][][left][]")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_page_is_played_in_a_browser(trained: Path, tmp_path: Path) -> None:
    words = ["checkpoint=run/finetune/last.ckpt", f"run_dir={tmp_path}"]
    assert CHROMIUM is not None
    with served(trained, *words) as (address, _), Browser(CHROMIUM) as page:
        page.go(address)
        page.until("now && now.number === 4 && !now.running")
        page.key("r")
        page.key(" ")
        page.until("now.running")
        with page.held("ArrowRight"):
            page.until("now.action[0] === 1")
        page.until("now.action[0] === 0")
        page.key(" ")
        page.until("!now.running")
        number = page.value("now.number")
        page.key("Backspace")
        page.until(f"now.number === {number - 1}")
        page.key("a")
        page.key(".")
        page.until(f"now.number === {number} && now.auto")
        page.key("r")
        page.until("document.querySelectorAll('#saved a').length === 2")
        assert (tmp_path / "play-001.mp4").is_file()
        # What arrives is text, whatever it is.
        page.value("say({do: 'phrase', text: '<img src=x onerror=alert(1)>'})")
        page.until("document.getElementById('trouble').textContent.includes('no phrase leads')")
        assert page.value("document.images.length") == 0
        assert page.troubles == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["checkpoint=a", "checkpoint=b", "checkpoint=c"], "two checkpoints at most, got 3"),
        (["checkpoint=none.ckpt"], "no checkpoint at 'none.ckpt'"),
        (["checkpoint=run/finetune/last.ckpt", "play.port=99999"], "play.port must lie in"),
        (
            ["checkpoint=run/finetune/last.ckpt", "checkpoint=run/pretrain/last.ckpt"],
            "only those of one stage",
        ),
    ],
)
def test_what_cannot_be_played_is_said(trained: Path, words: list[str], sentence: str) -> None:
    assert sentence in train(trained, *words, code=2, script=PLAY)
