"""Clips of fresh episodes, for judging the dreams that a robot's actions drive.

Shapes: N episodes, L entries of a clip, H W image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mapo_lightning.data.replay import Replay
from mapo_lightning.envs.collector import Collector
from mapo_lightning.envs.episodes import Policy
from mapo_lightning.judging.clips import Clips
from mapo_lightning.types import Batch

Entries = NDArray[Any]
"""One episode, (length,) structured entries as replay keeps them."""


class Judged(NamedTuple):
    """Episodes in two halves: some are judged, an inverse model learns from the others."""

    clips: Clips
    learned: Batch
    """Clips (M, L) of the others."""


def fresh(
    make: Callable[[], tuple[Collector, Replay]], policy: Policy, episodes: int
) -> list[Entries]:
    """Play whole episodes in environments of their own.

    Args:
        make: Opens environments and an empty replay.
        policy: Who plays.
        episodes: How many at least.

    Returns:
        Every whole episode, in the order in which they began.
    """
    collector, replay = make()
    try:
        while replay.episodes < episodes:
            collector.collect(policy, collector.envs.num_envs)
    finally:
        collector.close()  # waits for labels that are still to come
    return [np.array(entries) for entries in replay.whole()]


def halves(episodes: Sequence[Entries], seen: int, furthest: int, seed: int) -> Judged:
    """Cut one clip out of every second episode, and give the others to the inverse model.

    Clips are as long as three of four episodes allow, and no longer than ``seen + furthest``.
    Shorter episodes are left out.

    Args:
        episodes: Of several policies, one after the other.
        seen: Frames that are shown.
        furthest: The largest horizon.
        seed: Draws where in its episode a clip begins.

    Raises:
        ValueError: Fewer than four episodes are long enough for one dreamt frame.
    """
    usable = [entries for entries in episodes if len(entries) > seen]
    if len(usable) < 4:
        raise ValueError(
            f"four episodes with more than {seen} frames are needed, got {len(usable)} of "
            f"{len(episodes)}"
        )
    quarter = int(np.quantile([len(entries) for entries in usable], 0.25, method="lower"))
    length = min(seen + furthest, quarter)
    usable = [entries for entries in usable if len(entries) >= length]
    rng = np.random.default_rng(seed)
    judged, others = usable[::2], usable[1::2]
    starts = [int(rng.integers(len(entries) - length + 1)) for entries in judged]
    cut = [entries[a : a + length] for entries, a in zip(judged, starts, strict=True)]
    pieces = [
        entries[a : a + length]
        for entries in others
        for a in range(0, len(entries) - length + 1, length)
    ]
    pictures = np.concatenate([entries["obs"][:: max(1, len(entries) // 16)] for entries in others])
    clips = Clips(
        batch=_batch(cut),
        group=torch.arange(len(cut)),
        still=torch.stack([_median(entries["obs"]) for entries in judged]),
        mean_picture=torch.from_numpy(pictures.mean(axis=0, dtype=np.float64)).float() / 255.0,
        driver="action",
    )
    return Judged(clips, _batch(pieces))


def _batch(clips: Sequence[Entries]) -> Batch:
    """Axes (N, L); every clip begins a sequence."""
    stacked = np.stack(clips)
    names = stacked.dtype.names or ()
    batch = {name: torch.from_numpy(np.ascontiguousarray(stacked[name])) for name in names}
    batch["semantic"] = batch["semantic"].float()
    batch["is_first"] = batch["is_first"].clone()
    batch["is_first"][:, 0] = True
    return batch


def _median(obs: NDArray[np.uint8]) -> Tensor:
    """The still scene of an episode, (H, W, 3) in [0, 1]."""
    return torch.from_numpy(np.median(obs, axis=0).astype(np.float32)) / 255.0
