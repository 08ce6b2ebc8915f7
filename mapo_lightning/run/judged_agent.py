"""Judges the dreams of an agent's world model on fresh episodes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mapo_lightning.data.replay import Replay
from mapo_lightning.envs.collector import Collector
from mapo_lightning.envs.episodes import Policy, RandomPolicy
from mapo_lightning.judging.clips import Clips
from mapo_lightning.judging.episodes import Entries, fresh, halves
from mapo_lightning.judging.executable import inverse_model
from mapo_lightning.judging.judge import SEEN, judge
from mapo_lightning.judging.looks import Distance
from mapo_lightning.judging.measure import HORIZONS
from mapo_lightning.judging.report import DreamReport, report
from mapo_lightning.judging.rollouts import write_rollouts
from mapo_lightning.run import build
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.judged_futures import judge_futures
from mapo_lightning.training.acting import acting
from mapo_lightning.training.evaluation import HELD
from mapo_lightning.training.finetune import FinetuneModule
from mapo_lightning.training.published_weights import perceptual_distance
from mapo_lightning.training.settings import seed_after
from mapo_lightning.types import ConfigError

CLIPS = 48
"""Clips that are judged where ``evaluate.dreams`` does not say."""
_FRESH = 7_919  # the episodes that are judged have other seeds than those of training


def judge_episodes(
    cfg: RunConfig, module: FinetuneModule, action_dim: int, title: str
) -> DreamReport:
    """Judge an agent's model on fresh episodes, half of them its own, half at random.

    Leaves the program's random numbers as they were.

    Args:
        cfg: Of the run; ``evaluate.dreams`` says how many episodes.
        module: The trained agent with its world model, on the device where it dreams.
        action_dim: Width A of an action.
        title: Whose dreams they are.

    Raises:
        ConfigError: The episodes are too short.
        EnvironmentSetupError: The environments fail.
    """
    device, seed = next(module.parameters()).device, seed_after(cfg.evaluate.seed, _FRESH)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        episodes = _played(cfg, module, action_dim, seed)
    try:
        judged = halves(episodes, SEEN, HORIZONS[-1], seed)
        inverse = inverse_model({key: x.to(device) for key, x in judged.learned.items()})
        clips = judged.clips.to(device)
        keep = kept_rollouts(cfg, clips, cfg.env.fps)
        found = judge(module.world_model, clips, title, inverse, perceptual(cfg), keep=keep)
    except ValueError as error:
        raise ConfigError(f"the dreams cannot be judged: {error}") from error
    states = max(2, (cfg.evaluate.dreams or CLIPS) // 2)
    futures = judge_futures(cfg, module, states, seed)
    return found.with_more(report(title, futures, np.arange(states)))


def kept_rollouts(cfg: RunConfig, clips: Clips, fps: float) -> Callable[[Tensor], None] | None:
    """Writes dreams into ``evaluate.rollouts``, where the user has named a folder."""
    if not cfg.evaluate.rollouts:
        return None
    folder, model = Path(cfg.evaluate.rollouts), f"{cfg.method}, seed {cfg.seed}"
    return partial(_write, folder, clips, fps, model)


def _write(folder: Path, clips: Clips, fps: float, model: str, dream: Tensor) -> None:
    try:
        write_rollouts(folder, clips, dream, SEEN, fps, model)
    except OSError as error:
        raise ConfigError(
            f"evaluate.rollouts='{folder}' cannot be written ({error.strerror}): give another "
            "folder"
        ) from error


def perceptual(cfg: RunConfig) -> Distance | None:
    """LPIPS, where the user has named VGG16."""
    return perceptual_distance(Path(cfg.token_world.vgg)) if cfg.token_world.vgg else None


def _played(cfg: RunConfig, module: FinetuneModule, action_dim: int, seed: int) -> list[Entries]:
    """Episodes of random actions, then as many of the agent's greedy ones."""
    policies: list[Policy] = [RandomPolicy(action_dim, seed, HELD), acting(module, explore=False)]
    found: list[Entries] = []
    with tempfile.TemporaryDirectory(prefix="mapo-dreams-") as place:
        for number, policy in enumerate(policies):
            played = replace(cfg, seed=seed + number, vlm=build.acting_vlm(cfg))
            folder = Path(place) / str(number)

            def make(played: RunConfig = played, folder: Path = folder) -> tuple[Collector, Replay]:
                return build.build_collection(played, folder, 0)[:2]

            found += fresh(make, policy, cfg.evaluate.dreams or CLIPS)
    return found
