"""What dreams are judged on: clips with what drives them, and what changes when they are misled.

Shapes: C clips, T frames, H W image, A action, V semantic vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mapo_lightning.models.interfaces import Driver
from mapo_lightning.training.told import of_another
from mapo_lightning.types import Batch

MISLED = ("random", "swapped", "negated", "null")
"""Ways to mislead a dream after the last frame that it was shown."""


class Clips(NamedTuple):
    """Sequences with the truth of what follows, for judging dreams."""

    batch: Batch
    """Keys of `types`, axes (C, T)."""
    group: Tensor
    """(C,) clips of one number come from one video or episode."""
    still: Tensor
    """(C, H, W, 3) in [0, 1]: the still scene, the median picture of the whole video."""
    mean_picture: Tensor
    """(H, W, 3) in [0, 1]: mean frame of other videos."""
    driver: Driver
    """What leads the dream: the phrases, or the robot's actions."""
    direction: slice | None = None
    """Entries of a semantic vector that name a direction and point the other way when negated."""

    @property
    def truth(self) -> Tensor:
        """Frames (C, T, H, W, 3) in [0, 1]."""
        return self.batch["obs"].float() / 255.0

    @property
    def steps(self) -> int:
        """Frames T of a clip."""
        return self.batch["obs"].shape[1]

    def to(self, device: torch.device) -> Clips:
        """The same on another device."""
        batch = {key: value.to(device) for key, value in self.batch.items()}
        return self._replace(
            batch=batch,
            group=self.group.to(device),
            still=self.still.to(device),
            mean_picture=self.mean_picture.to(device),
        )


def yardsticks(clips: Clips, seen: int) -> Mapping[str, Tensor]:
    """Dreams that need no model, (C, T, H, W, 3): copying, still scene, mean picture, the truth."""
    truth = clips.truth
    frames = {
        "copy": truth[:, seen - 1 : seen],
        "still_scene": clips.still[:, None],
        "mean_picture": clips.mean_picture,
        "oracle": truth,
    }
    return {name: picture.expand_as(truth) for name, picture in frames.items()}


def misled(clips: Clips, seen: int, seed: int = 0) -> Mapping[str, Batch]:
    """The clips with other drivers after ``seen`` frames, by name.

    ``random``: actions drawn uniformly, or phrases drawn from all clips; ``swapped``: those of a
    clip of another group; ``negated``: the opposite action, or the opposite direction, where the
    phrases' vectors tell it; ``null``: no action, no phrase.

    Args:
        clips: Of two groups at least.
        seen: Frames that are shown, whose drivers stay as they are.
        seed: Of the random drivers.

    Raises:
        ValueError: All clips are of one group.
    """
    generator = torch.Generator().manual_seed(seed)
    if len(set(clips.group.tolist())) < 2:
        raise ValueError("clips of two videos or episodes are needed to swap what drives them")
    other = of_another(clips.group)
    if clips.driver == "action":
        action = clips.batch["action"]
        drawn = 2.0 * torch.rand(action.shape, generator=generator).to(action) - 1.0
        ways = {"random": drawn, "swapped": action[other], "negated": -action}
        ways["null"] = torch.zeros_like(action)
        return {name: clips.batch | {"action": _after(seen, action, x)} for name, x in ways.items()}
    return _misled_phrases(clips, seen, other, generator)


def _misled_phrases(
    clips: Clips, seen: int, other: Tensor, generator: torch.Generator
) -> Mapping[str, Batch]:
    semantic, known = clips.batch["semantic"], clips.batch["has_semantic"]
    count = known.numel()
    drawn = torch.randint(count, (count,), generator=generator).to(known.device)
    ways = {
        "random": (semantic.flatten(0, 1)[drawn].view_as(semantic), known.flatten()[drawn]),
        "swapped": (semantic[other], known[other]),
        "null": (semantic, torch.zeros_like(known)),
    }
    if clips.direction is not None:
        turned = semantic.clone()
        turned[..., clips.direction] *= -1.0
        ways["negated"] = (turned, known)
    return {
        name: clips.batch
        | {
            "semantic": _after(seen, semantic, vectors),
            "has_semantic": _after(seen, known, flags.view_as(known)),
        }
        for name, (vectors, flags) in ways.items()
    }


def _after(seen: int, before: Tensor, then: Tensor) -> Tensor:
    """``before`` up to the frames that were shown, ``then`` from there on; axes (C, T, ...)."""
    return torch.cat([before[:, :seen], then[:, seen:]], dim=1)
