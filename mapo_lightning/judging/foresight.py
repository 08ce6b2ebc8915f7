"""Foresight: does what the agent does follow what it imagined, and does it succeed if it does?

In a state of an episode the agent imagines how it will go on. The imagined actions are then really
executed from that state, and so is the agent's own closed loop, which looks again at every step.

Shapes: C contexts, H steps, h w image, F feat, A action.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mapo_lightning.envs.episodes import Policy
from mapo_lightning.envs.live_labels import Step
from mapo_lightning.envs.wrappers import PixelEnv
from mapo_lightning.judging.branches import Branches, BranchPlan, Label, record_branches
from mapo_lightning.judging.dreams import batch_of, drawn, judged
from mapo_lightning.models.interfaces import Agent, Belief, WorldModel
from mapo_lightning.training.acting import ActingPolicy
from mapo_lightning.training.told import MOVING
from mapo_lightning.types import POSITIONS, Frames, MapoError

Values = NDArray[np.float64]


class Trajectory(NamedTuple):
    """One way to go on from each of C states."""

    frames: Frames
    """(C, H + 1, h, w, 3) uint8; entry 0 is the start."""
    feat: NDArray[np.float32]
    """(C, H + 1, F): beliefs, imagined ones or those after the real frames."""
    reward: Values
    """(C, H)."""
    success: Values | None = None
    """(C,): 1.0 if any step succeeded, else 0.0, NaN where the suite does not say; None if only
    imagined."""


class Foresight(NamedTuple):
    """What was imagined, what its actions led to, and what the agent did in its closed loop."""

    imagined: Trajectory
    executed: Trajectory
    closed: Trajectory


class Split(NamedTuple):
    """Scores of the contexts in which the real way stayed close to the imagined one, and others."""

    median: float
    """Distance that parts them; those at the median are close."""
    close: float
    """Mean score; NaN if there is none."""
    far: float
    close_count: int
    far_count: int


def record_foresight(
    env: PixelEnv,
    label: Label,
    world_model: WorldModel,
    agent: Agent,
    plan: BranchPlan,
    seed: int,
    leader: Callable[[int], Policy] | None = None,
) -> Foresight:
    """Play the agent to C states, let it imagine, and play both ways on; same seed, same result.

    It imagines from the belief that it has, which remembers the whole episode. No phrases are
    known after the start, neither in the imagination nor to the beliefs that follow real frames.

    Args:
        env: One environment, whose simulator can save its state.
        label: Labels what it shows.
        world_model: Of the agent.
        agent: Acts greedily; a planner has no part in it.
        plan: Numbers and lengths; ``closed`` need not be set.
        seed: Of everything.
        leader: Makes, from an episode's reset seed, the policy that plays to the state while the
            agent only watches: the states are then the same for every agent. None: the agent plays.

    Raises:
        ConfigError: The episodes are too short, or nothing draws the dreams.
        MapoError: As `record_branches`.
    """
    seer = _Seer(world_model, agent, plan.steps, seed, leader)
    closing = BranchPlan(plan.contexts, plan.steps, plan.shown, closed=True)
    device = next(iter(world_model.parameters())).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        played = record_branches(env, label, seer.begin, seer.imagine, closing, seed, seer.turn)
    imagined = [np.concatenate(parts) for parts in zip(*seer.imagined, strict=True)]
    executed, closed = (seer.followed(played, number) for number in (0, 1))
    return Foresight(Trajectory(*imagined), executed, closed)


def foresight(found: Foresight) -> Mapping[str, Values]:
    """How far reality is from what was imagined, at every step.

    For ``executed`` (the imagined actions) and ``closed`` (the agent's own loop):

    - ``NAME_frames``: mean squared error of the imagined picture, colours in [0, 1], on the pixels
      that move in the real film or in the imagined one. ``NAME_still`` is that of the real picture
      of the start, in which nothing moves: an imagination that is not below it foresees nothing.
    - ``NAME_belief``: distance of the imagined belief from that after the real frames, over the
      mean distance of the latter from the beliefs of other contexts; 1: as far as from any.

    The closed loop may leave the imagined way because the imagination was wrong, or because the
    agent, seeing more, found a better one: the distance cannot tell these apart; ``executed``
    cannot be far for the second reason. Beliefs are samples, so they differ a little even where the
    imagination was right; and a belief that holds little is close to everything.

    Returns:
        Name -> (C, H); NaN where nothing moves, and for beliefs of a single context.
    """
    values: dict[str, Values] = {}
    for name, real in (("executed", found.executed), ("closed", found.closed)):
        still = np.broadcast_to(real.frames[:, :1], real.frames.shape)
        moving = moves(real.frames) | moves(found.imagined.frames)
        values[f"{name}_frames"] = error_on(moving, real.frames, found.imagined.frames)
        values[f"{name}_still"] = error_on(moving, real.frames, still)
        values[f"{name}_belief"] = belief_distance(real.feat, found.imagined.feat)
    return values


def moves(film: Frames) -> NDArray[np.bool_]:
    """Pixels of films (C, T, h, w, 3) that change by more than a tenth of the range, (C, h, w)."""
    spread = film.max(axis=1).astype(np.int16) - film.min(axis=1)
    found: NDArray[np.bool_] = (spread > 255 * MOVING).any(axis=-1)
    return found


def error_on(moving: NDArray[np.bool_], truth: Frames, film: Frames) -> Values:
    """Mean squared error on some pixels (C, h, w) at every step but the first, (C, H)."""
    squared = np.square((truth[:, 1:].astype(np.float32) - film[:, 1:]) / 255.0)
    total = (squared * moving[:, None, :, :, None]).sum(axis=(2, 3, 4), dtype=np.float64)
    count = 3.0 * moving.sum(axis=(1, 2))[:, None] * np.ones_like(total)
    found: Values = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return found


def belief_distance(real: NDArray[np.floating], imagined: NDArray[np.floating]) -> Values:
    """Distance of beliefs (C, H + 1, F) over that of the real ones from other contexts, (C, H)."""
    away = np.linalg.norm((real - imagined)[:, 1:].astype(np.float64), axis=2)
    others = np.full_like(away, np.nan)
    for number in range(len(real)):
        rest = np.delete(real, number, axis=0)[:, 1:] - real[number, 1:]
        if len(rest):
            others[number] = np.linalg.norm(rest.astype(np.float64), axis=2).mean(axis=0)
    found: Values = np.divide(away, others, out=np.full_like(away, np.nan), where=others > 0)
    return found


def given_close(distance: Values, score: Values) -> Split:
    """Mean score where the real way stayed close to the imagined one, and where it did not.

    Args:
        distance: Of each context, (C,), for example the mean over steps of one of `foresight`;
            contexts without a number are left out.
        score: Return or success of each context, (C,).

    Raises:
        MapoError: No context has both numbers.
    """
    both = np.isfinite(distance) & np.isfinite(score)
    if not both.any():
        raise MapoError(f"none of {len(score)} contexts has a distance and a score to compare")
    distance, score = distance[both], score[both]
    median = float(np.median(distance))
    close = distance <= median
    far = float(score[~close].mean()) if (~close).any() else float("nan")
    return Split(median, float(score[close].mean()), far, int(close.sum()), int((~close).sum()))


class _Led:
    """An agent that watches another policy's episode until it is its turn to act."""

    def __init__(self, agent: ActingPolicy, leader: Policy) -> None:
        self.agent, self.leader, self.leads = agent, leader, True

    def __call__(self, step: Step) -> NDArray[np.float32]:
        self.agent.see(step)
        if not self.leads:
            return self.agent.choose()
        action = self.leader(step)
        self.agent.take(action)
        return action


class _Seer:
    """Imagines how the agent will go on, from the belief that its policy has."""

    def __init__(
        self,
        world_model: WorldModel,
        agent: Agent,
        steps: int,
        seed: int,
        leader: Callable[[int], Policy] | None,
    ) -> None:
        self.world_model, self.agent, self.steps, self.seed = world_model, agent, steps, seed
        self.leader = leader
        self.led: _Led | None = None
        self.imagined: list[tuple[Frames, NDArray[np.float32], Values]] = []
        self.beliefs: list[Belief] = []
        self.policy: ActingPolicy | None = None

    def begin(self, reset_seed: int) -> Policy:
        """What acts in one episode."""
        torch.manual_seed(reset_seed)
        self.policy = ActingPolicy(self.world_model, self.agent, explore=False)
        if self.leader is None:
            return self.policy
        self.led = _Led(self.policy, self.leader(reset_seed))
        return self.led

    def turn(self) -> None:
        """The agent acts from here on."""
        if self.led is not None:
            self.led.leads = False

    def imagine(self, shown: Step, _: np.random.Generator) -> NDArray[np.float32]:
        """Its actions in imagination, (1, H, A), as the one sequence to execute."""
        assert self.policy is not None
        belief = self.policy.belief
        assert belief is not None
        with judged(self.world_model, self.seed):
            dream = self.world_model.imagine(
                belief, lambda _, now: self.agent.act(now, False), self.steps
            )
            seen = batch_of(self.world_model, {"obs": shown["obs"][None]})["obs"]
            frames = drawn(self.world_model, dream, seen)
        assert dream.action is not None
        reward, feat = dream.reward[1:].T.double(), dream.feat.transpose(0, 1).float()
        self.imagined.append((frames.cpu().numpy(), feat.cpu().numpy(), reward.cpu().numpy()))
        self.beliefs.append(belief)
        actions: NDArray[np.float32] = dream.action.transpose(0, 1).float().cpu().numpy()
        return actions

    def followed(self, played: Branches, number: int) -> Trajectory:
        """One of the two ways that were really played, with the beliefs after its frames."""
        feats = []
        for context, before in enumerate(self.beliefs):
            with judged(self.world_model, self.seed):
                batch = batch_of(self.world_model, _unlabelled(played, context, number))
                after = self.world_model.observe(batch, before).feat[0]
            feats.append(torch.cat([_row(before.feat), after]).float().cpu().numpy())
        return Trajectory(
            played.frames[:, number],
            np.stack(feats),
            played.reward[:, number],
            played.success[:, number],
        )


def _row(feat: Tensor) -> Tensor:
    """Features of the start, (1, F)."""
    return feat.reshape(1, -1)


def _unlabelled(played: Branches, context: int, number: int) -> Mapping[str, NDArray[np.generic]]:
    """The steps of one future as a batch (1, H, ...) in which no phrase is known."""
    actions = played.actions[context, number]
    steps, last = len(actions), {key: x[context, -1] for key, x in played.shown.items()}
    return {
        "obs": played.frames[context, number, 1:][None],
        "action": actions[None],
        "is_first": np.zeros((1, steps), bool),
        "semantic": np.zeros((1, steps, *last["semantic"].shape), np.float32),
        "has_semantic": np.zeros((1, steps), bool),
        "position": (last["position"] + 1 + np.arange(steps))[None] % POSITIONS,
    }
