"""From windows of frames to labels: look up, ask only about what is new, remember."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.semantics.describer import (
    Describer,
    NullDescriber,
    Reply,
    StreamingDescriber,
)
from mapo_lightning.semantics.embed import Encoder
from mapo_lightning.semantics.phrase import MAX_TEXT, Phrase, Status, clean_text, parse_reply
from mapo_lightning.semantics.reviews import Marks
from mapo_lightning.semantics.server_pool import is_ending
from mapo_lightning.semantics.store import LabelStore, StoredLabel
from mapo_lightning.types import DescriberError, Frames

log = logging.getLogger(__name__)

_BATCH = 64  # windows decoded and asked about at once: bounds memory
_POLL_SECONDS = (0.01, 0.2)  # first and longest pause while another process is asking
_PATIENCE_SECONDS = 60.0  # how long another process may take to answer before we say so
_NOTHING = StoredLabel("null", "null", None, None, NullDescriber.name, "")


class WindowRequest(NamedTuple):
    """A question about one window of frames."""

    identity: str
    """Names the content: file fingerprint, frames and size, or a hash of the pixels."""
    source: str
    """For people: ``video.mp4 frames 12..15 step 1``."""
    frames: Callable[[], Frames]
    """Fetches the window, (T, H, W, 3) uint8; called only if nobody knows the answer."""


class Label(NamedTuple):
    """The answer, ready for a batch."""

    vector: NDArray[np.float32]
    """(V,); zero where not known."""
    known: bool
    """False for null and unreadable answers."""
    text: str
    status: Status
    phrase: Phrase | None
    asked: bool = False
    """True if the describer was asked for it just now."""
    answered: bool = True
    """False if it was asked and had no answer: null for now, not stored, asked again later."""
    rejected: bool = False
    """True if a person has rejected the answer, which then counts as null."""


class LabelStats(NamedTuple):
    """Counts of windows since the labeler was made."""

    asked: int = 0
    """Windows the describer was asked about."""
    hits: int = 0
    """Windows whose answer was in the store already, or came from another process."""
    null: int = 0
    """Windows, asked or not, in which nothing significant happens."""
    unreadable: int = 0
    """Windows, asked or not, whose answer could not be read; treated as null."""
    unanswered: int = 0
    """Windows the describer was asked about without getting an answer; not stored."""
    rejected: int = 0
    """Windows whose label a person has rejected; treated as null."""


class Labeler:
    """Labels windows of frames; every distinct window is asked about once, ever.

    The result does not depend on how the requests are split into calls. Threads may share it.

    Args:
        describer: Who is asked.
        store: Where answers are kept and found.
        encoder: How an answer becomes a vector.
        marks: What a person thinks of the answers; rejected ones count as null.
        cached_only: Ask nobody; a window that is not in the store is an error.
    """

    def __init__(
        self,
        describer: Describer,
        store: LabelStore,
        encoder: Encoder,
        marks: Marks | None = None,
        cached_only: bool = False,
    ) -> None:
        self.describer, self.store, self.encoder = describer, store, encoder
        self.marks, self.cached_only = marks or Marks(), cached_only
        self.semantic_dim = encoder.semantic_dim
        self.stats = LabelStats()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        """Travel to another process without what belongs to this one's threads."""
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Give the new process its own."""
        self.__dict__ |= state
        self._lock = threading.Lock()

    def label(self, requests: Sequence[WindowRequest]) -> list[Label]:
        """Label windows, one label per request, in order.

        Raises:
            DescriberError: The describer or the store failed.
            VideoError: The frames of a window could not be fetched; nothing is stored for it.
        """
        if isinstance(self.describer, NullDescriber):  # no frames fetched, no store made
            labels = [self._embed("", _NOTHING)] * len(requests)
            self._count(labels, hits=0)
            return labels
        keys = [self._key(request.identity) for request in requests]
        known: dict[str, StoredLabel | None] = dict(self.store.get(keys))
        unknown = {k: r for k, r in zip(keys, requests, strict=True) if k not in known}
        if unknown and self.cached_only:
            first = next(iter(unknown.values())).source
            raise DescriberError(
                f"vlm.cached_only=true, but nobody has labelled {first} ({len(unknown)} windows of "
                f"{len(keys)} are missing) as '{self.describer.name}' in '{self.store.root}'. "
                "Label the videos with stage=label, or import labels"
            )
        fresh = self._complete(unknown, known) if unknown else set()
        labels = []
        for key in keys:
            label = self._embed(key, known[key] or _NOTHING)
            labels.append(label._replace(asked=key in fresh, answered=known[key] is not None))
            fresh.discard(key)  # the same window twice was asked about once
        self._count(labels, hits=sum(not x.asked and x.answered for x in labels))
        return labels

    def lookup(self, requests: Sequence[WindowRequest]) -> list[Label | None]:
        """Labels of windows as far as the store has them; asks and counts nothing."""
        keys = [self._key(request.identity) for request in requests]
        known = self.store.get(keys)
        return [self._embed(key, known[key]) if key in known else None for key in keys]

    def _complete(
        self, unknown: dict[str, WindowRequest], known: dict[str, StoredLabel | None]
    ) -> set[str]:
        """Add the answers for ``unknown`` to ``known``: our own, and those of other processes.

        Returns:
            Keys that the describer was asked about here.
        """
        asked: set[str] = set()
        since, pause = time.monotonic(), _POLL_SECONDS[0]
        while unknown:
            batch = list(unknown)[:_BATCH]
            ours = self.store.claims.take(batch)
            try:
                # Answered between our look-up and our claim?
                known.update(self.store.get(batch))
                todo = {key: unknown[key] for key in ours if key not in known}
                asked.update(todo)
                for answered in self._ask(todo):
                    known.update(answered)
            finally:
                self.store.claims.release(ours)
            unknown = {key: r for key, r in unknown.items() if key not in known}
            if ours or not unknown:
                since, pause = time.monotonic(), _POLL_SECONDS[0]
                continue
            if time.monotonic() - since > _PATIENCE_SECONDS:
                log.warning("%d labels are still asked for by another process", len(unknown))
                since = time.monotonic()
            if is_ending():
                raise DescriberError("the program ends while another process is asked")
            time.sleep(pause)
            pause = min(1.5 * pause, _POLL_SECONDS[1])
        return asked

    def unknown(self, requests: Sequence[WindowRequest]) -> list[WindowRequest]:
        """Return those whose answer is not in the store; asks nobody."""
        keys = [self._key(request.identity) for request in requests]
        known = self.store.get(keys)
        return [r for key, r in zip(keys, requests, strict=True) if key not in known]

    def label_frames(self, windows: Sequence[Frames], source: str) -> list[Label]:
        """Label windows known only by their pixels, such as those of an environment.

        Args:
            windows: Each (T, H, W, 3) uint8.
            source: For people: where they come from.
        """
        return self.label(
            [WindowRequest(frames_identity(w), source, lambda w=w: w) for w in windows]  # type: ignore[misc]
        )

    def close(self) -> None:
        """Close the store's files."""
        self.store.close()

    def _key(self, identity: str) -> str:
        return label_key(self.describer.name, identity)

    def _ask(self, todo: dict[str, WindowRequest]) -> Iterator[dict[str, StoredLabel | None]]:
        """Ask the describer; every yield is stored already."""
        if not todo:
            return
        keys, clips = list(todo), [request.frames() for request in todo.values()]
        for answered in self._replies(clips):
            found: dict[str, StoredLabel | None] = {}
            for number, reply in answered.items():
                key = keys[number]
                found[key] = None if reply is None else self._read(reply, todo[key].source)
            self.store.put({key: label for key, label in found.items() if label is not None})
            yield found

    def _replies(self, clips: Sequence[Frames]) -> Iterator[Mapping[int, Reply | None]]:
        if isinstance(self.describer, StreamingDescriber):
            yield from self.describer.describe_each(clips)
            return
        replies = self.describer.describe(clips)
        if len(replies) != len(clips):
            raise DescriberError(
                f"describer '{self.describer.name}' gave {len(replies)} replies for {len(clips)} "
                "windows; its `describe` must return one per window, in order."
            )
        yield dict(enumerate(replies))

    def _read(self, reply: Reply, source: str) -> StoredLabel:
        phrase, status = parse_reply(reply.text)
        text, source = clean_text(reply.text, MAX_TEXT), clean_text(source, MAX_TEXT)
        if status == "unreadable":
            log.warning("unreadable reply about %s, counts as null: %.80r", source, text)
        return StoredLabel(text, status, phrase, reply.hidden, self.describer.name, source)

    def _embed(self, key: str, label: StoredLabel) -> Label:
        rejected = key in self.marks.rejected
        if rejected:
            label = label._replace(phrase=None, status="null")
        if label.phrase is None:
            vector = np.zeros(self.semantic_dim, np.float32)
        else:
            vector = self.encoder.encode(label.phrase, label.hidden)
        known = label.phrase is not None
        return Label(vector, known, label.text, label.status, label.phrase, rejected=rejected)

    def _count(self, labels: Sequence[Label], hits: int) -> None:
        with self._lock:
            self.stats = LabelStats(
                asked=self.stats.asked + sum(label.asked for label in labels),
                hits=self.stats.hits + hits,
                null=self.stats.null + sum(label.status == "null" for label in labels),
                unreadable=self.stats.unreadable + sum(x.status == "unreadable" for x in labels),
                unanswered=self.stats.unanswered + sum(not label.answered for label in labels),
                rejected=self.stats.rejected + sum(label.rejected for label in labels),
            )


def label_key(describer: str, identity: str) -> str:
    """Return the key under which a describer's answer about a window is kept."""
    return hashlib.blake2b(f"{describer}\x00{identity}".encode(), digest_size=16).hexdigest()


def frames_identity(frames: Frames) -> str:
    """Name frames by their content: shape and pixels."""
    digest = hashlib.blake2b(str(frames.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(frames).data)
    return f"pixels {digest.hexdigest()}"
