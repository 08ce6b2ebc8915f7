"""What the stacked world model believes, and what it gives back.

Shapes: B batch, T time, E embed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from mapo_lightning.models.rssm_world.action_source import Driven
from mapo_lightning.models.rssm_world.dynamics import LatentState


class RSSMBelief(NamedTuple):
    """State of every dynamics in use; leading axes (B,) or (B, T)."""

    lower: LatentState | None
    upper: LatentState | None

    @property
    def control(self) -> LatentState:
        """State that heads, actor and decoder read: the upper one where there is one (O22)."""
        state = self.upper or self.lower
        assert state is not None
        return state

    @property
    def feat(self) -> Tensor:
        """Features of the control state, (..., F)."""
        return self.control.feat

    def at(self, t: int) -> RSSMBelief:
        """Belief at one time, (B, T, ...) -> (B, ...)."""
        return self._map(lambda state: state.at(t))

    def flatten(self) -> RSSMBelief:
        """Merge batch and time, (B, T, ...) -> (B*T, ...)."""
        return self._map(lambda state: state.flatten())

    def repeat(self, times: int) -> RSSMBelief:
        """Every row ``times`` times, (B, ...) -> (B*times, ...)."""
        return self._map(lambda state: state.repeat(times))

    def detach(self) -> RSSMBelief:
        """The same values without their graph."""
        return self._map(lambda state: state.detach())

    def _map(self, change: Callable[[LatentState], LatentState]) -> RSSMBelief:
        return RSSMBelief(*(None if state is None else change(state) for state in self))


class DreamtBelief(NamedTuple):
    """A state inside a dream, of which only the features are known."""

    feat: Tensor

    def at(self, t: int) -> DreamtBelief:
        """As `RSSMBelief.at`."""
        return DreamtBelief(self.feat[:, t])

    def flatten(self) -> DreamtBelief:
        """As `RSSMBelief.flatten`."""
        return DreamtBelief(self.feat.flatten(0, 1))

    def repeat(self, times: int) -> DreamtBelief:
        """As `RSSMBelief.repeat`."""
        return DreamtBelief(self.feat.repeat_interleave(times, dim=0))

    def detach(self) -> DreamtBelief:
        """As `RSSMBelief.detach`."""
        return DreamtBelief(self.feat.detach())


class Followed(NamedTuple):
    """What following a sequence of frames gives."""

    belief: RSSMBelief  # posterior states, axes (B, T)
    embed: Tensor  # (B, T, E)
    prior: dict[str, tuple[LatentState, Tensor]]  # "lower" / "upper": posterior state, prior logits
    driven: Driven | None  # what drove the lower dynamics
