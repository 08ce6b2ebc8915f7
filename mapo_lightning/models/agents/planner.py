"""Planning: many action sequences are dreamt before every step, and the best of them played.

Works in any world model that imagines, with any agent. Nothing here is learned.

Shapes: N environments, P sequences for each, E elites, I steps of a sequence, A action.

Source: the cross-entropy method as in PlaNet, arXiv:1811.04551; MPPI with proposals of a policy and
the value of the last state as in TD-MPC2, arXiv:2310.16828.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mapo_lightning.models.agents.settings import PlanConfig
from mapo_lightning.models.interfaces import (
    Agent,
    Belief,
    Dream,
    Proposer,
    Valuer,
    WorldModel,
)
from mapo_lightning.types import ConfigError


class Sequences(NamedTuple):
    """Normal distributions of action sequences."""

    mean: Tensor  # (I, N, A)
    std: Tensor  # (I, N, A)


class Planner:
    """Chooses actions by dreams; what it has planned before is kept by who calls it.

    Args:
        cfg: How it plans.
        discount: γ per agent step.
        world_model: Dreamt in; must be able to imagine rewards.
        agent: Proposes sequences, and says what their ends are worth if it can.

    Raises:
        ConfigError: What is given as world model is none.
    """

    def __init__(
        self, cfg: PlanConfig, discount: float, world_model: WorldModel, agent: Agent
    ) -> None:
        if not isinstance(world_model, WorldModel):
            raise ConfigError(
                f"agent.plan.kind={cfg.kind} plans in dreams, which {type(world_model).__name__} "
                "does not have: set agent.plan.kind=none"
            )
        self.cfg, self.discount = cfg, discount
        self.world_model, self.agent = world_model, agent

    @torch.no_grad()
    def act(
        self, belief: Belief, before: Tensor | None, is_first: Tensor, explore: bool
    ) -> tuple[Tensor, Tensor]:
        """Plan one step of N environments.

        Args:
            belief: Of the present, axes (N,).
            before: The plan of the step before, (I, N, A); None: there is none. One of another
                shape is not used: the settings have changed since.
            is_first: (N,) bool, where an episode begins and earlier plans are worth nothing.
            explore: Draw the action from the distribution that was found; False: take its mean.

        Returns:
            Actions (N, A) in [-1, 1], and the plan, whose first step they are.
        """
        proposed = self._proposals(belief)
        found = self._start(len(belief.feat), before, is_first)
        many = belief.repeat(self.cfg.population)
        for _ in range(self.cfg.iterations):
            actions = torch.cat([proposed, self._samples(found)], dim=2)
            found = self._best(actions, self._scores(many, actions))
        action = found.mean[0]
        # Deviation: planned-mean. TD-MPC2 draws one of the elites, and noise while exploring.
        if explore:
            action = action + found.std[0] * torch.randn_like(action)
        return action.clamp(-1.0, 1.0), found.mean

    def _start(self, envs: int, before: Tensor | None, is_first: Tensor) -> Sequences:
        """Where the search begins: at the rest of the last plan, or around zero."""
        shape = self.cfg.horizon, envs, self.agent.action_dim
        mean = torch.zeros(shape, device=is_first.device)
        if self.cfg.warm_start and before is not None and before.shape == mean.shape:
            mean[:-1] = before[1:] * ~is_first[:, None]
        return Sequences(mean, torch.full_like(mean, self.cfg.std_start))

    def _proposals(self, belief: Belief) -> Tensor:
        """Sequences of the agent's policy (I, N, proposals, A): one greedy, the others samples."""
        envs, count = len(belief.feat), self.cfg.proposals
        if not count:
            return belief.feat.new_zeros(self.cfg.horizon, envs, 0, self.agent.action_dim)

        def policy(_: int, now: Belief) -> Tensor:
            action = self.agent.act(now, False)
            if count > 1:
                if isinstance(self.agent, Proposer):
                    drawn = self.agent.propose(now)
                else:
                    drawn = self.agent.act(now, True)
                greedy = torch.arange(len(action), device=action.device) % count == 0
                action = torch.where(greedy[:, None], action, drawn)
            return action

        dream = self.world_model.imagine(belief.repeat(count), policy, self.cfg.horizon)
        assert dream.action is not None
        return torch.unflatten(dream.action.float(), 1, (envs, count))

    def _samples(self, around: Sequences) -> Tensor:
        """Draw the rest of the population, (I, N, P - proposals, A)."""
        count = self.cfg.population - self.cfg.proposals
        mean, std = (x[:, :, None].expand(-1, -1, count, -1) for x in around)
        return (mean + std * torch.randn_like(mean)).clamp(-1.0, 1.0)

    def _scores(self, many: Belief, actions: Tensor) -> Tensor:
        """What sequences (I, N, P, A) are worth, (N, P), in dreams that start in ``many``."""
        flat = actions.flatten(1, 2)
        dream = self.world_model.imagine(many, lambda i, _: flat[i], self.cfg.horizon)
        return torch.unflatten(self._returns(dream), 0, actions.shape[1:3])

    def _returns(self, dream: Dream) -> Tensor:
        """Discounted sum of a dream's rewards after its start, less caution, (N*P,)."""
        reward = dream.reward[1:].float()
        if self.cfg.value and isinstance(self.agent, Valuer):
            # The reward of the last state is part of its value.
            reward = torch.cat([reward[:-1], self.agent.value(dream.feat[-1])[None]])
        if self.cfg.caution:
            if dream.uncertainty is None:
                raise ConfigError(
                    f"agent.plan.caution={self.cfg.caution} subtracts the uncertainty of dreams, "
                    f"which this {type(self.world_model).__name__} does not give: train one with "
                    "world_model.ensemble.members=5, or set agent.plan.caution=0"
                )
            reward = reward - self.cfg.caution * dream.uncertainty[1:]
        going = (self.discount * dream.discount[1:-1].float()).cumprod(dim=0)
        return reward[0] + (going * reward[1:]).sum(dim=0)

    def _best(self, actions: Tensor, score: Tensor) -> Sequences:
        """Fit a distribution to the elites among sequences (I, N, P, A) with scores (N, P)."""
        top, chosen = score.topk(self.cfg.elites, dim=1)
        elites = actions.take_along_dim(chosen[None, :, :, None], dim=2)
        weight = torch.full_like(top, 1.0 / self.cfg.elites)
        if self.cfg.kind == "mppi":
            weight = (top / self.cfg.temperature).softmax(dim=1)
        mean = torch.einsum("np,inpa->ina", weight, elites)
        variance = torch.einsum("np,inpa->ina", weight, (elites - mean[:, :, None]).square())
        return Sequences(mean, variance.sqrt().clamp(min=self.cfg.std_min))
