"""What policies that learn nothing reach in short episodes: how the demo's task was chosen.

    python benchmarks/tasks.py dmc/cheetah_run dmc/reacher_easy --repeat 4

Every policy plays the same reset seeds. The best constant action is chosen on other seeds than it
is played on: in one dimension out of 21 actions, otherwise out of corners, middle and random ones.
Nothing is drawn, so a row takes seconds to minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.envs.actions import action_width, to_space
from mapo_lightning.envs.episodes import RandomPolicy
from mapo_lightning.envs.factory import make_simulator
from mapo_lightning.envs.settings import EnvConfig
from mapo_lightning.envs.wrappers import Simulator
from mapo_lightning.training.evaluation import HELD

Action = NDArray[np.float64]
Policy = Callable[[int], Action]
"""Number of the agent's step -> action (A,) in [-1, 1]."""

TASKS = (
    "toy/disc",
    "dmc/cheetah_run",
    "dmc/walker_run",
    "dmc/walker_walk",
    "dmc/hopper_stand",
    "dmc/finger_spin",
    "dmc/finger_turn_easy",
    "dmc/reacher_easy",
    "dmc/cartpole_balance",
    "dmc/cartpole_swingup",
    "dmc/pendulum_swingup",
    "dmc/ball_in_cup_catch",
    "dmc/point_mass_easy",
)


def returns(
    simulator: Simulator, scene: EnvConfig, policy: Callable[[int], Policy], seeds: range
) -> NDArray[np.float64]:
    """Return of one episode per reset seed; ``policy`` gives a seed's own policy."""
    found = []
    for seed in seeds:
        simulator.reset(seed)
        act, total = policy(seed), 0.0
        for step in range(scene.time_limit or 0):
            action = to_space(simulator.action_space, act(step))
            for _ in range(scene.frames_per_step):
                outcome = simulator.step(action)
                total += outcome.reward
                if outcome.terminated or outcome.truncated:
                    break
            if outcome.terminated or outcome.truncated:
                break
        found.append(total)
    return np.array(found)


def random_policy(width: int, hold: int) -> Callable[[int], Policy]:
    """The package's random actions, each held for ``hold`` steps; a seed always plays the same."""

    def of(seed: int) -> Policy:
        policy, one = RandomPolicy(width, seed, hold), {"is_first": np.zeros(1, bool)}
        return lambda step: policy(one)[0]

    return of


def constant(action: Action) -> Callable[[int], Policy]:
    """The same action in every step of every episode."""
    return lambda seed: lambda step: action


def candidates(width: int, count: int) -> list[Action]:
    """Constant actions to choose from."""
    if width == 1:
        return [np.array([value]) for value in np.linspace(-1.0, 1.0, 21)]
    rng = np.random.default_rng(0)
    corners = [np.array(c) for c in product((-1.0, 1.0), repeat=width)]
    rng.shuffle(corners)
    drawn = list(rng.uniform(-1.0, 1.0, (count, width)))
    return [np.zeros(width), *corners[:count], *drawn][: count + 1]


def row(name: str, repeat: int, steps: int, episodes: int, count: int) -> str:
    """One line of the table: returns, mean ± standard error over the episodes."""
    kind, _, task = name.partition("/")
    own = kind == "toy"  # its episodes have a length of their own
    scene = EnvConfig(
        kind=kind,  # type: ignore[arg-type]
        name=task,
        action_repeat=2 if own else repeat,
        time_limit=25 if own else steps,
    )
    simulator = make_simulator(scene)
    try:
        width = action_width(simulator.action_space)
        judged, chosen = range(1000, 1000 + episodes), range(5000, 5000 + max(3, episodes // 3))
        scores = [
            returns(simulator, scene, policy, judged)
            for policy in (
                random_policy(width, 1),
                random_policy(width, HELD),
                constant(np.zeros(width)),
            )
        ]
        best = max(
            candidates(width, count),
            key=lambda action: returns(simulator, scene, constant(action), chosen).mean(),
        )
        scores.append(returns(simulator, scene, constant(best), judged))
    finally:
        simulator.close()
    cells = [f"{s.mean():.1f} ± {s.std(ddof=1) / len(s) ** 0.5:.1f}" for s in scores]
    highest = max(s.mean() for s in scores)
    return f"| {name} | {' | '.join(cells)} | {3 * highest:.0f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", default=TASKS, help="kind/name; none: a dozen")
    parser.add_argument("--repeat", type=int, default=4, help="frames per agent step")
    parser.add_argument("--steps", type=int, default=125, help="agent steps per episode")
    parser.add_argument("--episodes", type=int, default=30)
    parser.add_argument("--constants", type=int, default=32, help="constant actions to choose from")
    args = parser.parse_args()
    print("| task | random | random, held | no action | best constant | three times the best |")
    print("|---|---|---|---|---|---|")
    for name in args.tasks:
        print(row(name, args.repeat, args.steps, args.episodes, args.constants), flush=True)


if __name__ == "__main__":
    main()
