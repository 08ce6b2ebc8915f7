"""Futures that were really played, and dreams made of them whose order of quality is known."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.envs.episodes import RandomPolicy
from mapo_lightning.envs.factory import make_env
from mapo_lightning.envs.live_labels import Step
from mapo_lightning.envs.settings import EnvConfig
from mapo_lightning.envs.wrappers import PixelEnv
from mapo_lightning.judging.branches import (
    Branches,
    BranchPlan,
    Sequences,
    opposed_sequences,
    random_sequences,
    record_branches,
)
from mapo_lightning.types import Frames

SEMANTIC = 4
"""Width of the vectors of phrases that nobody has said."""


class Unlabelled:
    """Labels of one environment that are all null, with the positions of a describer's."""

    def __init__(self) -> None:
        self.age = -1

    def __call__(self, obs: dict[str, NDArray[np.uint8]], is_first: NDArray[np.bool_]) -> Step:
        self.age = 0 if is_first[0] else self.age + 1
        return {
            "semantic": np.zeros((1, SEMANTIC), np.float32),
            "has_semantic": np.zeros(1, bool),
            "position": np.array([self.age % 25]),
        }


def record(
    cfg: EnvConfig, sequences: Sequences, plan: BranchPlan, seed: int = 0, **how: Any
) -> Branches:
    env: PixelEnv = make_env(cfg, 0)
    width = env.action_space.shape[0]
    policy = how.get("policy", lambda reset_seed: RandomPolicy(width, reset_seed, hold=3))
    found = record_branches(env, Unlabelled(), policy, sequences, plan, seed)
    env.close()
    return found


def with_negatives(count: int, steps: int, width: int) -> Sequences:
    """Random sequences, and then the same with the other sign."""
    draw = random_sequences(count, steps, width, hold=6)

    def both(shown: Step, rng: np.random.Generator) -> NDArray[np.float32]:
        drawn = draw(shown, rng)
        return np.concatenate([drawn, -drawn])

    return both


@cache
def truth(kind: Any, name: str, width: int, contexts: int, steps: int = 10) -> Branches:
    """Five random sequences and their negatives from each state."""
    cfg = EnvConfig(kind=kind, name=name, size=64)
    return record(cfg, with_negatives(5, steps, width), BranchPlan(contexts, steps))


@cache
def opposed(kind: Any, name: str, width: int, contexts: int, steps: int = 10) -> Branches:
    """A random sequence and its negative from each state."""
    cfg = EnvConfig(kind=kind, name=name, size=64)
    return record(cfg, opposed_sequences(steps, width, hold=6), BranchPlan(contexts, steps))


def dreamt_films(frames: Frames, wrong: Frames) -> dict[str, Frames]:
    """Dreams of films (C, K, H + 1, h, w, 3), ``wrong`` being those of the negated actions."""
    rng = np.random.default_rng(0)
    blind = frames.mean(axis=1, keepdims=True).round().astype(np.uint8)
    return {
        "oracle": frames,
        "noisy oracle": np.clip(frames + rng.normal(0.0, 30.0, frames.shape), 0, 255)
        .round()
        .astype(np.uint8),
        "copy of the last frame": np.broadcast_to(frames[:, :, :1], frames.shape),
        "blind to actions": np.broadcast_to(blind, frames.shape),
        "wrong direction": wrong,
    }


def dreamt_returns(
    returns: NDArray[np.float64], wrong: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """The same of returns (C, K, H)."""
    rng = np.random.default_rng(0)
    spread = returns.std(axis=1, keepdims=True)
    return {
        "oracle": returns,
        "noisy oracle": returns + spread * rng.normal(size=returns.shape),
        "copy of the last frame": np.zeros_like(returns),
        "blind to actions": np.broadcast_to(returns.mean(axis=1, keepdims=True), returns.shape),
        "wrong direction": wrong,
    }
