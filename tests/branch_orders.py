"""Plays branches from one saved state in many orders: each must go as if nothing had been saved."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.envs.factory import make_env
from mapo_lightning.envs.settings import EnvConfig
from mapo_lightning.envs.wrappers import PixelEnv

Step = tuple[bytes, float, bool, bool, dict[str, Any]]


def play(env: PixelEnv, actions: NDArray[np.float32]) -> list[Step]:
    """What an environment answers, up to the end of the episode."""
    steps: list[Step] = []
    for action in actions:
        obs, *rest = env.step(action)
        steps.append((obs["image"].tobytes(), *rest))  # type: ignore[arg-type]
        if rest[1] or rest[2]:
            break
    return steps


def sequences(env: PixelEnv, lead: int, length: int) -> dict[str, NDArray[np.float32]]:
    """A way to the saved state, and two that part there: held actions, which move heavy limbs."""
    rng, width = np.random.default_rng(1), env.action_space.shape[0]
    counts = {"lead": lead, "A": length, "B": length, "elsewhere": 2 * length}
    drawn = {k: rng.uniform(-1, 1, (-(-n // 3), width)).repeat(3, 0)[:n] for k, n in counts.items()}
    drawn["lead"] *= 0.1  # a pendulum must not fall so soon
    return {name: actions.astype(np.float32) for name, actions in drawn.items()}


def check_branch_orders(cfg: EnvConfig, lead: int = 12, length: int = 8, seed: int = 3) -> int:
    """Compare bit for bit; returns the number of steps that were compared."""
    env = make_env(cfg, 0)
    ways = sequences(env, lead, length)

    def uninterrupted(name: str) -> tuple[list[Step], bytes]:
        env.reset(seed=seed)
        assert len(play(env, ways["lead"])) == lead, "the episode is over before the state"
        steps = play(env, ways[name])
        return steps, env.reset()[0]["image"].tobytes()  # the random stream goes on

    truth = {name: uninterrupted(name) for name in "AB"}
    assert truth["A"] != truth["B"], "both ways look the same: the test proves nothing"
    env.reset(seed=seed)
    *_, (frame, *_) = play(env, ways["lead"])
    snapshot = pickle.loads(pickle.dumps(env.save()))
    compared = 0

    def branch(where: PixelEnv, name: str) -> None:
        nonlocal compared
        assert where.restore(snapshot)["image"].tobytes() == frame
        steps = play(where, ways[name])
        for number, (one, two) in enumerate(zip(steps, truth[name][0], strict=True)):
            assert one[1:] == two[1:], f"{cfg.name}: {name}, step {number}"
            assert one[0] == two[0], f"{cfg.name}: picture of {name}, step {number}"
        assert where.reset()[0]["image"].tobytes() == truth[name][1], f"{cfg.name}: next episode"
        compared += len(steps)

    assert play(env, ways["A"]) == truth["A"][0], "saving has changed what follows"
    for name in "AABBABA":
        branch(env, name)
    env.restore(snapshot)
    play(env, ways["elsewhere"])  # from here no reset comes before the restore
    branch(env, "B")
    env.reset(seed=seed + 1)
    play(env, ways["elsewhere"])
    branch(env, "A")
    for other_seed, names in ((None, "AB"), (seed + 2, "BA")):  # used and unused instances
        other = make_env(cfg, 0)
        if other_seed is not None:
            other.reset(seed=other_seed)
            play(other, ways["elsewhere"])
        for name in names:
            branch(other, name)
        other.close()
    env.close()
    return compared
