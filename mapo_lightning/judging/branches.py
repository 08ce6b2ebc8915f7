"""Several futures of one state, really played: the truth that dreams are compared with.

A policy plays to a state, the state is saved, and action sequences are run from it one after the
other, each from exactly the same state. The few frames before it are what a world model is shown.

Shapes: C contexts (start states), S shown frames, K action sequences, H steps, h w image, A action.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.envs.episodes import Policy
from mapo_lightning.envs.live_labels import Step
from mapo_lightning.envs.wrappers import Observation, PixelEnv
from mapo_lightning.types import ConfigError, Frames, MapoError

Sequences = Callable[[Step, np.random.Generator], NDArray[np.float32]]
"""Makes the action sequences (K, H, A) of a context from the frames shown, (S, ...)."""

Label = Callable[[dict[str, NDArray[np.uint8]], NDArray[np.bool_]], Step]
"""Labels what one environment shows, as `LiveLabeler.update`."""

_TRIES = 20  # episodes that may end before the state in which a context starts
_ENDLESS = 200  # agent steps among which states are drawn where nothing limits an episode


@dataclass(frozen=True)
class BranchPlan:
    """How many futures are played, and how long.

    Attributes:
        contexts: Start states C, each in an episode of its own.
        steps: Agent steps H of every sequence.
        shown: Frames S that a world model sees, the start state's included.
        closed: Play one more sequence, the last: what the policy itself goes on to do.
    """

    contexts: int
    steps: int
    shown: int = 5
    closed: bool = False

    def __post_init__(self) -> None:
        for name in ("contexts", "steps", "shown"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


class Branches(NamedTuple):
    """Futures of C states, and what was seen before them."""

    shown: dict[str, NDArray[Any]]
    """The keys of `types` that models read in control, (C, S, ...); ``is_first`` holds at the first
    entry, because a world model that is shown these frames begins there."""
    actions: NDArray[np.float32]
    """(C, K, H, A) in [-1, 1]."""
    frames: Frames
    """(C, K, H + 1, h, w, 3) uint8; entry 0 is the start. The last one before the end is repeated
    after it."""
    reward: NDArray[np.float64]
    """(C, K, H), in units of the environment; 0 after the end."""
    terminated: NDArray[np.bool_]
    """(C, K, H): whether the task ended at this step."""
    success: NDArray[np.float64]
    """(C, K): 1.0 where any step succeeded, else 0.0; NaN where the suite does not say."""

    @property
    def returns(self) -> NDArray[np.float64]:
        """Sums of rewards up to each step, (C, K, H)."""
        return np.cumsum(self.reward, axis=2)


class Branch(NamedTuple):
    """One future."""

    actions: NDArray[np.float32]  # (H, A)
    frames: Frames  # (H + 1, h, w, 3)
    reward: NDArray[np.float64]  # (H,)
    terminated: NDArray[np.bool_]  # (H,)
    success: float


def random_sequences(count: int, steps: int, width: int, hold: int = 4) -> Sequences:
    """Uniform random actions, each held for some steps: single ones would cancel out.

    Args:
        count: Sequences K.
        steps: Steps H.
        width: Numbers A of an action.
        hold: Agent steps for which an action is held.
    """

    def draw(_: Step, rng: np.random.Generator) -> NDArray[np.float32]:
        drawn = rng.uniform(-1.0, 1.0, (count, -(-steps // hold), width))
        return drawn.repeat(hold, axis=1)[:, :steps].astype(np.float32)

    return draw


def opposed_sequences(steps: int, width: int, hold: int = 4) -> Sequences:
    """Two sequences: held random actions, and the same with the other sign."""
    one = random_sequences(1, steps, width, hold)

    def draw(shown: Step, rng: np.random.Generator) -> NDArray[np.float32]:
        drawn = one(shown, rng)
        return np.concatenate([drawn, -drawn])

    return draw


def record_branches(
    env: PixelEnv,
    label: Label,
    policy_of: Callable[[int], Policy],
    sequences: Sequences,
    plan: BranchPlan,
    seed: int,
    turn: Callable[[], None] | None = None,
) -> Branches:
    """Play to C states, and K futures of each; the same seed gives the same.

    Args:
        env: One environment, whose simulator can save its state.
        label: Labels what it shows.
        policy_of: Makes the policy of one episode, without memory, from the episode's reset seed.
        sequences: Makes the action sequences.
        plan: Numbers and lengths.
        seed: Of the episodes, the moments and the sequences; each context has numbers of its own.
        turn: Called just before the policy sees the start state, for a policy that acts otherwise
            from there on.

    Raises:
        ConfigError: The episodes of this task are too short.
        MapoError: They end too early, or the simulator cannot save its state.
    """
    found = [
        _context(env, label, policy_of, sequences, plan, (seed, number), turn)
        for number in range(plan.contexts)
    ]
    shown = {key: np.stack([context[key] for context, _ in found]) for key in found[0][0]}
    futures = [[np.stack(part) for part in zip(*branches, strict=True)] for _, branches in found]
    return Branches(shown, *(np.stack(part) for part in zip(*futures, strict=True)))


def _context(
    env: PixelEnv,
    label: Label,
    policy_of: Callable[[int], Policy],
    sequences: Sequences,
    plan: BranchPlan,
    seed: tuple[int, int],
    turn: Callable[[], None] | None,
) -> tuple[Step, list[Branch]]:
    """One start state and its futures."""
    first, last = _moments(env, plan)
    for attempt in range(_TRIES):
        rng = np.random.default_rng([*seed, attempt])
        start, reset_seed = int(rng.integers(first, last + 1)), int(rng.integers(2**32))
        player = _Player(env, label, policy_of(reset_seed), plan.shown)
        ended = player.play_to(reset_seed, start, turn)
        if ended is not None:
            last = max(first, min(last, ended - 1))  # episodes are shorter than their limit
            continue
        snapshot, branches = env.save(), []
        for actions in sequences(player.shown, rng):
            taken = _run(env, env.restore(snapshot), _given(actions), plan.steps)
            branches.append(taken._replace(actions=actions))
        if plan.closed:
            branches.append(player.go_on(env.restore(snapshot), plan.steps))
        return player.shown, branches
    raise MapoError(
        f"{_TRIES} episodes of {env.name} in a row ended before futures were to be played, after "
        f"{first} to {last} agent steps: show fewer frames than {plan.shown}, or let another "
        "policy play"
    )


def _moments(env: PixelEnv, plan: BranchPlan) -> tuple[int, int]:
    """First and last agent step after which a future fits into an episode."""
    first, limit = plan.shown - 1, env.steps_limit
    last = first + _ENDLESS if limit is None else limit - plan.steps
    if last < first:
        raise ConfigError(
            f"{plan.shown} shown frames and {plan.steps} steps ahead do not fit into an episode of "
            f"{env.name}, which has at most {limit} agent steps: ask for fewer of them"
        )
    return first, last


class _Player:
    """A policy in one environment, with the last few entries of what it saw and did."""

    def __init__(self, env: PixelEnv, label: Label, policy: Policy, shown: int) -> None:
        self.env, self.label, self.policy, self.keep = env, label, policy, shown
        self.entries: list[Step] = []
        self.action = np.zeros((1, *env.action_space.shape), np.float32)

    def play_to(
        self, reset_seed: int, start: int, turn: Callable[[], None] | None = None
    ) -> int | None:
        """Begin an episode and take ``start`` steps; the step at which it ended, if it did."""
        obs, _ = self.env.reset(seed=reset_seed)
        for step in range(start):
            self._see(obs, first=step == 0)
            obs, _, terminated, truncated, _ = self.env.step(self.action[0])
            if terminated or truncated:
                return step + 1
        if turn is not None:
            turn()
        self._see(obs, first=start == 0)
        return None

    @property
    def shown(self) -> Step:
        """The last S entries, (S, ...), as the beginning of a sequence."""
        last = self.entries[-self.keep :]
        found = {key: np.concatenate([entry[key] for entry in last]) for key in last[0]}
        found["is_first"] = np.arange(self.keep) == 0
        return found

    def go_on(self, obs: Observation, steps: int) -> Branch:
        """What the policy does next; it has already seen the start, ``obs``."""

        def act(step: int, now: Observation) -> NDArray[np.float32]:
            if step:
                self._see(now)
            action: NDArray[np.float32] = self.action[0]
            return action

        return _run(self.env, obs, act, steps)

    def _see(self, obs: Observation, first: bool = False) -> None:
        begins = np.array([first])
        batch = {key: picture[None] for key, picture in obs.items()}
        seen = {"obs": batch["image"], "is_first": begins, **self.label(batch, begins)}
        self.entries = [*self.entries, {**seen, "action": self.action}][-self.keep :]
        self.action = self.policy(seen)


def _given(actions: NDArray[np.float32]) -> Callable[[int, Observation], NDArray[np.float32]]:
    def act(step: int, _: Observation) -> NDArray[np.float32]:
        action: NDArray[np.float32] = actions[step]
        return action

    return act


def _run(
    env: PixelEnv,
    obs: Observation,
    act: Callable[[int, Observation], NDArray[np.float32]],
    steps: int,
) -> Branch:
    """Play from the present state, which looks like ``obs``; actions that nothing took are zero."""
    frames, success = [obs["image"]] * (steps + 1), np.nan
    actions = np.zeros((steps, *env.action_space.shape), np.float32)
    reward, terminated = np.zeros(steps), np.zeros(steps, bool)
    for step in range(steps):
        actions[step] = act(step, obs)
        obs, reward[step], terminated[step], truncated, info = env.step(actions[step])
        frames[step + 1 :] = [obs["image"]] * (steps - step)
        if "success" in info:
            success = max(np.nan_to_num(success), info["success"])
        if terminated[step] or truncated:
            break
    return Branch(actions, np.stack(frames), reward, terminated, success)
