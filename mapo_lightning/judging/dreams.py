"""Dreams of given action sequences as plain arrays, from any world model.

Shapes: C contexts, S shown frames, K action sequences, H steps, h w image, A action, F feat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mapo_lightning.models.blocks import evaluation_mode
from mapo_lightning.models.interfaces import Belief, Draughtsman, Dream, Valuer, WorldModel
from mapo_lightning.types import Batch, ConfigError, Frames


class Dreams(NamedTuple):
    """What a world model expects of K sequences from C states."""

    frames: Frames
    """(C, K, H + 1, h, w, 3) uint8; entry 0 is the start as the model draws it."""
    reward: NDArray[np.float64]
    """(C, K, H): expected on each step."""
    alive: NDArray[np.float64]
    """(C, K, H): probability that the episode has not ended before each step, in [0, 1]."""
    value: NDArray[np.float64] | None
    """(C, K, H): what the critic says of the state after each step, that step's reward included;
    None without a critic."""

    def returns(self, discount: float = 1.0, *, value: bool = False) -> NDArray[np.float64]:
        """Dreamt return up to each step, (C, K, H).

        Args:
            discount: γ per agent step; 1: a plain sum, as true returns are.
            value: Take the critic's word in place of the last reward: it counts what follows too.

        Raises:
            ConfigError: A value is asked for, and there is no critic.
        """
        steps = self.reward.shape[2]
        weight = self.alive * discount ** np.arange(steps)
        summed = np.cumsum(weight * self.reward, axis=2)
        if not value:
            return summed
        if self.value is None:
            raise ConfigError("this agent has no critic: ask for returns without its value")
        return summed + weight * (self.value - self.reward)


def dream_sequences(
    world_model: WorldModel,
    shown: Mapping[str, NDArray[Any]],
    actions: NDArray[np.float32],
    seed: int,
    agent: object = None,
) -> Dreams:
    """Show C contexts to a world model and let it dream K action sequences of each.

    All sequences of a context start from one belief and use the same random numbers: what differs
    between two dreams comes from their actions, as far as the model lets it.

    Args:
        world_model: Any; used in evaluation mode.
        shown: `Branches.shown`, (C, S, ...).
        actions: (C, K, H, A) in [-1, 1].
        seed: Of the random numbers.
        agent: Asked for values if it is a `Valuer`.

    Raises:
        ConfigError: Nothing draws what this world model dreams.
    """
    batch = batch_of(world_model, shown)
    sequences = torch.from_numpy(actions).to(batch["obs"].device)
    films: list[Tensor] = []
    reward: list[Tensor] = []
    alive: list[Tensor] = []
    value: list[Tensor] = []
    with judged(world_model, seed) as again:
        start = world_model.observe(batch).at(batch["obs"].shape[1] - 1)
        for number in range(actions.shape[1]):
            again()
            dream = world_model.imagine(start, _plays(sequences[:, number]), actions.shape[2])
            films.append(drawn(world_model, dream, batch["obs"]))
            reward.append(dream.reward[1:])
            alive.append(_alive(dream))
            if isinstance(agent, Valuer):
                value.append(agent.value(dream.feat[1:]))
    return Dreams(
        torch.stack(films, dim=1).cpu().numpy(),
        _by_context(reward),
        _by_context(alive),
        _by_context(value) if value else None,
    )


def drawn(world_model: WorldModel, dream: Dream, shown: Tensor) -> Tensor:
    """Frames of a dream, (N, I + 1, h, w, 3) uint8.

    Args:
        world_model: Which dreamt it.
        dream: Of N rows.
        shown: The frames that it was shown, (N, S, h, w, 3) uint8.

    Raises:
        ConfigError: Nothing draws what this world model dreams.
    """
    if dream.frames is not None:
        return dream.frames.transpose(0, 1)
    if isinstance(world_model, Draughtsman):
        frames = world_model.draw(dream.feat.transpose(0, 1), shown)
        return (frames.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    raise ConfigError(
        f"dreams of a {type(world_model).__name__} cannot be judged by their looks: give it a "
        "method draw (models/interfaces.py), or return the frames as Dream.frames"
    )


def batch_of(world_model: WorldModel, shown: Mapping[str, NDArray[Any]]) -> Batch:
    """Arrays as tensors on the device of a world model."""
    device = next(iter(world_model.parameters())).device
    return {key: torch.from_numpy(np.ascontiguousarray(x)).to(device) for key, x in shown.items()}


@contextmanager
def judged(world_model: WorldModel, seed: int) -> Iterator[Callable[[], object]]:
    """Evaluation mode, no gradients, and random numbers of its own.

    Yields:
        Starts the random numbers anew.
    """
    device = next(iter(world_model.parameters())).device
    modules = list(world_model.modules()) if isinstance(world_model, nn.Module) else []
    fork = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with fork, torch.no_grad(), evaluation_mode(modules):
        torch.manual_seed(seed)
        yield partial(torch.manual_seed, seed)


def _plays(actions: Tensor) -> Callable[[int, Belief], Tensor]:
    """A policy that plays given actions (N, H, A)."""
    return lambda step, _: actions[:, step]


def _alive(dream: Dream) -> Tensor:
    """Probability that the episode goes on to each step, (I, N)."""
    going = dream.discount[1:-1].float().cumprod(dim=0)
    return torch.cat([torch.ones_like(dream.discount[:1].float()), going])


def _by_context(parts: Sequence[Tensor]) -> NDArray[np.float64]:
    """K tensors (H, C) -> (C, K, H)."""
    found: NDArray[np.float64] = torch.stack([*parts]).permute(2, 0, 1).double().cpu().numpy()
    return found
