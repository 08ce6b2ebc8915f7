"""Asks one server that speaks OpenAI's API about one window: the request, and what came back.

Frames are sent as images inside the request, never as addresses.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from PIL import Image

from mapo_lightning.semantics.chat_completion import (
    FailedError,
    RejectedError,
    read_completion,
    read_usage,
    server_words,
)
from mapo_lightning.semantics.describer import NoAnswer, Usage
from mapo_lightning.semantics.phrase import PROMPT
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.types import Frames

if TYPE_CHECKING:
    import openai

log = logging.getLogger(__name__)

KEYS = ("MAPO_VLM_API_KEY", "OPENAI_API_KEY")
"""Environment variables that may hold the key; the first one that does counts."""
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
_BREAKS_ON_SCHEMA = (500, 501, 502)  # statuses of servers that cannot do it and do not say so
_SCHEMA_FAILURES = 2  # in a row, after which queries have no schema
_PAUSES = (0.05, 60.0)  # shortest and longest pause that a server may ask for, in seconds

Messages = list[dict[str, Any]]


class ChatClient:
    """Sends queries, with a JSON schema of the five slots where that works; threads may share it.

    Args:
        cfg: Model, tokens and timeout.
    """

    def __init__(self, cfg: VlmConfig) -> None:
        self.cfg = cfg
        self.usage = Usage()
        self._counting = threading.Lock()
        self._clients: dict[str, openai.OpenAI] = {}
        self._json: bool | None = None if cfg.server.structured == "auto" else False
        self._probing = threading.Lock()
        self._schema_failures = 0

    def ask(
        self, url: str, messages: Messages, room: int = 1, seconds: float | None = None
    ) -> str | NoAnswer:
        """Send one query, with a schema where that works, otherwise without.

        Args:
            url: Address of the server.
            messages: As made by `messages_of`.
            room: The answer may have so many times ``max_new_tokens``.
            seconds: How long it may take, if not as long as usual.

        Returns:
            The answer, or why there is none.

        Raises:
            FailedError: The server gave no usable reply.
            RejectedError: It rejected the query.
        """
        if self._json is None:
            with self._probing:  # one query finds out for all
                if self._json is None:
                    return self._ask_for_json(url, messages, room, seconds)
        if self._json:
            return self._ask_for_json(url, messages, room, seconds)
        return self._send(url, messages, room, seconds, False)

    def _ask_for_json(
        self, url: str, messages: Messages, room: int, seconds: float | None
    ) -> str | NoAnswer:
        """Query with a schema, and without if the schema may be what the server cannot do."""
        try:
            answer = self._send(url, messages, room, seconds, True)
        except (RejectedError, FailedError) as error:
            if isinstance(error, FailedError) and error.status not in _BREAKS_ON_SCHEMA:
                raise
            answer = self._send(url, messages, room, seconds, False)
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

    def _send(
        self, url: str, messages: Messages, room: int, seconds: float | None, as_json: bool
    ) -> str | NoAnswer:
        import openai

        create: Any = self._client(url).chat.completions.with_raw_response.create
        seconds = seconds or self.cfg.server.timeout_seconds
        extra: dict[str, Any] = {"response_format": _FORMAT} if as_json else {}
        tokens = self.cfg.max_new_tokens * (2 if as_json else 1) * room
        try:
            raw = create(
                model=self.cfg.model, messages=messages, temperature=0.0, max_tokens=tokens,
                timeout=seconds, **extra,
            )  # fmt: skip
        except openai.APITimeoutError as error:
            raise FailedError(f"no answer within {seconds:g} s") from error
        except openai.APIConnectionError as error:
            raise FailedError(
                f"connection failed: {server_words(str(error.__cause__ or error))}"
            ) from error
        except openai.APIStatusError as error:
            status, words = error.status_code, server_words(_body(error.response))
            pause = _retry_after(error.response.headers) if status == 429 else 0.0
            if 300 <= status < 400:
                words = (
                    "it sends the query on to another address; give that address if you trust it"
                )
            if status in (408, 409, 429) or status >= 500:
                raise FailedError(f"HTTP {status}: {words}", pause, status) from error
            raise RejectedError(status, words) from error
        except openai.OpenAIError as error:
            raise FailedError(f"not an answer: {server_words(str(error))}") from error
        body = _body(raw.http_response)
        with self._counting:
            self.usage = self.usage.plus(read_usage(body))
        return read_completion(body, tokens)

    def _client(self, url: str) -> openai.OpenAI:
        if url not in self._clients:
            import openai

            for chatty in ("httpx", "httpx2", "openai"):  # otherwise a line per query
                logging.getLogger(chatty).setLevel(logging.WARNING)
            # Frames and the key go to the address that the user has given, and nowhere else.
            self._clients[url] = openai.OpenAI(
                base_url=url,
                api_key=_key(),
                timeout=self.cfg.server.timeout_seconds,
                max_retries=0,
                http_client=openai.DefaultHttpxClient(follow_redirects=False),
            )
        return self._clients[url]


def messages_of(clip: Frames) -> Messages:
    """Make the query about a window, (T, H, W, 3) uint8: its frames as JPEG, and the prompt."""
    parts: list[dict[str, Any]] = []
    for frame in clip:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "jpeg", quality=_JPEG_QUALITY, subsampling=0)
        data = base64.b64encode(file.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": PROMPT}]}]


def _key() -> str:
    return next((os.environ[name] for name in KEYS if os.environ.get(name)), "none")


def _body(response: Any) -> Any:
    """Content of a reply, as JSON if it is; without the API key, which a server may repeat."""
    text = response.text if _key() == "none" else response.text.replace(_key(), "***")
    try:
        return json.loads(text)
    except ValueError:
        return text


def _retry_after(headers: Mapping[str, str]) -> float:
    try:
        return min(max(float(headers.get("retry-after", "")), _PAUSES[0]), _PAUSES[1])
    except ValueError:  # none given, or a date
        return 1.0
