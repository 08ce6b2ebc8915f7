"""Three small implementations that share nothing with the library's: they prove its seams."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mapo_lightning.models.interfaces import AgentLoss, Belief, Dream, Fit, Policy, WorldModel
from mapo_lightning.types import Batch


class FrameBelief(NamedTuple):
    """The last frame, (..., H, W, 3) uint8."""

    frame: Tensor

    @property
    def feat(self) -> Tensor:
        lead = self.frame.shape[:-3]
        small = F.adaptive_avg_pool2d(
            self.frame.reshape(-1, *self.frame.shape[-3:]).movedim(-1, 1) / 255, 4
        )
        return small.reshape(*lead, -1)

    def at(self, t: int) -> FrameBelief:
        return FrameBelief(self.frame[:, t])

    def flatten(self) -> FrameBelief:
        return FrameBelief(self.frame.flatten(0, 1))

    def repeat(self, times: int) -> FrameBelief:
        return FrameBelief(self.frame.repeat_interleave(times, 0))

    def detach(self) -> FrameBelief:
        return self


class CopyLastFrame(nn.Module):
    """Believes that nothing will change; learns only what a frame is worth."""

    feat_dim = 3 * 4 * 4

    def __init__(self) -> None:
        super().__init__()
        self.reward = nn.Linear(self.feat_dim, 1)

    def observe(self, batch: Batch, start: Belief | None = None) -> FrameBelief:
        return FrameBelief(batch["obs"])

    def loss(self, batch: Batch) -> Fit:
        belief = self.observe(batch)
        error = self.reward(belief.feat).squeeze(-1) - batch["reward"]
        total = error.square().mean()
        return Fit(total, {"reward": total.detach()}, belief)

    @torch.no_grad()
    def imagine(self, start: Belief, policy: Policy, steps: int) -> Dream:
        assert isinstance(start, FrameBelief)
        action = torch.stack([policy(i, start) for i in range(steps)])
        frames = start.frame.expand(steps + 1, *start.frame.shape)
        feat = FrameBelief(frames).feat
        reward = self.reward(feat).squeeze(-1)
        return Dream(feat, reward, torch.ones_like(reward), action, frames)

    @torch.no_grad()
    def open_loop(self, batch: Batch, seen: int) -> Tensor:
        frames = batch["obs"].float() / 255.0
        return torch.cat([frames[:, :seen], frames[:, seen - 1 : seen].expand_as(frames)], 1)[
            :, : frames.shape[1]
        ]

    def parts(self) -> Mapping[str, nn.Module]:
        return {"reward": self.reward}

    def groups(self) -> Mapping[str, list[nn.Parameter]]:
        return {"model": list(self.parameters())}

    def evaluating(self) -> AbstractContextManager[None]:
        return nullcontext()


class RandomShooting(nn.Module):
    """Dreams of random action sequences and takes the first action of the best."""

    def __init__(self, world_model: WorldModel, action_dim: int) -> None:
        super().__init__()
        self.action_dim, self.candidates, self.horizon = action_dim, 8, 4
        self.imagine: Callable[..., Dream] = world_model.imagine  # borrowed, not a part of it

    @torch.no_grad()
    def act(self, belief: Belief, explore: bool) -> Tensor:
        batch = len(belief.feat)
        lead = self.horizon, batch * self.candidates, self.action_dim
        plans_INA = torch.rand(lead, device=belief.feat.device) * 2 - 1
        dream = self.imagine(belief.repeat(self.candidates), lambda i, _: plans_INA[i], lead[0])
        gain_BK = (dream.reward * dream.discount.cumprod(0)).sum(0).view(batch, self.candidates)
        first_BKA = plans_INA[0].view(batch, self.candidates, -1)
        return first_BKA[torch.arange(batch), gain_BK.argmax(1)]

    def losses(self, world_model: WorldModel, fit: Fit, batch: Batch) -> AgentLoss:
        return AgentLoss({}, {})

    def groups(self) -> Mapping[str, Iterable[nn.Parameter]]:
        return {}

    def after_update(self, updates: int) -> None:
        pass


class DreamtFrames(nn.Module):
    """Learns from a buffer of dreamt frames with two optimisers at rates and paces of their own."""

    def __init__(self, world_model: WorldModel, action_dim: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.actor = nn.Linear(world_model.feat_dim, action_dim)
        self.critic = nn.Linear(world_model.feat_dim + action_dim, 1)
        self.slow = torch.optim.Adam(self.actor.parameters(), 1e-3)
        self.fast = torch.optim.Adam(self.critic.parameters(), 1e-2)
        self.buffer: list[tuple[Tensor, Tensor, Tensor]] = []

    def act(self, belief: Belief, explore: bool) -> Tensor:
        action = self.actor(belief.feat).tanh()
        return (action + 0.1 * torch.randn_like(action) * explore).clamp(-1, 1)

    def losses(self, world_model: WorldModel, fit: Fit, batch: Batch) -> AgentLoss:
        start = fit.belief.flatten().detach()
        with torch.no_grad():
            dream = world_model.imagine(start, lambda _, belief: self.act(belief, True), 2)
        assert dream.frames is not None
        assert dream.action is not None
        self.buffer.append((dream.frames[0], dream.action[0], dream.reward[1]))
        return AgentLoss({}, {"buffer": torch.tensor(len(self.buffer))})

    def groups(self) -> Mapping[str, Iterable[nn.Parameter]]:
        return {}

    def after_update(self, updates: int) -> None:
        frames, action, reward = self.buffer[-1]
        feat = FrameBelief(frames).feat
        guess = self.critic(torch.cat([feat, action], -1)).squeeze(-1)
        self._step(self.fast, (guess - reward).square().mean())
        if updates % 2 == 0:
            gain = self.critic(torch.cat([feat, self.actor(feat).tanh()], -1))
            self._step(self.slow, -gain.mean())

    def get_extra_state(self) -> dict[str, Any]:
        return {"slow": self.slow.state_dict(), "fast": self.fast.state_dict()}

    def set_extra_state(self, state: Any) -> None:
        self.slow.load_state_dict(state["slow"])
        self.fast.load_state_dict(state["fast"])

    def _step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
