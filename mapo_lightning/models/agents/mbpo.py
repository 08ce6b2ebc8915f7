"""Model-based policy optimisation: DrQ-v2 learns from real and from dreamt pictures alike.

Shapes: B batch, T time, N dreams, I imagined steps, S stacked frames, H W image, M transitions,
F feat = S * 3 * H * W, A action.

Source: MBPO, arXiv:1906.08253; iVideoGPT, arXiv:2405.15223; facts 7.6.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mapo_lightning.models.agents.drqv2 import (
    Actor,
    Critics,
    Pixels,
    Transitions,
    n_steps,
    noisy,
    orthogonal,
    shifted,
)
from mapo_lightning.models.agents.settings import MBPOConfig
from mapo_lightning.models.blocks import mean_over_ranks
from mapo_lightning.models.interfaces import AgentLoss, Belief, Fit, WorldModel
from mapo_lightning.models.token_world.belief import StackedFrames
from mapo_lightning.models.token_world.world_model import TokenWorldModel
from mapo_lightning.types import Batch, CheckpointError, ConfigError


class MBPOAgent(nn.Module):
    """An actor, two critics, and a memory of dreams; it steps optimisers of its own.

    Real transitions are drawn from the batch. Deviation: dream-batch. The published code draws them
    from all of replay, and interleaves two updates with every agent step.

    Args:
        cfg: Behaviour learning.
        world_model: The model to dream in; one that dreams in pictures.
        action_dim: Width A of an action.
        steps: Agent steps made before it acts, for the schedule of its noise.

    Raises:
        ConfigError: The world model does not dream in pictures.
    """

    def __init__(
        self, cfg: MBPOConfig, world_model: WorldModel, action_dim: int, steps: int = 0
    ) -> None:
        super().__init__()
        if not isinstance(world_model, TokenWorldModel):
            raise ConfigError(
                f"this agent learns from dreamt pictures, which {type(world_model).__name__} does "
                "not give: choose agent=dreamerv2"
            )
        self.cfg, self.action_dim = cfg, action_dim
        self.size, self.stacked = world_model.cfg.tokenizer.size, world_model.cfg.stacked
        self.pixels = Pixels(3 * self.stacked, self.size)
        self.actor = Actor(self.pixels.features, action_dim, cfg.hidden)
        self.critics = Critics(self.pixels.features, action_dim, cfg.hidden)
        self.target = Critics(self.pixels.features, action_dim, cfg.hidden)
        self.apply(orthogonal)
        self.target.load_state_dict(self.critics.state_dict())
        self.target.requires_grad_(False)
        seeing = [*self.pixels.parameters(), *self.critics.parameters()]
        rate, decay = cfg.rate, cfg.weight_decay
        self.critic_optimizer = torch.optim.Adam(seeing, rate, weight_decay=decay)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), rate, weight_decay=decay)
        self.steps, self.updates = steps, 0
        self.dreams: list[_Dreams] = []

    @property
    def noise(self) -> float:
        """Standard deviation of the noise on actions by now."""
        done = min(self.steps / self.cfg.noise_steps, 1.0)
        return self.cfg.noise_start + done * (self.cfg.noise_end - self.cfg.noise_start)

    @torch.no_grad()
    def act(self, belief: Belief, explore: bool) -> Tensor:
        """Actions (B, A): the mean, or with noise while exploring."""
        mean: Tensor = self.actor(self.pixels(self._pictures(belief.feat)))
        if not explore:
            return mean
        self.steps += len(mean)
        return noisy(mean, self.noise)

    @torch.no_grad()
    def propose(self, belief: Belief) -> Tensor:
        """Actions (N, A) with the noise of now, which goes down with agent steps only."""
        return noisy(self.actor(self.pixels(self._pictures(belief.feat))), self.noise)

    def losses(self, world_model: WorldModel, fit: Fit, batch: Batch) -> AgentLoss:
        """Dream where it is due, and learn; the shared optimiser has nothing to do."""
        self.updates += 1
        learning = self.updates - self.cfg.hold
        if learning < 1 or not self.training:
            return AgentLoss({}, {})
        belief = fit.belief
        assert isinstance(belief, StackedFrames)
        for _ in range(self._rounds(learning)):
            self._dream(world_model, belief, at_random=learning == 1)
        with torch.autocast(batch["obs"].device.type, enabled=False):
            log: dict[str, Tensor] = {}
            for _ in range(self.cfg.updates):
                log = self._learn(self._drawn(belief, batch))
        return AgentLoss({}, log)

    def _rounds(self, learning: int) -> int:
        """Rounds of dreams that are due in an update, counted from the first in which it learns."""
        if not self.cfg.imagined:
            return 0
        if learning == 1 or not self.dreams:  # a resumed run may ask for dreams that it never had
            return self.cfg.first_rounds
        return int(learning % self.cfg.dream_every == 0)

    def groups(self) -> Mapping[str, Iterable[nn.Parameter]]:
        """None: the optimisers are its own."""
        return {}

    def after_update(self, updates: int) -> None:
        """Nothing is left to do."""

    def _dream(self, world_model: WorldModel, belief: StackedFrames, at_random: bool) -> None:
        """Dream one round, from states of the batch, and keep it."""
        states = belief.flatten()
        chosen = torch.randint(len(states.frames), (self.cfg.dreams,))
        start = states._replace(frames=states.frames[chosen.to(states.frames.device)])

        def policy(_: int, now: Belief) -> Tensor:
            feat = now.feat
            if at_random:
                return torch.rand(len(feat), self.action_dim, device=feat.device) * 2.0 - 1.0
            return self.propose(now)

        with torch.no_grad():
            dream = world_model.imagine(start, policy, self.cfg.horizon)
        assert dream.frames is not None
        assert dream.action is not None
        film = torch.cat([start.frames[:, :-1], dream.frames.movedim(0, 1)], dim=1)
        self._keep(film, dream.action.movedim(0, 1), dream.reward.T)

    def _keep(self, film: Tensor, action: Tensor, reward: Tensor) -> None:
        """Keep a round: pictures (N, S + I, H, W, 3), actions (N, I, A), rewards (N, I + 1)."""
        never = torch.zeros_like(reward, dtype=torch.bool)
        found = n_steps(reward, never, never, self.cfg.n_step, self.cfg.discount)
        parts = film, action, found.reward, found.discount
        self.dreams.append(_Dreams(*(part.cpu() for part in parts)))
        del self.dreams[: -max(1, self.cfg.kept // self.cfg.dreams)]

    def _drawn(self, belief: StackedFrames, batch: Batch) -> Transitions:
        """Real and imagined, in their shares."""
        device, imagined = batch["obs"].device, int(self.cfg.imagined * self.cfg.batch)
        real = self._real(belief, batch, self.cfg.batch - imagined)
        if not imagined:
            return real
        dreamt = self._dreamt(imagined)
        return Transitions(
            *(torch.cat([a, b.to(device)]) for a, b in zip(real, dreamt, strict=True))
        )

    def _real(self, belief: StackedFrames, batch: Batch, count: int) -> Transitions:
        """Draw from the batch, with repetition where it holds fewer."""
        # An entry before the first of an episode is the last of another, whatever it says.
        last = batch["is_last"] | torch.cat(
            [batch["is_first"][:, 1:], torch.zeros_like(batch["is_first"][:, :1])], dim=1
        )
        found = n_steps(
            batch["reward"], last, batch["is_terminal"], self.cfg.n_step, self.cfg.discount
        )
        rows, begin = found.valid.nonzero(as_tuple=True)
        if not len(rows):
            raise ConfigError(
                f"no chunk of this batch holds {self.cfg.n_step} steps of one episode: raise "
                "finetune.chunk_length"
            )
        drawn = torch.randint(len(rows), (count,), device=rows.device)
        rows, begin = rows[drawn], begin[drawn]
        return Transitions(
            belief.frames[rows, begin],
            batch["action"][rows, begin + 1],
            found.reward[rows, begin],
            found.discount[rows, begin],
            belief.frames[rows, found.place[rows, begin]],
        )

    def _dreamt(self, count: int) -> Transitions:
        """Draw from the dreams that are kept."""
        number = torch.randint(len(self.dreams), (count,))
        begin = torch.randint(self.cfg.horizon - self.cfg.n_step + 1, (count,))
        row = torch.randint(self.cfg.dreams, (count,))
        steps = [
            self.dreams[n].transition(int(r), int(t), self.stacked, self.cfg.n_step)
            for n, r, t in zip(number.tolist(), row, begin, strict=True)
        ]
        return Transitions(*(torch.stack(list(part)) for part in zip(*steps, strict=True)))

    def _learn(self, drawn: Transitions) -> dict[str, Tensor]:
        """One update of critics and actor."""
        features = self.pixels(shifted(_channels(drawn.frames), self.cfg.shift))
        with torch.no_grad():
            after = self.pixels(shifted(_channels(drawn.after), self.cfg.shift))
            action = noisy(self.actor(after), self.noise, self.cfg.noise_limit)
            goal = drawn.reward + drawn.discount * self.target(after, action).min(dim=0).values
        value = self.critics(features, drawn.action)
        critic_loss = (value - goal).square().mean(dim=1).sum()
        _step(self.critic_optimizer, critic_loss)
        features = features.detach()
        action = noisy(self.actor(features), self.noise, self.cfg.noise_limit)
        actor_loss = -self.critics(features, action).min(dim=0).values.mean()
        _step(self.actor_optimizer, actor_loss)
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.critics.parameters(), strict=True):
                slow.lerp_(fast, self.cfg.target_rate)
        found = {"critic": critic_loss, "actor": actor_loss, "value": value.mean()}
        return {name: scalar.detach() for name, scalar in found.items()}

    def _pictures(self, feat: Tensor) -> Tensor:
        """Features of a belief (..., F) -> pictures (..., 3 S, H, W)."""
        return torch.unflatten(feat, -1, (3 * self.stacked, self.size, self.size))

    def get_extra_state(self) -> dict[str, Any]:
        """Optimisers, counts and dreams."""
        return {
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "actor_optimizer": self.actor_optimizer.state_dict(),
            "steps": self.steps,
            "updates": self.updates,
            "dreams": [list(one) for one in self.dreams] if self.cfg.store_dreams else [],
        }

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take them up again; dreams of another number or length than now are dreamt anew.

        Raises:
            CheckpointError: They are not what `get_extra_state` gives.
        """
        try:
            for name in ("critic_optimizer", "actor_optimizer"):
                optimizer = getattr(self, name)
                optimizer.load_state_dict(state[name])
                _check_moments(optimizer)
            self.steps, self.updates = int(state["steps"]), int(state["updates"])
            dreams = [_Dreams(*one) for one in state["dreams"]]
            self.dreams = [one for one in dreams if self._fits(one)]
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"the agent's own state in this checkpoint is damaged ({error!r:.100}): take an "
                "earlier one from the same folder"
            ) from error

    def _fits(self, dreams: _Dreams) -> bool:
        """Whether a round has the shapes that the settings give it."""
        rows, steps = self.cfg.dreams, self.cfg.horizon
        picture = (self.size, self.size, 3)
        shapes = [(rows, self.stacked + steps, *picture), (rows, steps, self.action_dim)]
        shapes += [(rows, steps + 1)] * 2
        return dreams.film.dtype == torch.uint8 and [x.shape for x in dreams] == shapes


class _Dreams(NamedTuple):
    """One round of dreams, on the CPU."""

    film: Tensor  # (N, S + I, H, W, 3) uint8: what was seen, then what was dreamt
    action: Tensor  # (N, I, A)
    reward: Tensor  # (N, I + 1) of the n steps from each state
    discount: Tensor  # (N, I + 1) of what comes after them

    def transition(self, row: int, begin: int, stacked: int, steps: int) -> Sequence[Tensor]:
        """The fields of `Transitions` for one step."""
        end = begin + steps
        return (
            self.film[row, begin : begin + stacked],
            self.action[row, begin],
            self.reward[row, begin],
            self.discount[row, begin],
            self.film[row, end : end + stacked],
        )


def _check_moments(optimizer: torch.optim.Optimizer) -> None:
    """See that every moment has the shape of its parameter.

    Raises:
        ValueError: One has another.
    """
    for parameter, moments in optimizer.state.items():
        for name, moment in moments.items():
            if name != "step" and moment.shape != parameter.shape:
                raise ValueError(f"{name} of {tuple(moment.shape)} for {tuple(parameter.shape)}")


def _channels(frames: Tensor) -> Tensor:
    """Bytes (M, S, H, W, 3) -> pictures (M, 3 S, H, W) in [0, 1]."""
    return frames.movedim(-1, 2).flatten(1, 2).float() / 255.0


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of an optimiser of the agent's own, on gradients of all ranks."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # Without the hooks by which DDP waits for the one backward of the batch.
    gradients = torch.autograd.grad(loss, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = mean_over_ranks(gradient)
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None
