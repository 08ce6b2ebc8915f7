"""What the world model believes, and what it gives back.

Shapes: B batch, T time, E embed.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mapo_lightning.models.rssm_world.consistency import LatentAction
from mapo_lightning.models.rssm_world.rssm import RSSMState


class Belief(NamedTuple):
    """State of every dynamics in use; leading axes (B,) or (B, T)."""

    lower: RSSMState | None
    upper: RSSMState | None

    @property
    def control(self) -> RSSMState:
        """State that heads, actor and decoder read: the upper one where there is one (O22)."""
        state = self.upper or self.lower
        assert state is not None
        return state

    def at(self, t: int) -> Belief:
        """Belief at one time, (B, T, ...) -> (B, ...)."""
        return Belief(*(None if s is None else RSSMState(*(x[:, t] for x in s)) for s in self))


class Observed(NamedTuple):
    """What following a sequence of frames gives."""

    belief: Belief  # posterior states, axes (B, T)
    embed: Tensor  # (B, T, E)
    prior: dict[str, tuple[RSSMState, Tensor]]  # "lower" / "upper": posterior state, prior logits
    terms: dict[str, Tensor]  # scalar terms of the action source
    latent: LatentAction | None  # actions inferred from the frames, if they were


class Fit(NamedTuple):
    """One evaluation of the world model's loss."""

    total: Tensor  # scalar to back-propagate
    log: dict[str, Tensor]  # unscaled terms and diagnostics, detached scalars
    belief: Belief  # posterior states, axes (B, T)
