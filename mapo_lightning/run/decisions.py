"""Whether a trained agent's dreams would decide well: ``evaluate.decisions`` of stage=evaluate."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch

from mapo_lightning.envs.factory import make_env
from mapo_lightning.judging.branches import BranchPlan, random_sequences, record_branches
from mapo_lightning.judging.decisions import decision_fidelity, summary
from mapo_lightning.judging.dreams import dream_sequences
from mapo_lightning.models.interfaces import Valuer
from mapo_lightning.run import build
from mapo_lightning.run.config import RunConfig
from mapo_lightning.training.acting import greedy
from mapo_lightning.training.evaluation import HELD
from mapo_lightning.training.finetune import FinetuneModule

SEQUENCES, STEPS, SHOWN = 5, 15, 5
"""Action sequences of a state, agent steps of each, and frames that the world model is shown."""

log = logging.getLogger(__name__)


def judge_decisions(cfg: RunConfig, module: FinetuneModule) -> dict[str, float]:
    """Play and dream five random action sequences from each of ``evaluate.decisions`` states.

    The agent plays to the states, in episodes of their own. Random numbers of the program stay as
    they were.

    Returns:
        Means with 95 % intervals over the states, by name: ``regret``, ``accuracy``, ``spearman``
        of the sums of dreamt rewards; with ``value_`` before them, of those with the critic's value
        in place of the last one; ``states`` and ``steps``.

    Raises:
        MapoError: The task's state cannot be saved, or its episodes are too short.
    """
    states, seed = cfg.evaluate.decisions, cfg.evaluate.seed
    log.info("playing and dreaming %d action sequences from each of %d states", SEQUENCES, states)
    env = make_env(build.labelled_env(cfg), seed)
    labeler = build.build_live_labeler(replace(cfg, vlm=build.acting_vlm(cfg)), 1, "decisions")
    steps = STEPS if env.steps_limit is None else max(1, min(STEPS, env.steps_limit - SHOWN))
    sequences = random_sequences(SEQUENCES, steps, module.agent.action_dim, HELD)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            played = record_branches(
                env, labeler.update, greedy(module), sequences,
                BranchPlan(states, steps, SHOWN), seed,
            )  # fmt: skip
    finally:
        env.close()
    agent = module.agent
    dreams = dream_sequences(module.world_model, played.shown, played.actions, seed, agent)
    found = summary(decision_fidelity(played.returns, dreams.returns()))
    if isinstance(agent, Valuer):
        valued = dreams.returns(cfg.agent.discount, value=True)
        with_value = summary(decision_fidelity(played.returns, valued))
        found |= {f"value_{k}": v for k, v in with_value.items() if k != "decided"}
    return {**found, "states": float(states), "steps": float(steps)}


def sentence(found: Mapping[str, float]) -> str:
    """What was found, for people."""
    start = f"  decisions by dream, {SEQUENCES} random sequences of {found['steps']:.0f} steps: "
    if "regret" not in found:
        return start + f"all had the same return, from each of {found['states']:.0f} states"
    interval = "{regret:.2f} [{regret_low:.2f}, {regret_high:.2f}]".format(**found)
    return start + (
        f"regret {interval} of the range, {found['accuracy']:.0%} of pairs in the right order "
        f"({found['decided']:.0f} of {found['states']:.0f} states)"
    )
