"""Replay buffer on disk: whole episodes go in, random chunks come out.

An episode in progress is kept in memory; when it ends, it becomes one file. Chunks are read through
memory maps, so memory does not grow with the replay.

`Replay.state` lists the episodes held at that moment. Files that the last two states list are not
deleted, so that a process killed while it writes a checkpoint leaves the previous one usable.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.data.episodes import EpisodeFolder, GrowingEpisode, ReplayError, ReplaySpec
from mapo_lightning.data.settings import ReplayConfig

__all__ = ["EntryId", "Replay", "ReplayConfig", "ReplayError", "ReplaySpec"]

log = logging.getLogger(__name__)


class EntryId(NamedTuple):
    """Where an entry went; valid until its episode is evicted."""

    episode: int  # counts the episodes begun, over all environments
    entry: int  # 0 is the first observation of the episode


class Replay:
    """Disk-backed replay of one process; several environments may write side by side.

    Args:
        root: Folder of the episodes, made if missing. What an earlier run left there is not
            sampled unless `restore` is called.
        cfg: How much is kept, and how chunks are drawn.
        spec: Shapes of an entry.
    """

    def __init__(self, root: Path, cfg: ReplayConfig, spec: ReplaySpec) -> None:
        self.cfg, self.spec = cfg, spec
        self.steps = 0
        """Agent steps in the whole episodes held."""
        self._folder = EpisodeFolder(Path(root), spec.dtype)
        self._keys = frozenset(spec.dtype.names or ())
        self._entries: dict[int, int] = {}  # episode -> its entries N + 1, oldest first
        self._open: dict[int, tuple[int, GrowingEpisode]] = {}  # env -> (episode, so far)
        self._next_episode = 0
        self._states: list[frozenset[int]] = []  # episodes that the last two states name
        self._index: dict[str, Any] | None = None  # the newest state

    @property
    def root(self) -> Path:
        """Folder of the episodes."""
        return self._folder.root

    @property
    def episodes(self) -> int:
        """Whole episodes held."""
        return len(self._entries)

    @property
    def begun(self) -> int:
        """Number of episodes begun, including those in progress and those evicted."""
        return self._next_episode

    def add(self, env_id: int, step: Mapping[str, Any]) -> EntryId:
        """Append one entry to the episode that an environment is in.

        Args:
            env_id: Which of the environments that write here.
            step: All keys of `ReplaySpec.dtype`, without leading axes. ``is_first`` begins an
                episode (an unfinished one is closed at its last entry), ``is_last`` ends it.

        Returns:
            Where the entry went, for `set_semantic`.

        Raises:
            ReplayError: Keys or shapes are wrong; no episode is in progress; an episode outgrows
                the capacity; or the disk is full.
        """
        if step.keys() != self._keys:
            raise ReplayError(
                f"a step must have the keys {', '.join(sorted(self._keys))}; missing or unknown: "
                f"{', '.join(sorted(step.keys() ^ self._keys))}"
            )
        if step["is_first"]:
            self._close(env_id, cut_short=True)
            self._open[env_id] = (self._next_episode, GrowingEpisode(self.spec.dtype))
            self._next_episode += 1
        if env_id not in self._open:
            raise ReplayError(
                f"environment {env_id} has no episode in progress: its first step must be is_first"
            )
        episode, growing = self._open[env_id]
        if growing.length > self.cfg.capacity:
            raise ReplayError(
                f"an episode of environment {env_id} has outgrown the whole replay, "
                f"{self.cfg.capacity} agent steps: set env.time_limit, or raise replay.capacity"
            )
        where = EntryId(episode, growing.length)
        growing.append(step)
        if step["is_last"]:
            self._close(env_id, cut_short=False)
        return where

    def set_semantic(
        self, where: EntryId, semantic: NDArray[Any], has_semantic: bool = True
    ) -> bool:
        """Fill in a label that arrived after its entry was written.

        Args:
            where: What `add` returned.
            semantic: Embedded phrase (V,).
            has_semantic: Whether there was a significant action.

        Returns:
            False if the episode has been evicted; nothing is written then.
        """
        in_progress = dict(self._open.values())
        if where.episode in in_progress:
            entries = in_progress[where.episode].entries
        elif where.episode in self._entries:
            entries = self._folder.open(where.episode, writable=True)
        else:
            return False
        entries["semantic"][where.entry] = semantic
        entries["has_semantic"][where.entry] = has_semantic
        return True

    @property
    def longest(self) -> int:
        """Entries of the longest whole episode; 0 without one."""
        return max(self._entries.values(), default=0)

    def whole(self) -> Iterator[NDArray[Any]]:
        """Every whole episode, oldest first: (length,) entries of `ReplaySpec.dtype`, read only.

        Raises:
            ReplayError: A file is damaged.
        """
        for episode in self._entries:
            yield self._folder.open(episode)

    def sample(
        self, rng: np.random.Generator, batch: int, length: int, *, joined: bool = True
    ) -> dict[str, NDArray[Any]]:
        """Draw chunks: an episode uniformly, then its start uniformly.

        An episode that is too short is taken whole, and the chunk goes on in another one, drawn in
        the same way, until it is full.

        Args:
            rng: Source of the draws.
            batch: Number B of chunks.
            length: Entries T of each.
            joined: False draws only from episodes that fill a chunk on their own.

        Returns:
            Arrays (B, T, ...), keys and types as in the tables of ``mapo_lightning.types``.
            ``is_first`` is true where a chunk goes on in another episode. At the chunk's own
            beginning it is as it was stored, so it is false in the middle of an episode.

        Raises:
            ReplayError: No whole episode is long enough, or a file was damaged meanwhile.
        """
        least = 1 if joined else length
        fitting = [e for e, entries in self._entries.items() if entries >= least]
        if not fitting:
            raise ReplayError(
                f"chunks of {length} entries were requested, but the longest of {self.episodes} "
                f"whole episodes has {self.longest}: collect more first, or request shorter chunks"
            )
        out = np.empty((batch, length), self.spec.dtype)
        for row in out:
            self._fill(row, rng, fitting)
        arrays = {name: np.ascontiguousarray(out[name]) for name in self.spec.dtype.names or ()}
        arrays["semantic"] = arrays["semantic"].astype(np.float32)
        return arrays

    def state(self) -> dict[str, Any]:
        """Write the index and the episodes in progress to disk.

        An episode in progress is listed with the number of its environment.

        Returns:
            The index, plain numbers, for a checkpoint.

        Raises:
            ReplayError: The disk is full.
        """
        for episode, growing in self._open.values():
            self._folder.write(episode, growing.entries)
        index = {
            "version": 2,
            "next_episode": self._next_episode,
            "episodes": [[episode, n] for episode, n in self._entries.items()],
            "open": [
                [episode, growing.length, env] for env, (episode, growing) in self._open.items()
            ],
        }
        self._folder.write_index(index)
        if index != self._index:  # a checkpoint may be written twice, under two names
            before = frozenset().union(*self._states)
            held = frozenset(self._entries) | {episode for episode, _ in self._open.values()}
            self._states, self._index = [*self._states[-1:], held], index
            for episode in before.difference(*self._states):
                self._folder.delete(episode)
        return index

    def restore(self, state: Mapping[str, Any] | None = None) -> int:
        """Return to a saved state, with its episodes in progress.

        Episodes written after that state are deleted, because the resumed run collects them
        again. Damaged or missing episodes are dropped with a warning each.

        Args:
            state: What `state` returned; None: the newest one in the folder.

        Returns:
            Agent steps in the episodes dropped.

        Raises:
            ReplayError: There is no state, or it is not one of a replay.
        """
        index = _checked(self._folder.read_index() if state is None else state)
        self._entries, self._open, self.steps = {}, {}, 0
        self._next_episode = index["next_episode"]
        # An environment's number is missing in states of version 1, whose episodes end here.
        in_progress = {episode: (env or [None])[0] for episode, _, *env in index["open"]}
        lost = 0
        for episode, entries, *_ in sorted([*index["episodes"], *index["open"]]):
            env = in_progress.get(episode)
            if entries < 2 and env is None:
                continue  # a first observation alone is no agent step
            try:
                self._restore_episode(episode, entries, env, episode in in_progress)
            except ReplayError as error:
                lost += entries - 1
                log.warning("replay: dropped an episode of %d steps: %s", entries - 1, error)
        held = set(self._entries) | {episode for episode, _ in self._open.values()}
        self._folder.delete_all_but(held)
        self._states, self._index = [frozenset(held)], None
        self._evict()
        return lost

    def _restore_episode(self, episode: int, entries: int, env: int | None, growing: bool) -> None:
        found = self._folder.open(episode)
        # An episode in progress may have continued after the state was saved.
        if len(found) < entries or (len(found) > entries and not growing):
            raise ReplayError(f"'{self._folder.path(episode)}' has {len(found)} entries")
        if env is not None:
            self._open[env] = (episode, GrowingEpisode(self.spec.dtype, found[:entries]))
            return
        if growing:
            kept = np.array(found[:entries])
            kept["is_last"][-1] = True
            self._folder.write(episode, kept)
        self._entries[episode] = entries
        self.steps += entries - 1

    def in_progress(self, env_id: int) -> NDArray[Any]:
        """The entries of an environment's episode in progress, (L + 1,); empty without one."""
        if env_id not in self._open:
            return np.zeros(0, self.spec.dtype)
        return self._open[env_id][1].entries

    def cut_short(self, env_id: int) -> None:
        """End an environment's episode in progress, if there is one, at its last entry."""
        self._close(env_id, cut_short=True)

    def _fill(self, row: NDArray[Any], rng: np.random.Generator, fitting: Sequence[int]) -> None:
        """Fill one chunk (T,) from as many of the ``fitting`` episodes as it takes."""
        filled = 0
        while filled < len(row):
            episode, needed = fitting[int(rng.integers(len(fitting)))], len(row) - filled
            start = self._draw_start(rng, self._entries[episode], needed)
            part = self._folder.open(episode)[start : start + needed]
            row[filled : filled + len(part)] = part
            if filled:
                row["is_first"][filled] = True
            filled += len(part)

    def _draw_start(self, rng: np.random.Generator, entries: int, length: int) -> int:
        if entries < length:
            return 0
        last = entries - length
        if not self.cfg.prioritize_ends:
            return int(rng.integers(last + 1))
        # All starts that would overrun the end stand for the last one (facts 6.2).
        return min(int(rng.integers(entries + 1)), last)

    def _close(self, env_id: int, *, cut_short: bool) -> None:
        """Turn the episode in progress into a file that can be sampled."""
        if env_id not in self._open:
            return
        episode, growing = self._open.pop(env_id)
        entries = growing.entries
        if len(entries) < 2:
            return
        if cut_short:
            entries["is_last"][-1] = True
        self._folder.write(episode, entries)
        self._entries[episode] = len(entries)
        self.steps += len(entries) - 1
        self._evict()

    def _evict(self) -> None:
        while self.steps > self.cfg.capacity and len(self._entries) > 1:
            episode = next(iter(self._entries))
            self.steps -= self._entries.pop(episode) - 1
            if not any(episode in state for state in self._states):
                self._folder.delete(episode)


def _checked(index: Any) -> Mapping[str, Any]:
    """Accept an index only if it is made of the numbers that `Replay.state` writes."""
    try:
        whole, growing, version = index["episodes"], index["open"], index["version"]
        numbers = [version, index["next_episode"], *(n for row in (*whole, *growing) for n in row)]
        # The first version did not say which environment an episode in progress is of.
        sound = version in (1, 2) and all(len(row) == 2 for row in whole)
        sound = sound and all(len(row) == version + 1 for row in growing)
    except (TypeError, KeyError) as error:
        raise ReplayError(f"this is not the state of a replay: {error!r}") from error
    if not sound or not all(type(n) is int and n >= 0 for n in numbers):
        raise ReplayError("this is not the state of a replay: version or numbers out of range")
    checked: Mapping[str, Any] = index
    return checked
