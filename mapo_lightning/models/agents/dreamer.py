"""DreamerV2's actor-critic, which learns inside the dream only.

Shapes: I imagined steps, N imagination starts, F feat, A action.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mapo_lightning.models.agents.settings import AgentConfig
from mapo_lightning.models.blocks import Recorded, frozen, mlp
from mapo_lightning.models.distributions import TruncatedNormal
from mapo_lightning.models.returns import lambda_returns, step_weights
from mapo_lightning.models.rssm_world.world_model import WorldModel


class AgentLoss(NamedTuple):
    """One evaluation of the actor's and the critic's loss."""

    actor: Tensor  # scalar of eq. (5)
    critic: Tensor  # scalar of eq. (4)
    log: dict[str, Tensor]  # detached scalars


class DreamerAgent(nn.Module):
    """Actor, critic and slow critic over the features of the control dynamics.

    Source: eq. (4) and (5) of the MAPO paper; DreamerV2, arXiv:2010.02193, Sec. 2; facts 4.
    """

    def __init__(
        self, cfg: AgentConfig, feat: int, action_dim: int, layers: int, units: int
    ) -> None:
        super().__init__()
        self.cfg, self.action_dim = cfg, action_dim
        self.actor = mlp(feat, units, layers, 2 * action_dim)
        self.critic = mlp(feat, units, layers, 1)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)

    def policy(self, feat: Tensor) -> TruncatedNormal:
        """Action distribution in states with features (..., F)."""
        return TruncatedNormal.from_raw(self.actor(feat))

    def act(self, feat_BF: Tensor, explore: bool) -> Tensor:
        """Action (B, A) in [-1, 1]: a sample while exploring, the mode in evaluation."""
        policy = self.policy(feat_BF)
        if not explore:
            return policy.mode()
        action = policy.sample(torch.rand_like(policy.mean))
        noise = self.cfg.explore_noise * torch.randn_like(action)
        return (action + noise).clamp(-1.0, 1.0)

    def losses(self, world_model: WorldModel, start_NF: Tensor) -> AgentLoss:
        """Dream from every given state and learn from it.

        Args:
            world_model: Dreamt in; its parameters receive no gradient.
            start_NF: Features of control states, without history, (N, F).
        """
        record = Recorded(self.actor)
        lead = self.cfg.horizon, len(start_NF), self.action_dim
        noise_INA = torch.rand(lead, device=start_NF.device)
        policies: list[TruncatedNormal] = []

        def act(i: int, feat_NF: Tensor) -> Tensor:
            return TruncatedNormal.from_raw(record(feat_NF)).sample(noise_INA[i])

        def replay() -> Tensor:
            # The policy sees the state as data; its action keeps its gradient (facts 2.4, 6).
            policies.append(TruncatedNormal.from_raw(record.replay()))
            return policies[0].sample(noise_INA)

        with frozen(world_model):
            feat_INF = world_model.imagine(start_NF, act, self.cfg.horizon, replay)
            reward_IN = world_model.head("reward", feat_INF)
            discount_IN = self._discount(world_model, feat_INF)
            slow_IN = self.target(feat_INF).float().squeeze(-1)
        target_IN = lambda_returns(
            reward_IN[:-1], slow_IN[:-1], discount_IN[:-1], slow_IN[-1], self.cfg.lam
        )
        weight_IN = step_weights(discount_IN)
        entropy_IN = policies[0].entropy()
        # Eq. (5). The action taken in state i first shows in the target of state i + 1.
        gain_IN = target_IN[1:] + self.cfg.entropy * entropy_IN[:-1]
        actor = -(weight_IN[:-2] * gain_IN).mean()
        # Eq. (4).
        value_IN = self.critic(feat_INF[:-1].detach()).float().squeeze(-1)
        critic = (weight_IN[:-1] * 0.5 * (value_IN - target_IN.detach()).pow(2)).mean()
        log = {
            "actor": actor,
            "critic": critic,
            "entropy": entropy_IN.mean(),
            "imagined_return": target_IN.mean(),
            "imagined_reward": reward_IN.mean(),
            "value": value_IN.mean(),
        }
        return AgentLoss(actor, critic, {name: x.detach() for name, x in log.items()})

    def _discount(self, world_model: WorldModel, feat_INF: Tensor) -> Tensor:
        """γ, times the predicted probability to go on where there is such a head, (I, N)."""
        if "discount" in world_model.heads:
            return self.cfg.discount * world_model.head("discount", feat_INF).sigmoid()
        return torch.full(feat_INF.shape[:-1], self.cfg.discount, device=feat_INF.device)

    @torch.no_grad()
    def update_target(self) -> None:
        """Copy the critic into the slow critic."""
        for slow, fast in zip(self.target.parameters(), self.critic.parameters(), strict=True):
            slow.copy_(fast)
