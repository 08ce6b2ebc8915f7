"""Tells an answer from what is none: thoughts, refusals, nothing at all, and what was cut short.

A describer's text is an answer if it says something about the window, even if `phrase.parse_reply`
cannot read it. Everything else leaves the window without a label: to store it would settle for
ever what nobody has said.
"""

from __future__ import annotations

import json
import re

from mapo_lightning.semantics.describer import NoAnswer
from mapo_lightning.semantics.phrase import (
    MAX_READ,
    MAX_SLOT,
    MAX_TEXT,
    SLOTS,
    clean_text,
    parse_reply,
)
from mapo_lightning.semantics.store import StoredLabel

MORE_ROOM = 4
"""An answer that is cut is asked for once more, with so many times the tokens."""

_TAGS = "think|thinking|thought|thoughts|reasoning|reflection|analysis"
_THOUGHTS_BEGIN = re.compile(
    rf"<(?:{_TAGS})>|\u25c1think\u25b7|\[THINK\]|<\|channel\|>analysis", re.IGNORECASE
)
# Chat templates of thinking models may hold the opening tag, so the text has the closing one only.
_THOUGHTS_END = re.compile(
    rf"</(?:{_TAGS})>|\u25c1/think\u25b7|\[/THINK\]|<\|channel\|>final(?:<\|message\|>)?",
    re.IGNORECASE,
)
_BOX = re.compile(
    r"<answer>(.*?)(?:</answer>|\Z)|<\|begin_of_box\|>(.*?)(?:<\|end_of_box\|>|\Z)",
    re.IGNORECASE | re.DOTALL,
)
_UNABLE = (
    r"i (?:can(?:no|['\u2019]?)t|can not|could not|couldn['\u2019]t|will not|won['\u2019]t|"
    r"do not|don['\u2019]t|am (?:unable|not able)|must decline)|"
    r"i['\u2019]m (?:unable|not able)|as an ai\b"
)
_REFUSAL = re.compile(
    rf"^\W*(?:(?:i['\u2019]m|i am|we['\u2019]re|we are)? ?(?:very |so )?sorry\b|i apologi[sz]e\b|"
    rf"(?:unfortunately,? |however,? )?(?:{_UNABLE})|"
    r"(?:this|the|your) (?:request|prompt|input|content|image|video|response)s? (?:\w+ ){1,3}"
    r"(?:blocked|flagged|filtered|rejected|refused|withheld|polic(?:y|ies)\b))",
    re.IGNORECASE,
)
_OPEN_SLOT = re.compile(rf"\][^\[\]\n]*\[[^\[\]\n]{{0,{MAX_SLOT}}}\Z")
_ALL_SLOTS = re.compile(rf"(?:\[[^\[\]]*\]\s*){{{len(SLOTS)}}}")
_TOKENS = re.compile(r" tokens (\d+)\b")
_MOST_LETTERS = 2.5  # per token: prose of fewer letters did not use up its tokens


def read_answer(text: str, cut: bool = False) -> str | NoAnswer:
    """Take the answer out of what a model said.

    Args:
        text: All it said, of any length and content.
        cut: The model had no tokens left to end by itself.

    Returns:
        The answer, without thoughts and wrapping, or why it is none.
    """
    said = _THOUGHTS_END.split(text)[-1]
    if _THOUGHTS_BEGIN.search(said):
        return NoAnswer("it thinks, and comes to no answer")
    boxed = _BOX.search(said)
    said = ((boxed[1] or boxed[2] or "") if boxed else said)[:MAX_READ]
    if not clean_text(said, MAX_TEXT):
        return NoAnswer("it says nothing")
    if _REFUSAL.match(said) and parse_reply(said).status not in ("slots", "null"):
        return NoAnswer(f"it refuses: '{clean_text(said, 80)}'")
    if (cut and not _is_whole(said)) or _breaks_off(said):
        return NoAnswer("its answer is cut short")
    return said if text.startswith(said) else said.strip()


def count_thoughts(text: str) -> int:
    """Number of thoughts that have come to their end."""
    return len(_THOUGHTS_END.findall(text))


def stored_fault(label: StoredLabel) -> str | None:
    """Tell why a stored label is no answer; None if it is one.

    Stored texts are shortened and do not say how they ended, so this is judged by their looks:
    prose that used up its tokens and ends inside a sentence counts as cut.
    """
    if _THOUGHTS_BEGIN.search(label.text) or _THOUGHTS_END.search(label.text):
        return "thoughts instead of an answer"
    shortened = len(label.text) >= MAX_TEXT - 1
    found = read_answer(label.text)
    if isinstance(found, NoAnswer):
        return None if shortened and _breaks_off(label.text) else found.reason
    tokens = _TOKENS.search(label.describer)
    if tokens is None or label.status not in ("prose", "unreadable") or shortened:
        return None
    ends = label.text.rstrip("\"'*`)]}")[-1:] in (".", "!", "?")
    if not ends and len(label.text) >= _MOST_LETTERS * int(tokens[1]):
        return "its answer is cut short"
    return None


def _is_whole(text: str) -> bool:
    """Whether all five slots are there, so that only chatter after them is missing."""
    return _ALL_SLOTS.search(text) is not None or _holds_object(text)


def _breaks_off(text: str) -> bool:
    """Whether the text ends inside a slot or a JSON object."""
    said = text.strip().strip("`").removeprefix("json").strip()
    if said.startswith("{"):
        return "}" not in said
    return _OPEN_SLOT.search(said[-4 * MAX_SLOT :]) is not None and not _is_whole(said)


def _holds_object(text: str) -> bool:
    start, end = text.find("{"), text.rfind("}")
    try:
        return 0 <= start < end and isinstance(json.loads(text[start : end + 1]), dict)
    except (ValueError, RecursionError):
        return False
