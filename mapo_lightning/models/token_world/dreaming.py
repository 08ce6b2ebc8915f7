"""A dream of the token world, dreamt step by step.

Shapes: N rows, H W image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mapo_lightning.models.blocks import evaluation_mode
from mapo_lightning.models.scalar_outputs import symexp
from mapo_lightning.models.token_world.belief import StackedFrames
from mapo_lightning.models.token_world.continuation import Continuation
from mapo_lightning.models.token_world.frame_predictor import Told
from mapo_lightning.types import Batch


class TokenDreaming:
    """One moment; see `models.interfaces.Dreaming`.

    The moments of a dream share one cache of keys and values, behind whose end the next moment
    writes its own. A moment that is left a second time copies the cache first.

    Args:
        dream: Frames up to here; never changed, except behind the end of its cache.
        belief: The last frames, axes (N,).
        frame: Picture, (N, H, W, 3) in [0, 1].
        reward: Expected on reaching this moment, (N,); None: nothing predicts it.
    """

    uncertainty = None

    def __init__(
        self, dream: Continuation, belief: StackedFrames, frame: Tensor, reward: Tensor | None
    ) -> None:
        self.dream, self.belief, self.frame, self.reward = dream, belief, frame, reward
        self._left = False

    @torch.no_grad()
    def step(self, drive: Batch) -> TokenDreaming:
        """As `models.interfaces.Dreaming.step`."""
        dream = self.dream.branch(own_storage=self._left)
        self._left = True
        action, told = None, None
        if dream.predictor.control is not None:
            action = drive["action"]
        elif dream.predictor.phrases is not None:
            told = Told(drive["semantic"], drive["has_semantic"])
        with evaluation_mode([*dream.tokenizer.modules(), *dream.predictor.modules()]):
            picture, value = dream.next(action, told)
        reward = None if value is None else symexp(value).float()
        return TokenDreaming(
            dream, self.belief.followed_by(as_bytes(picture)), picture.movedim(1, -1), reward
        )


def as_bytes(frame: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] -> (N, H, W, 3) uint8."""
    return (frame * 255.0).round().to(torch.uint8).movedim(1, -1)
