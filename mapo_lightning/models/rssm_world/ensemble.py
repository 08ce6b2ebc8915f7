"""How little is known of a dreamt step: the disagreement of predictors that saw the same steps.

Shapes: M members, B batch, T time, F feat, A action, S groups, K classes.

Source: Plan2Explore, arXiv:2005.05960.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mapo_lightning.models.blocks import mlp
from mapo_lightning.models.distributions import categorical_kl
from mapo_lightning.models.rssm_world.settings import EnsembleConfig, RSSMConfig


class Ensemble(nn.Module):
    """One-step predictors of the stochastic state, alike but for the weights they start with.

    They read a state and the action taken in it, and learn the *posterior* that follows: what the
    next frame showed, not what the prior made of it. The rest of the next state follows from state
    and action without a frame, so there is nothing about it to disagree on. Probabilities rather
    than the sampled state, because no predictor could know the sample. With categoricals the gain
    of information that Plan2Explore approximates by a variance is exact: the entropy of the
    members' mean less their mean entropy.

    Where transitions are well known, or random but equally likely to all members, they agree; what
    was never seen they judge differently.

    Args:
        cfg: Number and size.
        dynamics: Whose state is predicted.
        action_dim: Width A of the environment's action.
    """

    def __init__(self, cfg: EnsembleConfig, dynamics: RSSMConfig, action_dim: int) -> None:
        super().__init__()
        self.groups = dynamics.stoch, dynamics.classes
        width, outputs = dynamics.feat + action_dim, dynamics.stoch * dynamics.classes
        # With numbers of their own: a model with an ensemble starts with the same other weights.
        with torch.random.fork_rng(devices=[]):
            seed = int(torch.randint(2**31, (), device="cpu"))
            torch.default_generator.manual_seed(seed)
            self.members = nn.ModuleList(
                mlp(width, cfg.hidden, cfg.layers, outputs) for _ in range(cfg.members)
            )

    def forward(self, feat: Tensor, action: Tensor) -> Tensor:
        """States (..., F) and actions taken there (..., A) -> logits (M, ..., S, K), float32."""
        both = torch.cat([feat, action.to(feat.dtype)], dim=-1)
        raw = torch.stack([member(both) for member in self.members]).float()
        return torch.unflatten(raw, -1, self.groups)

    def loss(
        self, feat_BTF: Tensor, logits_BTSK: Tensor, action_BTA: Tensor, is_first_BT: Tensor
    ) -> Tensor:
        """Mean KL of the members' predictions from what followed, a scalar in nats per step.

        Nothing but the members gets a gradient.

        Args:
            feat_BTF: Posterior states.
            logits_BTSK: What they were drawn from.
            action_BTA: Action that led to each state.
            is_first_BT: Where episodes begin: nothing leads there.
        """
        guess_MBTSK = self(feat_BTF[:, :-1].detach(), action_BTA[:, 1:])
        error_BT = categorical_kl(logits_BTSK[:, 1:].detach(), guess_MBTSK).mean(dim=0)
        follows_BT = (~is_first_BT[:, 1:]).float()
        return (error_BT * follows_BT).sum() / follows_BT.sum().clamp(min=1.0)

    @torch.no_grad()
    def disagreement(self, feat: Tensor, action: Tensor) -> Tensor:
        """What the next frame would tell about the members, in nats, (...) >= 0."""
        log = self(feat, action).log_softmax(dim=-1)
        mean = log.logsumexp(dim=0) - math.log(len(self.members))
        gain = (log.exp() * log).sum(dim=-1).mean(dim=0) - (mean.exp() * mean).sum(dim=-1)
        return torch.clamp(gain.sum(dim=-1), min=0.0)
