"""A vision-language model behind any server that speaks OpenAI's API, such as vLLM.

Frames are sent as images inside the request, never as addresses. Each window is one query, and at
most ``concurrency`` are in flight; queries that fail are sent again. What comes back and is no
answer (a refusal, thoughts, half an answer) is asked for once more, with more room.
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

import numpy as np
from PIL import Image

from mapo_lightning.semantics.answers import MORE_ROOM
from mapo_lightning.semantics.chat_completion import (
    FailedError,
    RejectedError,
    WindowRejectedError,
    read_completion,
    server_words,
)
from mapo_lightning.semantics.describer import NoAnswer, Reply
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
_BREAKS_ON_SCHEMA = (500, 501, 502)  # statuses of servers that cannot do it and do not say so
_SCHEMA_FAILURES = 2  # in a row, after which queries have no schema
_REJECTED_IN_A_ROW = 8  # windows, after which it is checked that the server takes any

Messages = list[dict[str, Any]]


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
        self._schema_failures = self._rejected_in_a_row = 0

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

    def describe(self, clips: Sequence[Frames]) -> list[Reply | NoAnswer]:
        """Describe each window.

        Raises:
            DescriberError: A server rejects every query; with ``on_outage=error``, none answers.
        """
        replies: dict[int, Reply | NoAnswer] = {}
        for answered in self.describe_each(clips):
            replies |= answered
        return [reply for _, reply in sorted(replies.items())]

    def describe_each(self, clips: Sequence[Frames]) -> Iterator[Mapping[int, Reply | NoAnswer]]:
        """Yield answers as they arrive; see `StreamingDescriber`.

        Raises:
            DescriberError: A server rejects every query; with ``on_outage=error``, none answers.
        """
        if self._pid != os.getpid():
            self._forget()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.server.concurrency, "vlm")
        stop = threading.Event()
        # Images are encoded here, so that the threads of the pool only wait for answers.
        queries = [partial(self._answer, _messages(clip), clip.shape, stop) for clip in clips]
        yield from as_they_come(self._pool, queries, stop)

    def _answer(
        self, messages: Messages, shape: tuple[int, ...], stop: threading.Event
    ) -> Reply | NoAnswer:
        """Query until there is an answer, or no hope of one."""
        attempts, others = 0, self._servers.successes
        out_since: float | None = None
        none_yet: NoAnswer | None = None
        # A program that ends waits for its threads, which must not wait for a server then.
        while not stop.is_set() and not is_ending():
            server = self._servers.pick()
            if server is None:
                now = self._clock()
                out_since = now if out_since is None else out_since
                if self._is_hopeless(now - out_since):
                    break
                stop.wait(_POLL_SECONDS)
                continue
            try:
                answer = self._once(server, messages, shape, MORE_ROOM if none_yet else 1)
            except FailedError as error:
                if error.pause:
                    self._servers.pause(server, error.pause)
                    continue
                self._servers.failed(server, str(error))
                attempts += 1
                if attempts > self.server.retries and self._servers.successes > others:
                    return NoAnswer(f"{attempts} attempts failed, the last with {error}")
                pause = min(_LONGEST_PAUSE, 0.1 * 2.0 ** min(attempts, 10))
                stop.wait(pause * random.uniform(0.5, 1.0))
                continue
            except RejectedError as error:
                self._servers.returned(server)
                # A server may have no more room.
                return none_yet or self._refused(server, error)
            self._servers.succeeded(server)
            self.outage.over()
            if isinstance(answer, str):
                return Reply(answer)
            if none_yet is not None:
                return answer
            none_yet = answer
        return NoAnswer("no label server answers", outage=True)

    def _refused(self, server: Server, error: RejectedError) -> NoAnswer:
        """Leave one window out, or stop if the server would reject all of them."""
        if isinstance(error, WindowRejectedError):
            return NoAnswer(f"the label server {server.url} rejects it ({error})")
        raise DescriberError(
            f"the label server {server.url} rejects the query ({error}). Check vlm.model="
            f"'{self.cfg.model}', and the key in {_KEYS[0]} if it needs one"
        ) from error

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

    def _once(
        self, server: Server, messages: Messages, shape: tuple[int, ...], room: int
    ) -> str | NoAnswer:
        """Send one query; a rejection is either of this window or of all.

        Raises:
            FailedError: The server gave no usable reply.
            WindowRejectedError: It rejects this window, and takes others.
            RejectedError: It rejects all windows.
        """
        try:
            answer = self._ask(server, messages, room)
        except RejectedError as error:
            if error.may_be_the_window and self._takes_others(server, shape):
                raise WindowRejectedError(error) from error
            raise
        self._rejected_in_a_row = 0
        return answer

    def _takes_others(self, server: Server, shape: tuple[int, ...]) -> bool:
        """Whether the server takes other windows; asked about a grey one where it is not clear."""
        self._rejected_in_a_row += 1
        if self._servers.successes and self._rejected_in_a_row < _REJECTED_IN_A_ROW:
            return True
        try:
            self._ask(server, _messages(np.full(shape, 127, np.uint8)), 1)
        except RejectedError:
            return False
        self._rejected_in_a_row = 0
        return True

    def _ask(self, server: Server, messages: Messages, room: int) -> str | NoAnswer:
        """Query with a schema where that works, otherwise without."""
        if self._json is None:
            with self._probing:  # one query finds out for all
                if self._json is None:
                    return self._ask_for_json(server, messages, room)
        if self._json:
            return self._ask_for_json(server, messages, room)
        return self._send(server, messages, room, False)

    def _ask_for_json(self, server: Server, messages: Messages, room: int) -> str | NoAnswer:
        """Query with a schema, and without if the schema may be what the server cannot do."""
        try:
            answer = self._send(server, messages, room, True)
        except (RejectedError, FailedError) as error:
            if isinstance(error, FailedError) and error.status not in _BREAKS_ON_SCHEMA:
                raise
            answer = self._send(server, messages, room, False)
            self._schema_failed(error)
            return answer
        if isinstance(answer, str):
            self._schema_failures = 0
            if self._json is None:  # some accept the schema and ignore it; that answer is usable
                self._json = answer.lstrip().startswith("{")
                log.debug("structured answers: %s", "yes" if self._json else "no, brackets")
        return answer

    def _schema_failed(self, error: Exception) -> None:
        """Take note that a query was answered without a schema only; no more of them then."""
        self._schema_failures += 1
        # A 5xx may have been chance; a server that says no means it.
        if isinstance(error, RejectedError) or self._schema_failures >= _SCHEMA_FAILURES:
            self._json = False
            log.warning(
                "queries with a JSON schema fail (%s), those without are answered: from now on "
                "the answers are asked for in brackets",
                error,
            )

    def _send(self, server: Server, messages: Messages, room: int, as_json: bool) -> str | NoAnswer:
        """Send one query to one server.

        Raises:
            FailedError: It gave no usable reply.
            RejectedError: It rejected the query.
        """
        import openai

        create: Any = self._client(server.url).chat.completions.with_raw_response.create
        extra: dict[str, Any] = {"response_format": _FORMAT} if as_json else {}
        if server.failures and self.server.on_outage == "skip":
            extra["timeout"] = min(_PROBE_SECONDS, self.server.timeout_seconds)
        tokens = self.cfg.max_new_tokens * (2 if as_json else 1) * room
        try:
            raw = create(
                model=self.cfg.model, messages=messages, temperature=0.0, max_tokens=tokens, **extra
            )
            body = raw.http_response.json()
        except openai.APITimeoutError as error:
            raise FailedError(f"no answer within {self.server.timeout_seconds:g} s") from error
        except openai.APIConnectionError as error:
            raise FailedError(f"connection failed: {_short(error.__cause__ or error)}") from error
        except openai.APIStatusError as error:
            status, words = error.status_code, _hidden_key(server_words(error.body or str(error)))
            if status == 429:
                raise FailedError(
                    f"HTTP 429: {words}", _retry_after(error.response.headers), 429
                ) from error
            if status in (408, 409) or status >= 500:
                raise FailedError(f"HTTP {status}: {words}", status=status) from error
            raise RejectedError(status, words) from error
        except (openai.OpenAIError, ValueError) as error:
            raise FailedError(f"not an answer: {_short(error)}") from error
        try:
            return read_completion(body, tokens)
        except FailedError as error:
            raise FailedError(_hidden_key(str(error))) from error

    def _client(self, url: str) -> openai.OpenAI:
        if url not in self._clients:
            import openai

            for chatty in ("httpx", "httpx2", "openai"):  # otherwise a line per query
                logging.getLogger(chatty).setLevel(logging.WARNING)
            self._clients[url] = openai.OpenAI(
                base_url=url, api_key=_key(), timeout=self.server.timeout_seconds, max_retries=0
            )
        return self._clients[url]


def _messages(clip: Frames) -> Messages:
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
    """Start of a message from outside, without the API key."""
    return _hidden_key(server_words(str(error) or type(error).__name__))


def _hidden_key(text: str) -> str:
    """Hide the API key, which a server may repeat."""
    return text.replace(_key(), "***") if _key() != "none" else text


def _retry_after(headers: Mapping[str, str]) -> float:
    try:
        return min(max(float(headers.get("retry-after", "")), _POLL_SECONDS), 60.0)
    except ValueError:  # none given, or a date
        return 1.0
