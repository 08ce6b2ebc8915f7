"""Dreams of a known worth: worlds that know the toy's simulator and misuse it in a known way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mapo_lightning.envs.toy import ToyDisc
from mapo_lightning.envs.wrappers import PixelEnv
from mapo_lightning.judging.clips import Clips
from mapo_lightning.models.interfaces import Dream, Policy
from mapo_lightning.types import Batch

SIZE, STEPS = 32, 16
KINDS = ("oracle", "noisy", "copy", "blind", "wrong")
"""The truth; the truth with noise; the last frame; what other actions do; the opposite way."""


class Frames(NamedTuple):
    """One simulated episode."""

    obs: NDArray[np.uint8]  # (T, H, W, 3)
    reward: NDArray[np.float32]  # (T,)


def simulate(seed: int, action: NDArray[np.float32]) -> Frames:
    """The toy from a reset seed on; the first of the actions (T, A) is not taken."""
    env = PixelEnv(ToyDisc("disc"), size=SIZE, action_repeat=2)
    obs = [env.reset(seed=seed)[0]["image"]]
    reward = [0.0]
    for a in action[1:]:
        seen, paid, *_ = env.step(a)
        obs.append(seen["image"])
        reward.append(paid)
    env.close()
    return Frames(np.stack(obs), np.array(reward, np.float32))


def held_actions(rng: np.random.Generator, steps: int, hold: int = 2) -> NDArray[np.float32]:
    """Random actions (T, 2), each held for some steps."""
    return rng.uniform(-1, 1, (-(-steps // hold), 2)).repeat(hold, axis=0)[:steps].astype("f4")


def toy_clips(seeds: range, steps: int = STEPS) -> Clips:
    """Clips from the beginning of episodes with these reset seeds; ``index`` says which."""
    actions = [held_actions(np.random.default_rng(seed), steps) for seed in seeds]
    played = [simulate(seed, action) for seed, action in zip(seeds, actions, strict=True)]
    count, first = len(seeds), torch.zeros(len(seeds), steps, dtype=torch.bool)
    first[:, 0] = True
    obs = torch.from_numpy(np.stack([p.obs for p in played]))
    batch = {
        "obs": obs,
        "action": torch.from_numpy(np.stack(actions)),
        "reward": torch.from_numpy(np.stack([p.reward for p in played])),
        "is_first": first,
        "is_terminal": torch.zeros_like(first),
        "index": torch.tensor(list(seeds))[:, None].expand(count, steps),
    }
    frames = obs.float() / 255.0
    return Clips(
        batch, torch.arange(count), frames.median(dim=1).values, frames.mean(dim=(0, 1)), "action"
    )


class Known(NamedTuple):
    """Belief of a `ConstructedWorld`: the episode and what was done so far."""

    seed: Tensor  # (...,)
    done: Tensor  # (..., S, A)

    @property
    def feat(self) -> Tensor:
        return self.seed[..., None].float()

    def at(self, t: int) -> Known:
        return Known(self.seed[:, t], self.done[:, : t + 1])


class ConstructedWorld(nn.Module):
    """A world model that simulates, and then does what its kind says.

    Args:
        kind: One of `KINDS`.
        noise: Standard deviation of the noisy kind, in colours and rewards.
    """

    def __init__(self, kind: str, noise: float = 0.05) -> None:
        super().__init__()
        self.kind, self.noise = kind, noise

    def open_loop(self, batch: Batch, seen: int) -> Tensor:
        """What it dreams, (C, T, H, W, 3)."""
        dreams = []
        for seed, action in zip(batch["index"][:, 0].tolist(), batch["action"], strict=True):
            frames = torch.from_numpy(simulate(seed, self._done(seed, action, seen)).obs) / 255.0
            if self.kind == "copy":
                frames[seen:] = frames[seen - 1]
            dreams.append(frames)
        found = torch.stack(dreams)
        if self.kind == "noisy":
            found = (found + self.noise * torch.randn_like(found)).clamp(0, 1)
        return found

    def observe(self, batch: Batch, start: object = None) -> Known:
        """Remember the episode and the actions."""
        return Known(batch["index"], batch["action"])

    def imagine(self, start: Known, policy: Policy, steps: int) -> Dream:
        """Rewards of what it dreams; copying keeps the last."""
        chosen = [policy(i, start) for i in range(steps)]  # type: ignore[arg-type]
        seen = start.done.shape[1]
        action = torch.cat([start.done, torch.stack(chosen, dim=1)], dim=1)
        paid = [
            simulate(seed, self._done(seed, each, seen)).reward[seen - 1 :]
            for seed, each in zip(start.seed.tolist(), action, strict=True)
        ]
        reward = torch.from_numpy(np.stack(paid)).T
        if self.kind == "copy":
            reward = reward[:1].expand_as(reward)
        if self.kind == "noisy":
            reward = reward + 2 * self.noise * torch.randn_like(reward)
        feat = start.feat.expand(steps + 1, *start.feat.shape)
        return Dream(feat, reward, torch.ones_like(reward), torch.stack(chosen))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """It has no modes."""
        yield

    def _done(self, seed: int, action: Tensor, seen: int) -> NDArray[np.float32]:
        """The actions that its simulator takes in place of these (T, A)."""
        done = action.numpy().copy()
        if self.kind == "wrong":
            done[seen:] *= -1.0
        if self.kind == "blind":
            done[seen:] = held_actions(np.random.default_rng(90_000 + seed), len(done))[seen:]
        return done
