"""Judges an agent's dreams against futures that were really played from the same states."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch

from mapo_lightning.envs.factory import make_env
from mapo_lightning.envs.live_labels import LiveLabeler
from mapo_lightning.envs.wrappers import PixelEnv
from mapo_lightning.judging.branches import (
    Branches,
    BranchPlan,
    opposed_sequences,
    random_sequences,
    record_branches,
)
from mapo_lightning.judging.consistency import counterfactual_consistency
from mapo_lightning.judging.decisions import decision_fidelity
from mapo_lightning.judging.dreams import dream_sequences
from mapo_lightning.judging.foresight import Foresight, foresight, record_foresight
from mapo_lightning.judging.judge import SEEN
from mapo_lightning.judging.measure import Measure, Values, reachable
from mapo_lightning.judging.physics import learn_to_see, physical_sequences, physics, spread
from mapo_lightning.models.interfaces import Valuer
from mapo_lightning.run import build
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.decisions import SEQUENCES, STEPS
from mapo_lightning.training.acting import greedy
from mapo_lightning.training.evaluation import HELD
from mapo_lightning.training.finetune import FinetuneModule
from mapo_lightning.types import MapoError

EPISODES = 32
"""Of random actions, from which a network learns to read places off frames."""

log = logging.getLogger(__name__)

Aspects = dict[str, dict[str, dict[str, Measure]]]


def judge_futures(cfg: RunConfig, module: FinetuneModule, states: int, seed: int) -> Aspects:
    """Counterfactual consistency, decisions and foresight, from states of the agent's own episodes.

    Empty, with a warning that says why, where the simulator cannot save its state or episodes are
    too short.

    Args:
        cfg: Of the run.
        module: The trained agent with its world model.
        states: Start states of each of the three.
        seed: Of everything.
    """
    try:
        with closing(make_env(build.labelled_env(cfg), seed)) as env:
            labeler = build.build_live_labeler(
                replace(cfg, vlm=build.acting_vlm(cfg)), 1, "judged-futures"
            )
            limit = env.steps_limit
            steps = STEPS if limit is None else max(1, min(STEPS, limit - SEEN))
            plan = BranchPlan(states, steps, SEEN)
            return _measured(cfg, module, env, labeler, plan, seed)
    except MapoError as error:
        log.warning("the report lacks what needs futures of one state: %s", error)
        return {}


def _measured(
    cfg: RunConfig,
    module: FinetuneModule,
    env: PixelEnv,
    labeler: LiveLabeler,
    plan: BranchPlan,
    seed: int,
) -> Aspects:
    width, agent, world_model = module.agent.action_dim, module.agent, module.world_model
    two = opposed_sequences(plan.steps, width, HELD)
    many = random_sequences(SEQUENCES, plan.steps, width, HELD)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        opposed, drawn = (
            record_branches(env, labeler.update, greedy(module), sequences, plan, seed + number)
            for number, sequences in enumerate((two, many))
        )
        seen = record_foresight(env, labeler.update, world_model, agent, plan, seed + 2)
    dreams = dream_sequences(world_model, opposed.shown, opposed.actions, seed)
    consistency = counterfactual_consistency(opposed.frames, dreams.frames)
    return {
        "consistency": {"dream": _columns(consistency)},
        "decisions": _decisions(cfg, module, drawn, seed),
        "foresight": _foresight(seen),
        **_physics(env, labeler, module, plan, seed),
    }


def _physics(
    env: PixelEnv, labeler: LiveLabeler, module: FinetuneModule, plan: BranchPlan, seed: int
) -> Aspects:
    """Places of bodies; empty where the simulator does not know them."""
    device = next(module.parameters()).device
    eyes = learn_to_see(env, EPISODES, seed + 3, device)
    if eyes is None:
        return {}
    three = physical_sequences(plan.steps, module.agent.action_dim)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        played = record_branches(env, labeler.update, greedy(module), three, plan, seed + 4)
    dreams = dream_sequences(module.world_model, played.shown, played.actions, seed)
    truth, start = eyes.places(played.frames), played.frames[:, :, :1]
    copy = np.broadcast_to(start, played.frames.shape)
    ways = {"dream": eyes.places(dreams.frames), "copy": eyes.places(copy)}
    found = {who: _columns(physics(truth, places)) for who, places in ways.items()}
    takes = _columns(spread(truth))
    for measures in found.values():
        measures |= {
            f"{name}, of the spread": measures[name]._replace(over=takes[name].values)
            for name in takes
        }
    found["true takes"] = takes
    found["reader"] = {"error": Measure((0,), np.full((len(truth), 1), eyes.error))}
    return {"physics": found}


def _decisions(
    cfg: RunConfig, module: FinetuneModule, played: Branches, seed: int
) -> dict[str, dict[str, Measure]]:
    """By the sums of dreamt rewards, and with the critic's value of the last state."""
    agent = module.agent
    dreams = dream_sequences(module.world_model, played.shown, played.actions, seed, agent)
    found = {"dream": _columns(decision_fidelity(played.returns, dreams.returns()))}
    if isinstance(agent, Valuer):
        valued = dreams.returns(cfg.agent.discount, value=True)
        found["dream and critic"] = _columns(decision_fidelity(played.returns, valued))
    return found


def _foresight(seen: Foresight) -> dict[str, dict[str, Measure]]:
    """Distances from what was imagined, and what came of it where the agent stayed close."""
    distances = foresight(seen)
    found: dict[str, dict[str, Measure]] = {}
    for name, values in distances.items():
        who, _, what = name.partition("_")
        found.setdefault(who, {})[what] = _columns({what: values})[what]
    closed = seen.closed
    last = (closed.reward.shape[1],)
    distance = np.nanmean(distances["closed_belief"], axis=1)
    near = distance <= np.nanmedian(distance)
    scores = {"return": closed.reward.sum(axis=1)}
    if closed.success is not None and np.isfinite(closed.success).any():
        scores["success"] = closed.success
    for who, chosen in (("closed, near its dream", near), ("closed, far from it", ~near)):
        found[who] = {
            name: Measure(last, np.where(chosen, score, np.nan)[:, None])
            for name, score in scores.items()
        }
    return found


def _columns(values: Mapping[str, Values]) -> dict[str, Measure]:
    """Name -> (C, H) as measures at the usual horizons."""
    steps = next(iter(values.values())).shape[1]
    ahead = reachable(steps)
    at = [horizon - 1 for horizon in ahead]
    return {name: Measure(ahead, found[:, at]) for name, found in values.items()}
