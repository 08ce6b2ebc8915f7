"""Episodes as plain numpy files: one structured array of entries each, no pickle.

A file that exists is complete: it is written under another name and then renamed.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.files import DRAFT, atomic_write
from mapo_lightning.types import MapoError

_OPEN_MAPS = 256  # memory maps kept; each costs a file descriptor
_INDEX = "index.json"


class ReplayError(MapoError):
    """Experience cannot be stored, or cannot be sampled as requested."""


class ReplaySpec(NamedTuple):
    """Shapes of one entry."""

    image_shape: tuple[int, int, int]
    """Height, width and 3."""
    action_dim: int
    """Numbers A of an action."""
    semantic_dim: int
    """Numbers V of an embedded phrase."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """One entry of an episode; keys as in ``mapo_lightning.types``."""
        return np.dtype(
            [
                ("obs", np.uint8, tuple(self.image_shape)),
                ("action", np.float32, (self.action_dim,)),
                ("reward", np.float32),
                ("is_first", np.bool_),
                ("is_last", np.bool_),
                ("is_terminal", np.bool_),
                ("semantic", np.float16, (self.semantic_dim,)),
                ("has_semantic", np.bool_),
                ("position", np.int64),
            ]
        )


class GrowingEpisode:
    """An episode in progress, in memory: a block of entries that doubles when it is full.

    Args:
        dtype: Of an entry.
        entries: Those it begins with, (length,).
    """

    def __init__(self, dtype: np.dtype[Any], entries: Sequence[Any] | NDArray[Any] = ()) -> None:
        self.length = len(entries)
        self._block = np.zeros(max(64, self.length), dtype)
        if self.length:
            self._block[: self.length] = entries

    @property
    def entries(self) -> NDArray[Any]:
        """The entries so far, (length,), writable."""
        return self._block[: self.length]

    def append(self, step: Mapping[str, Any]) -> None:
        """Copy one entry in.

        Raises:
            ReplayError: A value has a wrong shape; nothing is appended then.
        """
        if self.length == len(self._block):
            self._block = np.concatenate([self._block, np.zeros_like(self._block)])
        entry = self._block[self.length]
        for name in self._block.dtype.names or ():
            value = np.asarray(step[name])
            if value.shape != entry[name].shape:
                raise ReplayError(
                    f"'{name}' must have the shape {entry[name].shape}, got {value.shape}"
                )
            entry[name] = value
        self.length += 1


class EpisodeFolder:
    """The files of a replay: ``episode-000000012.npy`` and ``index.json``.

    Args:
        root: Made if missing.
        dtype: Of one entry; files of another are refused.
    """

    def __init__(self, root: Path, dtype: np.dtype[Any]) -> None:
        self.root, self._dtype = root, dtype
        self._maps: OrderedDict[int, NDArray[Any]] = OrderedDict()
        root.mkdir(parents=True, exist_ok=True)

    def path(self, episode: int) -> Path:
        """Where an episode lies."""
        return self.root / f"episode-{episode:09d}.npy"

    def write(self, episode: int, entries: NDArray[Any]) -> None:
        """Store an episode, (N + 1,) entries; an older version is replaced.

        Raises:
            ReplayError: The disk is full or cannot be written.
        """
        self._maps.pop(episode, None)
        path = self.path(episode)
        try:
            with atomic_write(path, sole_writer=True) as draft, draft.open("wb") as file:
                np.save(file, entries, allow_pickle=False)
        except OSError as error:
            raise _unwritable(path, error) from error

    def open(self, episode: int, *, writable: bool = False) -> NDArray[Any]:
        """Map an episode into memory, (N + 1,) entries; most recent maps are kept.

        Raises:
            ReplayError: The file is missing, damaged, or holds entries of other shapes.
        """
        if writable:
            return self._load(episode, "r+")
        entries = self._maps.get(episode)
        if entries is None:
            entries = self._maps[episode] = self._load(episode, "r")
            if len(self._maps) > _OPEN_MAPS:
                self._maps.popitem(last=False)
        self._maps.move_to_end(episode)
        return entries

    def delete(self, episode: int) -> None:
        """Remove an episode, if it is there."""
        self._maps.pop(episode, None)
        self.path(episode).unlink(missing_ok=True)

    def delete_all_but(self, episodes: set[int]) -> None:
        """Remove every other episode, and the drafts that interrupted writes have left."""
        kept = {self.path(episode) for episode in episodes}
        for path in [*self.root.glob("episode-*.npy"), *self.root.glob(f"*{DRAFT}")]:
            if path not in kept:
                path.unlink()

    def write_index(self, index: Mapping[str, Any]) -> None:
        """Replace the index; it survives a power cut.

        Raises:
            ReplayError: The disk is full or cannot be written.
        """
        path = self.root / _INDEX
        try:
            with atomic_write(path, durable=True, sole_writer=True) as draft:
                draft.write_text(json.dumps(index))
        except OSError as error:
            raise _unwritable(path, error) from error

    def read_index(self) -> Any:
        """Read the index as it stands; the caller checks what is in it.

        Raises:
            ReplayError: It is missing or not JSON.
        """
        path = self.root / _INDEX
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ReplayError(
                f"cannot read the replay index '{path}': {error}. Resuming needs the folder that "
                "the checkpoint was written beside; without it, start a new run."
            ) from error

    def _load(self, episode: int, mode: Any) -> NDArray[Any]:
        path = self.path(episode)
        try:
            entries = np.load(path, mmap_mode=mode, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ReplayError(f"cannot read the episode '{path}': {error}") from error
        if not isinstance(entries, np.ndarray) or entries.dtype != self._dtype:
            raise ReplayError(
                f"the episode '{path}' holds other entries than this run writes: the size of "
                "images, actions or phrases has changed. Use another folder."
            )
        return entries


def _unwritable(path: Path, error: OSError) -> ReplayError:
    return ReplayError(
        f"cannot write '{path}': {error.strerror or error}. Free some disk space, or lower "
        "replay.capacity; what was written before is intact."
    )
