"""From windows of frames to labels: look up, ask only about what is new, remember."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.semantics.describer import Describer, NullDescriber, VlmConfig
from mapo_lightning.semantics.embed import Encoder, HashedSlots
from mapo_lightning.semantics.flow import FlowDescriber
from mapo_lightning.semantics.marks import Marks, read_marks
from mapo_lightning.semantics.phrase import MAX_TEXT, Phrase, Status, clean_text, parse_reply
from mapo_lightning.semantics.store import LabelStore, StoredLabel
from mapo_lightning.types import DescriberError, Frames

log = logging.getLogger(__name__)

_BATCH = 64  # windows decoded and asked about at once: bounds memory
_POLL_SECONDS = 0.01
_PATIENCE_SECONDS = 3600.0  # how long another process may take to answer before we complain
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
    rejected: int = 0
    """Windows whose label a person has rejected; treated as null."""


class Labeler:
    """Labels windows of frames; every distinct window is asked about once, ever.

    The result does not depend on how the requests are split into calls.

    Args:
        describer: Who is asked.
        store: Where answers are kept and found.
        encoder: How an answer becomes a vector.
        marks: What a person thinks of the answers; rejected ones count as null.
    """

    def __init__(
        self,
        describer: Describer,
        store: LabelStore,
        encoder: Encoder,
        marks: Marks | None = None,
    ) -> None:
        self.describer, self.store, self.encoder = describer, store, encoder
        self.marks = marks or Marks()
        self.semantic_dim = encoder.semantic_dim
        self.stats = LabelStats()

    def label(self, requests: Sequence[WindowRequest]) -> list[Label]:
        """Label windows, one label per request, in order.

        Raises:
            DescriberError: The describer or the store failed.
            VideoError: The frames of a window could not be fetched; nothing is stored for it.
        """
        if isinstance(self.describer, NullDescriber):  # no frames fetched, no store made
            labels = [self._embed(_NOTHING)] * len(requests)
            self._count(labels, asked=0, hits=0)
            return labels
        keys = [self._key(request.identity) for request in requests]
        known = self.store.get(keys)
        unknown = {k: r for k, r in zip(keys, requests, strict=True) if k not in known}
        asked = 0
        started = time.monotonic()
        while unknown:
            batch = list(unknown)[:_BATCH]
            ours = self.store.claims.take(batch)
            try:
                # Answered between our look-up and our claim?
                known |= self.store.get(batch)
                todo = {key: unknown[key] for key in ours if key not in known}
                known |= self._ask(todo)
                asked += len(todo)
            finally:
                self.store.claims.release(ours)
            unknown = {key: r for key, r in unknown.items() if key not in known}
            if not ours and unknown:  # another process is asking: wait for its answers
                if time.monotonic() - started > _PATIENCE_SECONDS:
                    raise DescriberError(
                        f"waited {_PATIENCE_SECONDS:.0f} s for {len(unknown)} labels that another "
                        f"process claims in '{self.store.claims.root}'. If none is running, "
                        "remove that folder."
                    )
                time.sleep(_POLL_SECONDS)
        rejected = self.marks.rejected
        known |= {
            key: known[key]._replace(phrase=None, status="null") for key in keys if key in rejected
        }
        labels = [self._embed(known[key]) for key in keys]
        count = sum(key in rejected for key in keys)
        self._count(labels, asked=asked, hits=len(labels) - asked, rejected=count)
        return labels

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

    def _ask(self, todo: dict[str, WindowRequest]) -> dict[str, StoredLabel]:
        if not todo:
            return {}
        replies = self.describer.describe([request.frames() for request in todo.values()])
        if len(replies) != len(todo):
            raise DescriberError(
                f"describer '{self.describer.name}' gave {len(replies)} replies for {len(todo)} "
                "windows; its `describe` must return one per window, in order."
            )
        fresh = {}
        for (key, request), reply in zip(todo.items(), replies, strict=True):
            phrase, status = parse_reply(reply.text)
            text, source = (clean_text(x, MAX_TEXT) for x in (reply.text, request.source))
            if status == "unreadable":
                log.warning("unreadable reply about %s, counts as null: %.80r", source, text)
            name = self.describer.name
            fresh[key] = StoredLabel(text, status, phrase, reply.hidden, name, source)
        self.store.put(fresh)
        return fresh

    def _embed(self, label: StoredLabel) -> Label:
        if label.phrase is None:
            vector = np.zeros(self.semantic_dim, np.float32)
        else:
            vector = self.encoder.encode(label.phrase, label.hidden)
        return Label(vector, label.phrase is not None, label.text, label.status, label.phrase)

    def _count(self, labels: Sequence[Label], *, asked: int, hits: int, rejected: int = 0) -> None:
        self.stats = LabelStats(
            asked=self.stats.asked + asked,
            hits=self.stats.hits + hits,
            null=self.stats.null + sum(label.status == "null" for label in labels),
            unreadable=self.stats.unreadable + sum(x.status == "unreadable" for x in labels),
            rejected=self.stats.rejected + rejected,
        )


def label_key(describer: str, identity: str) -> str:
    """Return the key under which a describer's answer about a window is kept."""
    return hashlib.blake2b(f"{describer}\x00{identity}".encode(), digest_size=16).hexdigest()


def frames_identity(frames: Frames) -> str:
    """Name frames by their content: shape and pixels."""
    digest = hashlib.blake2b(str(frames.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(frames).data)
    return f"pixels {digest.hexdigest()}"


def semantic_dim(cfg: VlmConfig) -> int:
    """Return the width V of the vectors that `build_labeler(cfg, ...)` will give."""
    return HashedSlots().semantic_dim


def build_describer(cfg: VlmConfig) -> Describer:
    """Build the describer a configuration asks for."""
    if cfg.kind == "flow":
        return FlowDescriber(min_percent=cfg.flow_min_percent)
    return NullDescriber()


def build_labeler(cfg: VlmConfig, root: Path, writer: str) -> Labeler:
    """Build the labeler a configuration asks for; cheap, opens nothing.

    Args:
        cfg: Who is asked, and where answers are kept.
        root: The run's work folder; a relative ``cfg.store`` lies inside it.
        writer: Name of this process in the store, such as ``rank0-worker1``.
    """
    # Flow is asked again for less than a wait for the disk costs; a model's answers are dear.
    store = LabelStore(Path(root) / cfg.store, writer, durable=cfg.kind != "flow")
    return Labeler(build_describer(cfg), store, HashedSlots(), read_marks(cfg.marks))
