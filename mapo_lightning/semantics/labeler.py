"""Labels windows of frames: looks labels up, and queries the describer about new windows only."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.semantics.answers import read_answer
from mapo_lightning.semantics.describer import (
    CaptionReader,
    Describer,
    NoAnswer,
    NullDescriber,
    Reply,
    StreamingDescriber,
)
from mapo_lightning.semantics.embed import Encoder
from mapo_lightning.semantics.phrase import (
    MAX_SOURCE,
    MAX_TEXT,
    Phrase,
    Status,
    clean_text,
    parse_reply,
)
from mapo_lightning.semantics.reviews import Reviews
from mapo_lightning.semantics.server_pool import is_ending
from mapo_lightning.semantics.store import LabelStore, StoredLabel
from mapo_lightning.types import DescriberError, Frames

log = logging.getLogger(__name__)

_BATCH = 64  # windows decoded and queried at once: bounds memory
_POLL_SECONDS = (0.01, 0.2)  # first and longest pause while another process holds a window
_PATIENCE_SECONDS = 60.0  # wait for another process after which a warning is logged
_NAMED = 20  # windows without an answer that are named in the log
_IN_VAIN = 32  # windows without any answer at all after which the describer counts as unusable
_NOTHING = StoredLabel("null", "null", None, None, NullDescriber.name, "")


class WindowRequest(NamedTuple):
    """A request for the label of one window of frames."""

    identity: str
    """Names the content: fingerprint of the file with frames and size, or hash of the pixels."""
    source: str
    """For people: ``video.mp4 frames 12..15 step 1``."""
    frames: Callable[[], Frames]
    """Fetches the window, (T, H, W, 3) uint8; called only if the label is not stored."""
    caption: str = ""
    """Sentence that came with the video about this window; part of the identity, where describers
    read it."""


class Label(NamedTuple):
    """A label, ready for a batch."""

    vector: NDArray[np.float32]
    """(V,); zero if not known."""
    known: bool
    """False for null and unreadable answers."""
    text: str
    status: Status
    phrase: Phrase | None
    asked: bool = False
    """True if the describer was queried for it just now."""
    answered: bool = True
    """False if the query got no answer: null for now, not stored, queried again later."""
    rejected: bool = False
    """True if a person has rejected the answer, which then counts as null."""
    corrected: bool = False
    """True if the phrase is a person's, in place of the answer."""


class LabelStats(NamedTuple):
    """Counts of windows since the labeler was made."""

    asked: int = 0
    """Windows that the describer was queried about."""
    hits: int = 0
    """Windows whose label was in the store, or came from another process."""
    null: int = 0
    """Windows, queried or not, about which the answer is that nothing significant happens."""
    unreadable: int = 0
    """Windows, queried or not, whose answer could not be read; treated as null."""
    unanswered: int = 0
    """Windows that the describer was queried about without an answer; not stored."""
    rejected: int = 0
    """Windows whose label a person has rejected; treated as null."""
    corrected: int = 0
    """Windows whose label a person has corrected."""


class Labeler:
    """Labels windows of frames; the describer is queried once about each distinct window.

    The result does not depend on how the requests are split into calls. Threads may share it.

    Args:
        describer: Answers about windows that are not in the store.
        store: Keeps the answers.
        encoder: Turns an answer into a vector.
        reviews: A person's verdicts on answers; rejected ones count as null, corrected ones say
            what the person has written.
        cached_only: Never query the describer; a window that is not in the store is an error.
    """

    def __init__(
        self,
        describer: Describer,
        store: LabelStore,
        encoder: Encoder,
        reviews: Reviews | None = None,
        cached_only: bool = False,
    ) -> None:
        self.describer, self.store, self.encoder = describer, store, encoder
        self.reviews, self.cached_only = reviews or Reviews(), cached_only
        self.semantic_dim = encoder.semantic_dim
        self.stats = LabelStats()
        self._answers = self._missing = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        """Leave out the lock, which belongs to this process."""
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Make a lock for the new process."""
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
                f"vlm.cached_only=true, but there is no label of {first:.256} ({len(unknown)} of "
                f"{len(keys)} windows have none) by '{self.describer.name}' in "
                f"'{self.store.root}'. Label the videos with stage=label, or import labels"
            )
        fresh = self._complete(unknown, known) if unknown else set()
        labels = []
        for key in keys:
            label = self._embed(key, known[key] or _NOTHING)
            labels.append(label._replace(asked=key in fresh, answered=known[key] is not None))
            fresh.discard(key)  # a window that is requested twice is queried once
        self._count(labels, hits=sum(not x.asked and x.answered for x in labels))
        return labels

    def lookup(self, requests: Sequence[WindowRequest]) -> list[Label | None]:
        """Return the labels in the store, None for other windows; queries and counts nothing."""
        keys = [self._key(request.identity) for request in requests]
        known = self.store.get(keys)
        return [self._embed(key, known[key]) if key in known else None for key in keys]

    def _complete(
        self, unknown: dict[str, WindowRequest], known: dict[str, StoredLabel | None]
    ) -> set[str]:
        """Add answers for ``unknown`` to ``known``: our own, and those of other processes.

        Returns:
            Keys that the describer was queried about here.
        """
        asked: set[str] = set()
        since, pause = time.monotonic(), _POLL_SECONDS[0]
        while unknown:
            batch = list(unknown)[:_BATCH]
            ours = self.store.locks.take(batch)
            try:
                # Some may have been answered between the look-up and our lock.
                known.update(self.store.get(batch))
                todo = {key: unknown[key] for key in ours if key not in known}
                asked.update(todo)
                for answered in self._query(todo):
                    known.update(answered)
            finally:
                self.store.locks.release(ours)
            unknown = {key: r for key, r in unknown.items() if key not in known}
            if ours or not unknown:
                since, pause = time.monotonic(), _POLL_SECONDS[0]
                continue
            if time.monotonic() - since > _PATIENCE_SECONDS:
                log.warning("waiting for %d labels from another process", len(unknown))
                since = time.monotonic()
            if is_ending():
                raise DescriberError("the program ends while it waits for another process")
            time.sleep(pause)
            pause = min(1.5 * pause, _POLL_SECONDS[1])
        return asked

    def unknown(self, requests: Sequence[WindowRequest]) -> list[WindowRequest]:
        """Return the requests whose label is not in the store; queries nothing."""
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

    def _query(self, todo: dict[str, WindowRequest]) -> Iterator[dict[str, StoredLabel | None]]:
        """Query the describer; answers are stored before they are yielded."""
        if not todo:
            return
        keys = list(todo)
        for answered in self._replies(list(todo.values())):
            found: dict[str, StoredLabel | None] = {}
            for number, reply in answered.items():
                key = keys[number]
                found[key] = self._read(reply, todo[key].source)
            self.store.put({key: label for key, label in found.items() if label is not None})
            yield found

    def _replies(
        self, requests: Sequence[WindowRequest]
    ) -> Iterator[Mapping[int, Reply | NoAnswer]]:
        if isinstance(self.describer, CaptionReader):
            yield dict(enumerate(self.describer.read([request.caption for request in requests])))
            return
        clips = [request.frames() for request in requests]
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

    def _read(self, reply: Reply | NoAnswer, source: str) -> StoredLabel | None:
        """Make a label of a reply; None if it is no answer."""
        source = clean_text(source, MAX_SOURCE)
        known = Reply("") if isinstance(reply, NoAnswer) else reply
        answer = reply if isinstance(reply, NoAnswer) else read_answer(reply.text)
        if isinstance(answer, NoAnswer):
            self._note_missing(answer, source)
            return None
        with self._lock:
            self._answers += 1
        phrase, status = parse_reply(answer)
        phrase = known.phrase or phrase if phrase else None
        text = clean_text(answer, MAX_TEXT)
        if status == "unreadable":
            log.warning("unreadable reply about %.256s, counts as null: %.80r", source, text)
        return StoredLabel(text, status, phrase, known.hidden, self.describer.name, source)

    def _note_missing(self, missing: NoAnswer, source: str) -> None:
        """Name a window without an answer; there is no point in going on if all are like it.

        Raises:
            DescriberError: None of the first windows got an answer.
        """
        if missing.outage:
            return
        with self._lock:
            self._missing += 1
            count, answers = self._missing, self._answers
        if count <= _NAMED:
            last = "; further ones are only counted" if count == _NAMED else ""
            log.warning("no label of %.256s: %s%s", source, missing.reason, last)
        if count >= _IN_VAIN and not answers:
            raise DescriberError(
                f"'{self.describer.name}' has answered none of {count} windows, the last one "
                f"because: {missing.reason}. A model that thinks first needs a larger "
                "vlm.max_new_tokens; otherwise choose another with vlm.model=..."
            )

    def _embed(self, key: str, label: StoredLabel) -> Label:
        rejected, corrected = key in self.reviews.rejected, self.reviews.corrected.get(key)
        if rejected:
            label = label._replace(phrase=None, status="null")
        elif corrected is not None:
            label = label._replace(phrase=corrected, status="slots", hidden=None)
        if label.phrase is None:
            vector = np.zeros(self.semantic_dim, np.float32)
        else:
            vector = self.encoder.encode(label.phrase, label.hidden)
        known = label.phrase is not None
        found = Label(vector, known, label.text, label.status, label.phrase)
        return found._replace(rejected=rejected, corrected=corrected is not None)

    def _count(self, labels: Sequence[Label], hits: int) -> None:
        with self._lock:
            self.stats = LabelStats(
                asked=self.stats.asked + sum(label.asked for label in labels),
                hits=self.stats.hits + hits,
                null=self.stats.null + sum(x.status == "null" and x.answered for x in labels),
                unreadable=self.stats.unreadable + sum(x.status == "unreadable" for x in labels),
                unanswered=self.stats.unanswered + sum(not label.answered for label in labels),
                rejected=self.stats.rejected + sum(label.rejected for label in labels),
                corrected=self.stats.corrected + sum(label.corrected for label in labels),
            )


def label_key(describer: str, identity: str) -> str:
    """Return the key under which a describer's answer about a window is stored."""
    return hashlib.blake2b(f"{describer}\x00{identity}".encode(), digest_size=16).hexdigest()


def frames_identity(frames: Frames) -> str:
    """Name frames by their content: shape and pixels."""
    digest = hashlib.blake2b(str(frames.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(frames).data)
    return f"pixels {digest.hexdigest()}"
