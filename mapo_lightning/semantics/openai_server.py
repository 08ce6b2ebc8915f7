"""A vision-language model behind any server that speaks OpenAI's API, such as vLLM.

Each window is one query, and at most ``concurrency`` are in flight; queries that fail are sent
again. What comes back and is no answer (a refusal, thoughts, half an answer) is asked for once
more, with more room.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from mapo_lightning.semantics.answers import MORE_ROOM
from mapo_lightning.semantics.chat_client import KEYS, ChatClient, Messages, messages_of
from mapo_lightning.semantics.chat_completion import (
    FailedError,
    RejectedError,
    WindowRejectedError,
)
from mapo_lightning.semantics.describer import NoAnswer, Reply, Usage
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

_POLL_SECONDS = 0.05
_PROBE_SECONDS = 5.0  # timeout for a server that failed before, with on_outage=skip
_LONGEST_PAUSE = 2.0  # seconds between two attempts at one window
_REJECTED_IN_A_ROW = 8  # windows, after which it is checked that the server takes any


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
        self._client = ChatClient(self.cfg)
        self._servers = ServerPool(self.server.base_urls, self._clock)
        self._rejected_in_a_row = 0

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

    @property
    def usage(self) -> Usage:
        """Queries answered so far, with their tokens where the server reports them."""
        return self._client.usage

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
        queries = [partial(self._answer, messages_of(clip), clip.shape, stop) for clip in clips]
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
            f"'{self.cfg.model}', and the key in {KEYS[0]} if it needs one"
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
        hasty = server.failures and self.server.on_outage == "skip"
        seconds = min(_PROBE_SECONDS, self.server.timeout_seconds) if hasty else None
        try:
            answer = self._client.ask(server.url, messages, room, seconds)
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
            self._client.ask(server.url, messages_of(np.full(shape, 127, np.uint8)))
        except RejectedError:
            return False
        self._rejected_in_a_row = 0
        return True
