"""Judges whether dreams tell which of several agents is better, such as the checkpoints of a run.

Every agent goes on from the same states of the same episodes, which random actions lead to. Its
imagined return is compared with the one that it then really gets.

Shapes: R agents, C states, H agent steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mapo_lightning.envs.episodes import RandomPolicy
from mapo_lightning.envs.factory import make_env
from mapo_lightning.envs.settings import EnvConfig
from mapo_lightning.judging.branches import BranchPlan
from mapo_lightning.judging.decisions import over_checkpoints, over_checkpoints_interval
from mapo_lightning.judging.foresight import record_foresight
from mapo_lightning.judging.judge import SEEN
from mapo_lightning.judging.measure import HORIZONS, Estimate, Measure, Values, reachable
from mapo_lightning.judging.report import DreamReport, Row
from mapo_lightning.run import build
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.judged_agent import CLIPS
from mapo_lightning.run.trainer import best_device
from mapo_lightning.training.evaluation import HELD
from mapo_lightning.training.settings import seed_after
from mapo_lightning.types import ConfigError

LEAST = 3
"""Agents that can be ranked."""
_SEED = 104_729  # of states that no other measure of the report plays


class Returns(NamedTuple):
    """What one agent got from C states, and what it had imagined."""

    really: Values
    """Sum of rewards up to each step, (C, H)."""
    imagined: Values


def returns_of(cfg: RunConfig, path: Path, seed: int, contexts: int) -> Returns:
    """Play and dream one agent from states that depend on the task and ``seed`` alone.

    Args:
        cfg: Settings of the checkpoint.
        path: The checkpoint.
        seed: First reset seed of the episodes to which the states belong.
        contexts: Number C of states.

    Raises:
        CheckpointError: The file holds no agent, or does not fit its settings.
        ConfigError: The episodes are too short.
        MapoError: The simulator cannot save its state.
    """
    module, metadata = build.load_finetuned(cfg, path)
    module.to(best_device(cfg.trainer.accelerator))
    leader = partial(RandomPolicy, metadata["action_dim"], hold=HELD)
    with closing(make_env(build.labelled_env(cfg), seed)) as env:
        vlm = build.acting_vlm(cfg)
        labeler = build.build_live_labeler(replace(cfg, vlm=vlm), 1, "judged-checkpoints")
        limit = env.steps_limit
        steps = HORIZONS[-1] if limit is None else max(1, min(HORIZONS[-1], limit - SEEN))
        plan = BranchPlan(contexts, steps, SEEN)
        seen = record_foresight(
            env, labeler.update, module.world_model, module.agent, plan, seed, leader
        )
    return Returns(seen.closed.reward.cumsum(axis=1), seen.imagined.reward.cumsum(axis=1))


def judge_checkpoints(runs: Sequence[tuple[RunConfig, Path]]) -> DreamReport:
    """Rank agents of one task by their dreams, and see whether the ranking is true.

    Args:
        runs: Settings and checkpoint of each agent, `LEAST` or more.

    Raises:
        ConfigError: There are too few, or they act in different tasks; otherwise as `returns_of`.
    """
    tasks = {_task(cfg.env) for cfg, _ in runs}
    if len(runs) < LEAST or len(tasks) > 1:
        raise ConfigError(
            f"agents are ranked where there are {LEAST} or more of one task, got {len(runs)} of "
            f"{'; '.join(sorted(tasks))}"
        )
    # Behind the seeds that have chosen any of them.
    seed = seed_after(max(cfg.evaluate.seed for cfg, _ in runs), _SEED)
    contexts = max(cfg.evaluate.dreams or CLIPS for cfg, _ in runs)
    found = [returns_of(cfg, path, seed, contexts) for cfg, path in runs]
    really, imagined = (np.stack(part) for part in zip(*found, strict=True))
    rows: list[Row] = []
    ahead = reachable(really.shape[2], (*HORIZONS, really.shape[2]))
    for column in sorted(set(ahead)):
        rows += _ranked(really[..., :column], imagined[..., :column])
    for number, (_, path) in enumerate(runs):
        for name, values in (("really", really), ("imagined", imagined)):
            last = Measure((really.shape[2],), values[number][:, -1:])
            who = f"{number + 1}: {path.parent.name}/{path.name}"
            rows.append(Row("checkpoints", who, f"return, {name}", last.ahead[0], last.estimate(0)))
    name = runs[0][0].env.name
    return DreamReport(f"{len(runs)} agents of {name}, ranked by their dreams", tuple(rows))


def _task(env: EnvConfig) -> str:
    """What makes returns comparable, in words."""
    limit = "its own length" if env.time_limit is None else f"{env.time_limit} agent steps"
    return f"{env.kind}/{env.name} ({env.frames_per_step} frames a step, episodes of {limit})"


def _ranked(really: Values, imagined: Values) -> list[Row]:
    """Both rank correlations after the last of (R, C, H) steps."""
    ahead = really.shape[2]
    if np.ptp(really[..., -1].mean(axis=1)) == 0.0:  # nothing to rank
        return []
    found = over_checkpoints(really, imagined)
    low, high = over_checkpoints_interval(really[..., -1], imagined[..., -1])
    of_means = Estimate(float(found["of_means"][0, -1]), low, high, really.shape[1])
    each = Measure((ahead,), found["per_state"][:, -1:]).estimate(0)
    return [
        Row("checkpoints", "dream", "rank correlation of means", ahead, of_means),
        Row("checkpoints", "dream", "rank correlation per state", ahead, each),
    ]
