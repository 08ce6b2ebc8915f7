"""The server of a play: a page, a socket and recordings, for whoever has the session's key.

Other programs of this machine, and pages of other sites in the player's browser, can reach the same
port. So every request must name this server as its host (a name of somebody else's may point here),
a socket must come from this server's page, and both must have the key.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import json
import logging
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from mapo_lightning.playing.page import page
from mapo_lightning.playing.session import Event, Session
from mapo_lightning.types import MapoError

log = logging.getLogger(__name__)

_MOST_BYTES = 1 << 20  # of a message: a longer one ends the connection
_QUEUE = 64  # messages that wait; then the sender does
_BUSY, _BROKEN, _REFUSED = 4409, 4500, 4403
_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),  # the address holds the key
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Guard:
    """Lets nobody in but the player.

    Args:
        app: What is guarded.
        key: The session's.
        port: On which the server listens.
    """

    def __init__(self, app: ASGIApp, key: str, port: int) -> None:
        self.app, self.key = app, key.encode()
        self.hosts = {f"{name}:{port}".encode() for name in ("127.0.0.1", "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        reason = self._fault(scope)
        if not reason:
            await self.app(scope, receive, functools.partial(_with_headers, send))
        elif scope["type"] == "http":
            response = PlainTextResponse(reason + "\n", 403)
            await response(scope, receive, functools.partial(_with_headers, send))
        else:
            await WebSocket(scope, receive, send).close(_REFUSED, reason)

    def _fault(self, scope: Scope) -> str:
        """Why a request is refused; empty if it is not."""
        headers = scope["headers"]
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1 or hosts[0] not in self.hosts:
            return "this server has another name: open the address that mapo-play printed"
        if scope["type"] == "websocket":
            origins = [value for name, value in headers if name == b"origin"]
            if len(origins) != 1 or origins[0].removeprefix(b"http://") not in self.hosts:
                return "the socket is for the page of this server only"
        given = parse_qs(scope["query_string"].decode("latin-1")).get("key", [""])[-1]
        if not hmac.compare_digest(given.encode(), self.key):
            return "the key is missing or wrong: open the address that mapo-play printed"
        return ""


async def _with_headers(send: Send, message: Message) -> None:
    if message["type"] == "http.response.start":
        message["headers"] = [*message["headers"], *_HEADERS]
    await send(message)


class PlayServer:
    """Serves one player at a time; each connection is a session of its own.

    All of a session happens in one thread, in which OpenGL stays.

    Args:
        make: Makes a session; called when a player connects.
        key: The session's key.
        port: On which the server will listen.
    """

    def __init__(self, make: Callable[[], Session], key: str, port: int) -> None:
        self.make, self.key, self.port = make, key, port
        self.thread = ThreadPoolExecutor(1, "play")
        self.playing = False
        self.saved: dict[str, Path] = {}
        routes = [
            Route("/", self._page),
            Route("/saved/{name}", self._saved),
            WebSocketRoute("/play", self._play),
        ]
        self.app = Guard(Starlette(routes=routes), key, port)

    @property
    def address(self) -> str:
        """What the player opens."""
        return f"http://127.0.0.1:{self.port}/?key={self.key}"

    async def _page(self, request: Request) -> Response:
        found = page(f"ws://{request.headers['host']}")
        return HTMLResponse(found.html, headers={"content-security-policy": found.policy})

    async def _saved(self, request: Request) -> Response:
        path = self.saved.get(request.path_params["name"])
        if path is None or not path.is_file():
            return PlainTextResponse("there is no such recording\n", 404)
        return FileResponse(path, filename=path.name)

    async def _play(self, player: WebSocket) -> None:
        await player.accept()
        if self.playing:
            await player.close(_BUSY, "another page is playing: close it, then reload this one")
            return
        self.playing = True
        try:
            await self._session(player)
        except WebSocketDisconnect:
            pass
        finally:
            self.playing = False

    async def _session(self, player: WebSocket) -> None:
        session: Session | None = None
        try:
            session = await self._threaded(self.make)
            hello = await self._threaded(session.open)
            await player.send_text(json.dumps(hello))
            await _Player(self, player, session).play()
        except MapoError as error:  # there is nothing to play, now or at all
            await player.send_text(json.dumps({"is": "error", "text": str(error)[:1000]}))
            await player.close(_BROKEN, "there is nothing to play")
        finally:
            if session is not None:
                await asyncio.shield(self._threaded(session.close))

    async def _threaded(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.thread, work)


class _Player:
    """A connection that plays."""

    def __init__(self, server: PlayServer, socket: WebSocket, session: Session) -> None:
        self.server, self.socket, self.session = server, socket, session
        self.inbox: asyncio.Queue[str | bytes | None] = asyncio.Queue(_QUEUE)

    async def play(self) -> None:
        """Until the player goes."""
        listening = asyncio.create_task(self._listen())
        try:
            await self._loop()
        finally:
            listening.cancel()

    async def _listen(self) -> None:
        while True:
            message = await self.socket.receive()
            if message["type"] == "websocket.disconnect":
                await self.inbox.put(None)
                return
            text = message.get("text")
            await self.inbox.put(message.get("bytes") if text is None else text)

    async def _loop(self) -> None:
        clock = asyncio.get_running_loop().time
        due, step, messages = clock(), False, list[str | bytes | None]()
        while True:
            await self._show(messages, step)
            period = 1.0 / self.session.fps
            if self.session.running:
                messages = await self._until(due)
                step = clock() >= due
                due = max(due + period, clock()) if step else due
            else:
                messages, step = [await self.inbox.get()], False
                due = clock() + period
            while not self.inbox.empty():
                messages.append(self.inbox.get_nowait())
            if None in messages:
                return

    async def _until(self, due: float) -> list[str | bytes | None]:
        """Wait until the next step is due, or something other than an action is said."""
        found: list[str | bytes | None] = []
        loop = asyncio.get_running_loop()
        while (left := due - loop.time()) > 0:
            try:
                found.append(await asyncio.wait_for(self.inbox.get(), left))
            except TimeoutError:
                break
            if found[-1] is None or '"act"' not in str(found[-1])[:40]:
                break
        return found

    async def _show(self, messages: list[str | bytes | None], step: bool) -> None:
        """Do what was said, take a step if one is due, and show what is now."""

        def work() -> tuple[list[Event], bytes]:
            events = [e for m in messages if m is not None for e in self.session.obey(m)]
            if step:
                events += self.session.tick()
            state = json.dumps(self.session.state()).encode()
            return events, len(state).to_bytes(4, "little") + state + self.session.pictures()

        events, moment = await self.server._threaded(work)
        self.server.saved |= self.session.saved
        for event in events:
            await self.socket.send_text(json.dumps(event))
        await self.socket.send_bytes(moment)


def listen(port: int) -> socket.socket:
    """Open a port on 127.0.0.1; 0 takes a free one.

    Raises:
        MapoError: It is in use.
    """
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(("127.0.0.1", port))
        found.listen()  # who comes before the server is ready waits
    except OSError as error:
        found.close()
        raise MapoError(
            f"port {port} of 127.0.0.1 cannot be used ({error.strerror}): another program has it; "
            "leave play.port out to take a free one"
        ) from error
    return found


def serve(server: PlayServer, listening: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    config = uvicorn.Config(
        server.app,
        log_level="warning",
        access_log=False,  # its lines would hold the key
        ws_max_size=_MOST_BYTES,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=3,
    )
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:  # raised again after everything was closed
        log.info("stopped")
    finally:
        server.thread.shutdown()
