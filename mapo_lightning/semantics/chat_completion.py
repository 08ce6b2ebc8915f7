"""Reads the reply of a server with OpenAI's API: where the answer is, and whether it is one."""

from __future__ import annotations

import re
from typing import Any

from mapo_lightning.semantics.answers import read_answer
from mapo_lightning.semantics.describer import NoAnswer, Usage
from mapo_lightning.semantics.phrase import clean_text

_MOST_WORDS = 160  # characters of a server's message that are repeated
_CUT = frozenset({"length", "max_tokens", "model_length", "model_context_window_exceeded"})
_WITHHELD = frozenset({"content_filter", "refusal", "safety", "recitation", "sensitive"})
_THOUGHTS = frozenset({"reasoning", "thinking", "thought", "redacted_thinking"})
_POLICY = re.compile(
    r"content[ _-]?(?:filter|policy|management|moderation)|moderation|flagged|responsible ?ai|"
    r"data[ _]?inspection|safety|inappropriate|prohibited|sensitive|nsfw",
    re.IGNORECASE,
)


class FailedError(Exception):
    """The server gave no usable reply this time.

    Attributes:
        pause: Seconds for which it wants no queries.
        status: The HTTP status, if there is one.
    """

    def __init__(self, reason: str, pause: float = 0.0, status: int | None = None) -> None:
        super().__init__(reason)
        self.pause, self.status = pause, status


class RejectedError(Exception):
    """The server rejects the query; sending it again would not help.

    Attributes:
        status: The HTTP status.
    """

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"HTTP {status}: {words}")
        self.status, self.names_policy = status, _POLICY.search(words) is not None

    @property
    def may_be_the_window(self) -> bool:
        """Whether another window might be taken: it is not about keys, models or addresses."""
        return self.names_policy or self.status in (400, 413, 415, 422, 451)


class WindowRejectedError(RejectedError):
    """The server rejects this window, such as a content filter does, and takes others."""

    def __init__(self, error: RejectedError) -> None:
        Exception.__init__(self, str(error))
        self.status, self.names_policy = error.status, error.names_policy


def read_completion(body: Any, room: int) -> str | NoAnswer:
    """Find the answer in a reply with status 200.

    Args:
        body: Its JSON.
        room: Tokens that the model had.

    Raises:
        FailedError: It is the message of an error, or no chat completion.
    """
    choice, message = _first_message(body)
    reason = str(choice.get("finish_reason") or "").lower()
    if choice.get("error") or reason == "error":
        raise FailedError(f"an error instead of an answer: {server_words(choice)}")
    if message.get("refusal"):
        return NoAnswer(f"it refuses: '{clean_text(str(message['refusal']), 80)}'")
    if reason in _WITHHELD:
        return NoAnswer("the server's content filter withholds the answer")
    if message.get("tool_calls") or message.get("function_call"):
        return NoAnswer("it calls a tool instead of answering")
    usage = body.get("usage")
    used = usage.get("completion_tokens") if isinstance(usage, dict) else None
    # A server that gives no reason may still count.
    cut = reason in _CUT or (not reason and isinstance(used, int) and used >= room)
    return read_answer(_text(message.get("content")), cut)


def read_usage(body: Any) -> Usage:
    """Find the tokens of one query in a reply with status 200, if the server reports them."""
    found = body.get("usage") if isinstance(body, dict) else None
    names = ("prompt_tokens", "completion_tokens")
    counts = [found.get(name) for name in names] if isinstance(found, dict) else []
    tokens = [count for count in counts if isinstance(count, int) and count >= 0]
    return Usage(1, 1, *tokens) if len(tokens) == len(names) else Usage(1)


def server_words(body: Any) -> str:
    """A server's own message about an error, one line, bounded."""
    found = body
    for _ in range(4):  # {"error": {"message": "..."}}, {"detail": [{"msg": "..."}]} ...
        if isinstance(found, list) and found:
            found = found[0]
        elif isinstance(found, dict):
            names = ("error", "message", "detail", "msg", "error_msg")
            found = next((found[n] for n in names if found.get(n)), str(found))
    return clean_text(str(found), _MOST_WORDS) or "no words"


def _first_message(body: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    choices = body.get("choices") if isinstance(body, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if isinstance(choice, dict) and isinstance(message, dict):
        return choice, message
    raise FailedError(f"status 200 without an answer: {server_words(body)}")


def _text(content: Any) -> str:
    """The text of a message, which may come as one text or in parts."""
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        if isinstance(part, dict) and part.get("type") not in _THOUGHTS:
            part = part.get("text")
        if isinstance(part, str):
            texts.append(part)
    return "".join(texts)
