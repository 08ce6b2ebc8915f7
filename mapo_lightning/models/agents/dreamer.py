"""DreamerV2's actor-critic, which learns inside the dream only.

Shapes: I imagined steps, N imagination starts, F feat, A action.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from mapo_lightning.models.agents.settings import AgentConfig
from mapo_lightning.models.blocks import frozen, mlp
from mapo_lightning.models.distributions import TruncatedNormal
from mapo_lightning.models.interfaces import (
    AgentLoss,
    Belief,
    DifferentiableWorldModel,
    Fit,
    WorldModel,
)
from mapo_lightning.models.returns import lambda_returns, step_weights
from mapo_lightning.types import Batch, ConfigError


class ActorInDream:
    """The actor on the way through one dream: reparameterised actions from noise drawn before.

    Args:
        network: Actor's perceptron, features -> raw output.
        noise_INA: Uniform noise of every step, (I, N, A).
    """

    def __init__(self, network: nn.Sequential, noise_INA: Tensor) -> None:
        self.network, self.noise = network, noise_INA
        self.raw: list[Tensor] = []  # of each step, as far as they came one by one

    def __call__(self, feat: Tensor) -> Tensor:
        """Action of the next step (N, A)."""
        self.raw.append(self.network(feat.detach()))  # the state is data (facts 2.4, 6)
        return self.sample(self.raw[-1], len(self.raw) - 1)

    def sample(self, raw: Tensor, step: int) -> Tensor:
        """Action (N, A) of one step from the actor's output, (N, 2A)."""
        return TruncatedNormal.from_raw(raw).sample(self.noise[step])

    def sample_all(self, raw: Tensor) -> Tensor:
        """Actions of all steps (I, N, A) from the actor's outputs, (I, N, 2A)."""
        self.policies = TruncatedNormal.from_raw(raw)
        return self.policies.sample(self.noise)

    @cached_property
    def policies(self) -> TruncatedNormal:
        """Action distributions of all steps, axes (I, N)."""
        return TruncatedNormal.from_raw(torch.stack(self.raw))


class DreamerAgent(nn.Module):
    """Actor, critic and slow critic over the features of the control dynamics.

    Args:
        cfg: Behaviour learning.
        world_model: Dreamt in; its features are what the networks read. Not kept.
        action_dim: Width A of an action.
        layers: Hidden layers of both networks.
        units: Width of those layers.

    Raises:
        ConfigError: The world model gives no gradients through its dreams.

    Source: eq. (4) and (5) of the MAPO paper; DreamerV2, arXiv:2010.02193, Sec. 2; facts 4.
    """

    def __init__(
        self, cfg: AgentConfig, world_model: WorldModel, action_dim: int, layers: int, units: int
    ) -> None:
        super().__init__()
        if not isinstance(world_model, DifferentiableWorldModel):
            raise ConfigError(
                "agent.kind=dreamer learns by gradients through dreams, which "
                f"{type(world_model).__name__} does not give; choose another agent or world model"
            )
        self.cfg, self.action_dim = cfg, action_dim
        feat = world_model.feat_dim
        self.actor = mlp(feat, units, layers, 2 * action_dim)
        self.critic = mlp(feat, units, layers, 1)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)

    def policy(self, feat: Tensor) -> TruncatedNormal:
        """Action distribution in states with features (..., F)."""
        return TruncatedNormal.from_raw(self.actor(feat))

    def act(self, belief: Belief, explore: bool) -> Tensor:
        """Action (B, A) in [-1, 1]: a sample while exploring, mode or mean in evaluation."""
        policy = self.policy(belief.feat)
        if not explore:
            return policy.mode() if self.cfg.greedy == "mode" else policy.expectation()
        action = policy.sample(torch.rand_like(policy.mean))
        noise = self.cfg.explore_noise * torch.randn_like(action)
        return (action + noise).clamp(-1.0, 1.0)

    def losses(self, world_model: WorldModel, fit: Fit, batch: Batch) -> AgentLoss:
        """Dream from every state of the batch and learn from it.

        Args:
            world_model: Dreamt in; its parameters receive no gradient.
            fit: Gives the states to start from, without history.
            batch: Not read.
        """
        assert isinstance(world_model, DifferentiableWorldModel)
        start = fit.belief.flatten().detach()
        lead = self.cfg.horizon, len(start.feat), self.action_dim
        policy = ActorInDream(self.actor, torch.rand(lead, device=start.feat.device))
        with frozen(world_model):
            dream = world_model.imagine_with_gradients(start, policy, self.cfg.horizon)
            slow_IN = self.target(dream.feat).float().squeeze(-1)
        discount_IN = self.cfg.discount * dream.discount
        target_IN = lambda_returns(
            dream.reward[:-1], slow_IN[:-1], discount_IN[:-1], slow_IN[-1], self.cfg.lam
        )
        weight_IN = step_weights(discount_IN)
        entropy_IN = policy.policies.entropy()
        # Eq. (5). The action taken in state i first shows in the target of state i + 1.
        gain_IN = target_IN[1:] + self.cfg.entropy * entropy_IN[:-1]
        actor = -(weight_IN[:-2] * gain_IN).mean()
        # Eq. (4). Deviation: critic-target. The released code's targets also contain the entropy.
        value_IN = self.critic(dream.feat[:-1].detach()).float().squeeze(-1)
        critic = (weight_IN[:-1] * 0.5 * (value_IN - target_IN.detach()).pow(2)).mean()
        log = {
            "actor": actor,
            "critic": critic,
            "entropy": entropy_IN.mean(),
            "imagined_return": target_IN.mean(),
            "imagined_reward": dream.reward.mean(),
            "value": value_IN.mean(),
        }
        return AgentLoss(
            {"actor": actor, "critic": critic}, {name: x.detach() for name, x in log.items()}
        )

    def groups(self) -> Mapping[str, Iterable[nn.Parameter]]:
        """Actor and critic; the slow critic is copied, not trained."""
        return {"actor": self.actor.parameters(), "critic": self.critic.parameters()}

    @torch.no_grad()
    def after_update(self, updates: int) -> None:
        """Copy the critic into the slow critic on schedule."""
        if updates % self.cfg.target_every == 0:
            for slow, fast in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                slow.copy_(fast)
