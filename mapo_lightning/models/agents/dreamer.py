"""Dreamer's actor-critic, which learns inside the dream only.

Shapes: I imagined steps, N imagination starts, F feat, A action.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from mapo_lightning.models.agents.settings import AgentConfig
from mapo_lightning.models.blocks import frozen, mean_over_ranks, mlp, zeroed
from mapo_lightning.models.distributions import TruncatedNormal
from mapo_lightning.models.interfaces import (
    AgentLoss,
    Belief,
    DifferentiableWorldModel,
    Dream,
    Fit,
    WorldModel,
)
from mapo_lightning.models.returns import lambda_returns, step_weights
from mapo_lightning.models.scalar_outputs import SCALARS
from mapo_lightning.models.settings import MLPStyle
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


class ReturnRange(nn.Module):
    """Moving average of the range of returns, from the 5th to the 95th percentile, at least 1.

    Source: DreamerV3, arXiv:2301.04104v2, "Actor learning".
    """

    average: Tensor

    def __init__(self, momentum: float = 0.99) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("average", torch.zeros(()))

    def forward(self, returns: Tensor) -> Tensor:
        """Follow the returns of an update while training; what to divide by, a scalar."""
        if self.training:
            width = mean_over_ranks(returns.quantile(0.95) - returns.quantile(0.05))
            self.average.lerp_(width, 1.0 - self.momentum)
        return self.average.clamp(min=1.0)


class DreamerAgent(nn.Module):
    """Actor, critic and slow critic over the features of the control dynamics.

    Args:
        cfg: Behaviour learning.
        world_model: Dreamt in; its features are what the networks read. Not kept.
        action_dim: Width A of an action.
        layers: Hidden layers of both networks.
        units: Width of those layers.
        style: What follows the hidden layers, see `mlp`.

    Raises:
        ConfigError: The world model gives no gradients through its dreams, and needs to.

    Source: eq. (4) and (5) of the MAPO paper; DreamerV2, arXiv:2010.02193, Sec. 2; facts 4. The
    settings that differ from these: DreamerV3, arXiv:2301.04104v2.
    """

    def __init__(
        self,
        cfg: AgentConfig,
        world_model: WorldModel,
        action_dim: int,
        layers: int,
        units: int,
        style: MLPStyle = "elu",
    ) -> None:
        super().__init__()
        through = cfg.gradient == "dynamics"
        if through and not isinstance(world_model, DifferentiableWorldModel):
            raise ConfigError(
                "agent.gradient=dynamics learns by gradients through dreams, which "
                f"{type(world_model).__name__} does not give; set agent.gradient=reinforce, or "
                "choose another agent or world model"
            )
        self.cfg, self.action_dim, self.values = cfg, action_dim, SCALARS[cfg.critic]
        feat = world_model.feat_dim
        self.actor = mlp(feat, units, layers, 2 * action_dim, style)
        self.critic = mlp(feat, units, layers, self.values.width, style)
        if cfg.critic == "twohot":
            zeroed(self.critic)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.spread = ReturnRange() if cfg.normalise == "percentile" else None

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

    def propose(self, belief: Belief) -> Tensor:
        """A sample of the policy without noise of exploration, (N, A) in [-1, 1]."""
        policy = self.policy(belief.feat)
        return policy.sample(torch.rand_like(policy.mean))

    def value(self, feat: Tensor) -> Tensor:
        """What the critic says of states with features (..., F), their own reward included."""
        return self.values.read(self.critic(feat))

    def losses(self, world_model: WorldModel, fit: Fit, batch: Batch) -> AgentLoss:
        """Dream from every state of the batch and learn from it.

        Args:
            world_model: Dreamt in; its parameters receive no gradient.
            fit: Gives the states to start from, without history.
            batch: Not read.
        """
        start = fit.belief.flatten().detach()
        lead = self.cfg.horizon, len(start.feat), self.action_dim
        policy = ActorInDream(self.actor, torch.rand(lead, device=start.feat.device))
        with frozen(world_model):
            dream, action_INA = self._dream(world_model, start, policy)
            slow_IN = self.values.read(self.target(dream.feat))
        raw_INV = self.critic(dream.feat[:-1].detach())
        value_IN = self.values.read(raw_INV)
        trusted_IN = slow_IN
        if self.cfg.bootstrap == "fast":
            with frozen(self.critic):
                trusted_IN = self.values.read(self.critic(dream.feat))
        discount_IN = self.cfg.discount * dream.discount
        target_IN = lambda_returns(
            dream.reward[:-1], trusted_IN[:-1], discount_IN[:-1], trusted_IN[-1], self.cfg.lam
        )
        weight_IN = step_weights(discount_IN)
        entropy_IN = policy.policies.entropy()
        # Eq. (5). The action taken in state i first shows in the target of state i + 1.
        gain_IN = self._gain(target_IN, trusted_IN, policy, action_INA)
        gain_IN = torch.add(gain_IN, entropy_IN[:-1], alpha=self.cfg.entropy)
        actor = -(weight_IN[:-2] * gain_IN).mean()
        # Eq. (4). Deviation: critic-target. The released code's targets also contain the entropy.
        error_IN = self.values.error(raw_INV, target_IN.detach())
        if self.cfg.slow_weight:
            slow_error_IN = self.values.error(raw_INV, slow_IN[:-1].detach())
            error_IN = error_IN + self.cfg.slow_weight * slow_error_IN
        critic = (weight_IN[:-1] * error_IN).mean()
        log = {
            "actor": actor,
            "critic": critic,
            "entropy": entropy_IN.mean(),
            "imagined_return": target_IN.mean(),
            "imagined_reward": dream.reward.mean(),
            "value": value_IN.mean(),
        }
        if dream.uncertainty is not None:
            log["uncertainty"] = dream.uncertainty[1:].mean()
        return AgentLoss(
            {"actor": actor, "critic": critic}, {name: x.detach() for name, x in log.items()}
        )

    def _dream(
        self, world_model: WorldModel, start: Belief, policy: ActorInDream
    ) -> tuple[Dream, Tensor | None]:
        """A dream, and the actions in it (I, N, A) where their likelihood will be asked for."""
        if self.cfg.gradient == "dynamics":
            assert isinstance(world_model, DifferentiableWorldModel)
            return world_model.imagine_with_gradients(start, policy, self.cfg.horizon), None
        dream = world_model.imagine(
            start, lambda i, belief: policy.sample(self.actor(belief.feat), i), self.cfg.horizon
        )
        policy.policies = self.policy(dream.feat[:-1])
        return dream, dream.action

    def _gain(
        self,
        target_IN: Tensor,
        trusted_IN: Tensor,
        policy: ActorInDream,
        action_INA: Tensor | None,
    ) -> Tensor:
        """What the actor is to increase, apart from entropy, for the steps of eq. (5)."""
        gain_IN = target_IN[1:]
        if action_INA is not None:
            # By how much the action did better than what is expected of the state it was taken in.
            advantage_IN = (gain_IN - trusted_IN[: len(gain_IN)]).detach()
            gain_IN = advantage_IN * policy.policies.log_prob(action_INA)[: len(gain_IN)]
        return gain_IN if self.spread is None else gain_IN / self.spread(target_IN.detach())

    def groups(self) -> Mapping[str, Iterable[nn.Parameter]]:
        """Actor and critic; the slow critic is copied, not trained."""
        return {"actor": self.actor.parameters(), "critic": self.critic.parameters()}

    @torch.no_grad()
    def after_update(self, updates: int) -> None:
        """Move the slow critic towards the critic on schedule."""
        if updates % self.cfg.target_every == 0:
            for slow, fast in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                if self.cfg.target_rate == 1.0:
                    slow.copy_(fast)
                else:
                    slow.lerp_(fast, self.cfg.target_rate)
