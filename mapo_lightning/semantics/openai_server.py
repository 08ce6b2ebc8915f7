"""A vision-language model behind any server that speaks OpenAI's API, such as vLLM.

Frames are sent as images inside the request, never as addresses. Each window is one query, and at
most ``concurrency`` are in flight; queries that fail are sent again.
"""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from PIL import Image

from mapo_lightning.semantics.describer import Reply
from mapo_lightning.semantics.phrase import PROMPT
from mapo_lightning.semantics.server_pool import (
    OutageLog,
    Server,
    ServerPool,
    as_they_come,
    is_ending,
)
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.types import DescriberError, Frames

if TYPE_CHECKING:
    import openai

log = logging.getLogger(__name__)

_KEYS = ("MAPO_VLM_API_KEY", "OPENAI_API_KEY")  # environment variables, first found
_PARTS = ("executing_body", "action", "target_object", "moving_direction", "displacement_generated")
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {part: {"type": "string", "maxLength": 64} for part in _PARTS},
    "required": list(_PARTS),
    "additionalProperties": False,
}
_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "semantic_action", "schema": _SCHEMA, "strict": True},
}
_JPEG_QUALITY = 95
_POLL_SECONDS = 0.05
_PROBE_SECONDS = 5.0  # timeout for a server that failed before, with on_outage=skip
_LONGEST_PAUSE = 2.0  # seconds between two attempts at one window


class _RejectedError(Exception):
    """The server rejected the query; sending it again would not help."""


class _FailedError(Exception):
    """No usable answer this time; ``pause``: seconds for which the server wants no queries."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class OpenAIDescriber:
    """Queries servers that speak OpenAI's API.

    Args:
        cfg: Addresses, model, timeouts and retries.
        clock: Gives the time in seconds.
    """

    in_worker = True

    def __init__(self, cfg: VlmConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.cfg, self.server, self._clock = cfg, cfg.server, clock
        self.outage = OutageLog()
        prompt = hashlib.blake2b(PROMPT.encode(), digest_size=4).hexdigest()
        model = f"{cfg.model}@{cfg.revision}" if cfg.revision else cfg.model
        tokens, structured = cfg.max_new_tokens, cfg.server.structured
        self.name = f"openai {model} prompt {prompt} tokens {tokens} {structured}"
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._pool: ThreadPoolExecutor | None = None
        self._clients: dict[str, openai.OpenAI] = {}
        self._servers = ServerPool(self.server.base_urls, self._clock)
        self._json: bool | None = None if self.server.structured == "auto" else False
        self._probing = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        """Leave out connections and the API key."""
        return {"cfg": self.cfg, "name": self.name, "outage": self.outage}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Connect at the first query."""
        self.cfg, self.name, self.outage = state["cfg"], state["name"], state["outage"]
        self.server, self._clock = self.cfg.server, time.monotonic
        self._forget()

    @property
    def concurrency(self) -> int:
        """Queries in flight; see `StreamingDescriber`."""
        return self.server.concurrency

    def describe(self, clips: Sequence[Frames]) -> list[Reply]:
        """Describe each window.

        Raises:
            DescriberError: A server rejects the query, or none answers.
        """
        replies: dict[int, Reply | None] = {}
        for answered in self.describe_each(clips):
            replies |= answered
        missing = sum(reply is None for reply in replies.values())
        if missing:
            raise DescriberError(f"{missing} windows got no answer: {self._servers.describe()}")
        return [reply for _, reply in sorted(replies.items()) if reply is not None]

    def describe_each(self, clips: Sequence[Frames]) -> Iterator[Mapping[int, Reply | None]]:
        """Yield answers as they arrive; see `StreamingDescriber`.

        Raises:
            DescriberError: A server rejects the query; with ``on_outage=error``, none answers.
        """
        if self._pid != os.getpid():
            self._forget()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.server.concurrency, "vlm")
        stop = threading.Event()
        # Images are encoded here, so that the threads of the pool only wait for answers.
        queries = [partial(self._answer, _messages(clip), stop) for clip in clips]
        yield from as_they_come(self._pool, queries, stop)

    def _answer(self, messages: list[dict[str, Any]], stop: threading.Event) -> Reply | None:
        """Query until there is an answer, or no hope of one."""
        attempts, others = 0, self._servers.successes
        out_since: float | None = None
        # A program that ends waits for its threads, which must not wait for a server then.
        while not stop.is_set() and not is_ending():
            server = self._servers.pick()
            if server is None:
                now = self._clock()
                out_since = now if out_since is None else out_since
                if self._is_hopeless(now - out_since):
                    return None
                stop.wait(_POLL_SECONDS)
                continue
            try:
                reply = self._once(server, messages)
            except _FailedError as error:
                if error.pause:
                    self._servers.pause(server, error.pause)
                    continue
                self._servers.failed(server, str(error))
                attempts += 1
                if attempts > self.server.retries and self._servers.successes > others:
                    log.warning("gave up on a window after %d attempts: %s", attempts, error)
                    return None  # the servers answer other queries
                pause = min(_LONGEST_PAUSE, 0.1 * 2.0 ** min(attempts, 10))
                stop.wait(pause * random.uniform(0.5, 1.0))
                continue
            except _RejectedError as error:
                self._servers.returned(server)
                raise DescriberError(str(error)) from error
            self._servers.succeeded(server)
            self.outage.over()
            return reply
        return None

    def _is_hopeless(self, out_seconds: float) -> bool:
        """Log an outage, and tell whether to go on without an answer."""
        if not self._servers.is_out:
            return False
        self.outage.waiting(self._silence())
        if self.server.on_outage == "error" and out_seconds > self.server.timeout_seconds:
            raise DescriberError(self._silence())
        return self.server.on_outage == "skip"

    def _silence(self) -> str:
        what = {
            "wait": "waiting; training continues when one answers",
            "skip": "labels are null meanwhile and not stored",
            "error": "stopping soon",
        }[self.server.on_outage]
        return (
            f"no label server answers ({self._servers.describe()}); {what} (vlm.server.on_outage)"
        )

    def _once(self, server: Server, messages: list[dict[str, Any]]) -> Reply:
        if self._json is None:
            with self._probing:  # one query finds out for all
                reply = self._probe(server, messages)
            if reply is not None:
                return reply
        return self._send(server, messages, bool(self._json))

    def _probe(self, server: Server, messages: list[dict[str, Any]]) -> Reply | None:
        """Query with a schema, and without if it is rejected; None if another thread has."""
        if self._json is not None:
            return None
        try:
            reply = self._send(server, messages, True)
            # Some servers accept the schema and ignore it; their answer is still usable.
            self._json = reply.text.lstrip().startswith("{")
        except _RejectedError:
            reply = self._send(server, messages, False)
            self._json = False
        log.debug("structured answers: %s", "yes" if self._json else "no, brackets")
        return reply

    def _send(self, server: Server, messages: list[dict[str, Any]], as_json: bool) -> Reply:
        """Send one query to one server.

        Raises:
            _FailedError: It gave no usable answer.
            _RejectedError: It rejected the query.
        """
        import openai

        create: Any = self._client(server.url).chat.completions.create
        extra: dict[str, Any] = {"response_format": _FORMAT} if as_json else {}
        if server.failures and self.server.on_outage == "skip":
            extra["timeout"] = min(_PROBE_SECONDS, self.server.timeout_seconds)
        try:
            answer = create(
                model=self.cfg.model, messages=messages, temperature=0.0,
                max_tokens=self.cfg.max_new_tokens * (2 if as_json else 1), **extra,
            )  # fmt: skip
            text = answer.choices[0].message.content
        except openai.APITimeoutError as error:
            raise _FailedError(f"no answer within {self.server.timeout_seconds:g} s") from error
        except openai.APIConnectionError as error:
            raise _FailedError(f"connection failed: {_short(error.__cause__ or error)}") from error
        except openai.APIStatusError as error:
            reason = f"HTTP {error.status_code}: {_short(error)}"
            if error.status_code == 429:
                raise _FailedError(reason, _retry_after(error.response.headers)) from error
            if error.status_code in (408, 409) or error.status_code >= 500:
                raise _FailedError(reason) from error
            raise _RejectedError(
                f"the label server {server.url} rejects the query ({reason}). Check vlm.model="
                f"'{self.cfg.model}', and the key in {_KEYS[0]} if it needs one"
            ) from error
        except (openai.OpenAIError, AttributeError, IndexError, TypeError, ValueError) as error:
            raise _FailedError(f"not an answer: {_short(error)}") from error
        return Reply(text if isinstance(text, str) else "")

    def _client(self, url: str) -> openai.OpenAI:
        if url not in self._clients:
            import openai

            for chatty in ("httpx", "httpx2", "openai"):  # otherwise a line per query
                logging.getLogger(chatty).setLevel(logging.WARNING)
            self._clients[url] = openai.OpenAI(
                base_url=url, api_key=_key(), timeout=self.server.timeout_seconds, max_retries=0
            )
        return self._clients[url]


def _messages(clip: Frames) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for frame in clip:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "jpeg", quality=_JPEG_QUALITY, subsampling=0)
        data = base64.b64encode(file.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": PROMPT}]}]


def _key() -> str:
    return next((os.environ[name] for name in _KEYS if os.environ.get(name)), "none")


def _short(error: BaseException) -> str:
    """Start of a message from outside, without the API key, which a server may repeat."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text.replace(_key(), "***") if _key() != "none" else text)[:160]


def _retry_after(headers: Mapping[str, str]) -> float:
    try:
        return min(max(float(headers.get("retry-after", "")), _POLL_SECONDS), 60.0)
    except ValueError:  # none given, or a date
        return 1.0
