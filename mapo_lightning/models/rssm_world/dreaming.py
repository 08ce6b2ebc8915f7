"""A dream of the stacked world model, dreamt step by step.

Shapes: N rows, H W image, S groups, A action.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mapo_lightning.models.rssm_world.belief import DreamtBelief
from mapo_lightning.models.rssm_world.dynamics import Dynamics, LatentState
from mapo_lightning.types import Batch


class Foretold(NamedTuple):
    """What is expected of a moment."""

    reward: Tensor | None  # (N,)
    uncertainty: Tensor | None  # (N,)


class Parts(NamedTuple):
    """What the moments of one dream are made with."""

    dynamics: Dynamics[Any]
    drive: Callable[[Batch, int], Tensor]
    """What leads ``N`` rows on -> actions of the dynamics, (N, A)."""
    foretell: Callable[[LatentState | None, LatentState, Tensor | None], Foretold]
    """State before if any, state, and the action between -> what is expected."""
    draw: Callable[[Tensor], Tensor]
    """Features (N, F) -> pictures (N, H, W, 3) in [0, 1]."""


@dataclass(frozen=True)
class RSSMDreaming:
    """One moment; see `models.interfaces.Dreaming`."""

    parts: Parts
    state: LatentState
    foretold: Foretold
    frame: Tensor

    @classmethod
    def begin(cls, parts: Parts, state: LatentState) -> RSSMDreaming:
        """The moment that a dream leaves from, axes (N,)."""
        return cls(parts, state, parts.foretell(None, state, None), parts.draw(state.feat))

    @property
    def belief(self) -> DreamtBelief:
        """Features of the state, axes (N,)."""
        return DreamtBelief(self.state.feat)

    @property
    def reward(self) -> Tensor | None:
        """Expected on reaching this moment, (N,)."""
        return self.foretold.reward

    @property
    def uncertainty(self) -> Tensor | None:
        """Disagreement of the ensemble about the step to here, (N,); 0 at the start."""
        return self.foretold.uncertainty

    @torch.no_grad()
    def step(self, drive: Batch) -> RSSMDreaming:
        """As `models.interfaces.Dreaming.step`."""
        parts, rows = self.parts, len(self.state.feat)
        noise_NS = torch.rand(rows, parts.dynamics.cfg.stoch, device=self.state.feat.device)
        state = parts.dynamics.dream_on(self.state, parts.drive(drive, rows), noise_NS)
        foretold = parts.foretell(self.state, state, drive.get("action"))
        return replace(self, state=state, foretold=foretold, frame=parts.draw(state.feat))
