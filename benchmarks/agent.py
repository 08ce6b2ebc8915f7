"""What an agent believes, beside what is true. The protocol is docs/protocols/agent.md.

    python benchmarks/agent.py runs/NAME/finetune/last.ckpt [more checkpoints]

The agent plays ten episodes by its greedy action. From the states it has seen, its world model
dreams; rewards, values and actions are held against what really followed. With several checkpoints
the last column is the mean over them, with a 95 % Student's t interval.

Shapes: E environments, T steps of an episode, N starts of a dream, I dreamt steps, F feat,
A action.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mapo_lightning.config.compose import from_base  # noqa: E402
from mapo_lightning.envs.episodes import RandomPolicy  # noqa: E402
from mapo_lightning.envs.factory import make_vector_env  # noqa: E402
from mapo_lightning.envs.replacement import close_vector_env  # noqa: E402
from mapo_lightning.models.agents.dreamer import DreamerAgent  # noqa: E402
from mapo_lightning.models.interfaces import DifferentiableWorldModel  # noqa: E402
from mapo_lightning.models.rssm_world.belief import DreamtBelief  # noqa: E402
from mapo_lightning.run import build  # noqa: E402
from mapo_lightning.run.config import RunConfig  # noqa: E402
from mapo_lightning.run.from_checkpoint import agent_settings  # noqa: E402
from mapo_lightning.training.acting import acting  # noqa: E402
from mapo_lightning.training.finetune import FinetuneModule  # noqa: E402

FIRST_SEED, EPISODES = 20_000, 10
HORIZONS = (1, 5, 10, 15)
HELD = 4  # steps for which the random policy of a dream keeps an action
Row = dict[str, float]


class Played(NamedTuple):
    """Episodes of one agent, side by side."""

    feat: Tensor  # (E, T + 1, F) beliefs after each frame
    action: Tensor  # (E, T, A) taken in the states 0 .. T - 1
    reward: Tensor  # (E, T + 1) on reaching each state; 0 in the first
    frames: Tensor  # (E, T + 1, H, W, 3) uint8


class Greedy:
    """The agent's greedy action in a dream; keeps the actions, as leaves of their gradient.

    Args:
        agent: Acts.
    """

    def __init__(self, agent: DreamerAgent) -> None:
        self.agent = agent
        self.actions: list[Tensor] = []

    def __call__(self, feat: Tensor) -> Tensor:
        """Action (N, A) of the next step."""
        with torch.no_grad():
            action = self.agent.act(DreamtBelief(feat), explore=False)
        self.actions.append(action.requires_grad_())
        return self.actions[-1]


def main() -> None:
    """Measure every checkpoint, and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--episodes", type=int, default=EPISODES)
    options = parser.parse_args()
    rows = [measured(path, options.episodes) for path in options.checkpoints]
    print(table(rows))


def measured(path: Path, episodes: int) -> Row:
    """Everything that the protocol names, of one checkpoint."""
    cfg = from_base(agent_settings(path), RunConfig)
    cfg.world_model.recurrence = "plain"  # the same numbers, and any policy may dream
    module, _ = build.load_finetuned(cfg, path)
    module.eval()
    torch.manual_seed(0)
    played, at_random = (play(cfg, module, episodes, random) for random in (False, True))
    with torch.no_grad():
        row = rewards(module, played, "of the agent")
        row |= rewards(module, at_random, "at random")
        row |= values(module, played) | behaviour(module, played)
    row |= gradients(module, played)
    return {"return": float(played.reward.sum(dim=1).mean())} | row


def play(cfg: RunConfig, module: FinetuneModule, episodes: int, random: bool) -> Played:
    """One episode from each reset seed, all side by side: of the agent, or of held random actions.

    The agent's beliefs follow in both.
    """
    env_cfg = build.labelled_env(cfg)
    envs = make_vector_env(env_cfg, FIRST_SEED, episodes)
    labels = build.build_live_labeler(cfg, episodes, "study")
    policy = acting(module, explore=False)
    held = RandomPolicy(module.agent.action_dim, FIRST_SEED, HELD)
    feats, actions, rewards, frames = [], [], [np.zeros(episodes)], []
    first, ended = np.ones(episodes, bool), np.zeros(episodes, bool)
    obs, _ = envs.reset(seed=list(range(FIRST_SEED, FIRST_SEED + episodes)))  # type: ignore[arg-type]
    try:
        while True:
            step = {"obs": obs["image"], "is_first": first, **labels.update(obs, first)}
            action = policy(step)
            assert policy.belief is not None
            feats.append(policy.belief.feat)
            frames.append(obs["image"].copy())
            if ended.any():
                break
            if random:
                action = held(step)
                policy.action = torch.from_numpy(action)
            obs, reward, terminated, truncated, _ = envs.step(action)
            actions.append(torch.from_numpy(action))
            rewards.append(reward)
            first, ended = np.zeros(episodes, bool), terminated | truncated
    finally:
        close_vector_env(envs)
    if not ended.all():
        raise SystemExit("episodes of different lengths: this study is made for fixed ones")
    return Played(
        torch.stack(feats, 1),
        torch.stack(actions, 1),
        torch.from_numpy(np.stack(rewards, 1)),
        torch.from_numpy(np.stack(frames, 1)),
    )


def rewards(module: FinetuneModule, played: Played, of: str) -> Row:
    """Predicted rewards against real ones, in seen states and along dreams of real actions."""
    model, (envs, steps, _) = module.world_model, played.action.shape
    seen = model.imagine(DreamtBelief(played.feat.flatten(0, 1)), _still(module), 1).reward[0]
    found = {f"reward, seen, {of}: R²": r2(seen.view(envs, steps + 1)[:, 1:], played.reward[:, 1:])}
    for ahead in (h for h in HORIZONS if h < steps):
        starts = steps + 1 - ahead
        start = DreamtBelief(played.feat[:, :starts].flatten(0, 1))
        windows = played.action.unfold(1, ahead, 1).flatten(0, 1)  # (N, A, I)
        dream = model.imagine(start, lambda i, _, taken=windows: taken[:, :, i], ahead)  # type: ignore[misc]
        dreamt, real = dream.reward[-1].view(envs, starts), played.reward[:, ahead:]
        found[f"reward, {ahead} dreamt, {of}: R²"] = r2(dreamt, real)
        found[f"reward, {ahead} dreamt, {of}: bias"] = float((dreamt - real).mean())
    return found


def values(module: FinetuneModule, played: Played) -> Row:
    """The critic's values against the rewards that followed."""
    agent = dreamer(module)
    steps = played.action.shape[1]
    ahead = 15 if steps > 2 * 15 else 10
    value = agent.values.read(agent.critic(played.feat))[:, : steps + 1 - ahead]
    factor = agent.cfg.discount ** torch.arange(ahead)
    real = (played.reward[:, 1:].unfold(1, ahead, 1) * factor).sum(-1)
    correlation = np.corrcoef(value.flatten().numpy(), real.flatten().numpy())[0, 1]
    return {
        f"value: correlation with {ahead} real rewards": float(correlation),
        "value: deviation of the critic's": float(value.std()),
        f"value: deviation of {ahead} real rewards": float(real.std()),
    }


def behaviour(module: FinetuneModule, played: Played) -> Row:
    """Optimism of dreams, what they prefer, and how far the actor has saturated."""
    model, agent = module.world_model, dreamer(module)
    envs, steps, width = played.action.shape
    horizon = agent.cfg.horizon
    starts = steps + 1 - horizon
    start = DreamtBelief(played.feat[:, :starts].flatten(0, 1))
    held = RandomPolicy(width, FIRST_SEED, HELD)
    step = {"is_first": np.zeros(envs * starts, bool)}
    policies = {
        "agent": lambda _, belief: agent.act(belief, explore=False),
        "no action": _still(module),
        "random, held": lambda *_: torch.from_numpy(held(step)),
    }
    dreamt = {
        name: float(model.imagine(start, policy, horizon).reward[1:].mean())
        for name, policy in policies.items()
    }
    real = float(played.reward[:, 1:].unfold(1, horizon, 1).mean())
    found = {f"dreamt reward per step: {name}": reward for name, reward in dreamt.items()}
    found |= {"real reward per step: agent": real, "optimism": dreamt["agent"] - real}
    policy = agent.policy(played.feat[:, :-1])
    found["actor: mean |mode|"] = float(policy.mode().abs().mean())
    found["actor: share of |mode| above 0.95"] = float((policy.mode().abs() > 0.95).float().mean())
    found["actor: mean |action| taken"] = float(played.action.abs().mean())
    found["actor: standard deviation"] = float(policy.std.mean())
    found["actor: entropy"] = float(policy.entropy().mean())
    return found


def gradients(module: FinetuneModule, played: Played) -> Row:
    """How the imagined return moves with its first action, and through what."""
    model, agent = module.world_model, dreamer(module)
    assert isinstance(model, DifferentiableWorldModel)
    horizon, discount = agent.cfg.horizon, agent.cfg.discount
    starts = played.action.shape[1] + 1 - horizon
    policy = Greedy(agent)
    start = DreamtBelief(played.feat[:, :starts].flatten(0, 1).detach())
    dream = model.imagine_with_gradients(start, policy, horizon)
    factor = discount ** torch.arange(horizon + 1)
    through_rewards = (factor[1:, None] * dream.reward[1:]).sum()
    through_value = factor[-1] * agent.values.read(agent.critic(dream.feat[-1])).sum()
    found = {}
    for name, part in (("rewards", through_rewards), ("value", through_value)):
        (gradient,) = torch.autograd.grad(part, policy.actions[0], retain_graph=True)
        found[f"gradient of the first action through the {name}"] = float(
            gradient.norm(dim=-1).mean()
        )
    return found


def r2(guess: Tensor, truth: Tensor) -> float:
    """Share of the variance that is explained; negative: worse than the mean."""
    return float(1.0 - (guess - truth).square().mean() / truth.var(correction=0))


def dreamer(module: FinetuneModule) -> DreamerAgent:
    """The agent, which this study knows from inside."""
    agent = module.agent
    if not isinstance(agent, DreamerAgent):
        raise SystemExit(f"this study is about Dreamer's agents, got {type(agent).__name__}")
    return agent


def table(rows: list[Row]) -> str:
    """One line per figure, one column per checkpoint, and the mean with its interval."""
    numbers = " | ".join(str(number) for number in range(len(rows)))
    lines = [f"| | {numbers} | mean [95 %] |", "|---|" + "---|" * (len(rows) + 1)]
    for name in rows[0]:
        found = np.array([row[name] for row in rows])
        lines.append(f"| {name} | {' | '.join(f'{x:.3g}' for x in found)} | {_mean(found)} |")
    return "\n".join(lines)


def _mean(found: NDArray[np.float64]) -> str:
    if len(found) < 2:
        return f"{found.mean():.3g}"
    half = stats.t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found))
    return f"{found.mean():.3g} [{found.mean() - half:.3g}, {found.mean() + half:.3g}]"


def _still(module: FinetuneModule):  # type: ignore[no-untyped-def]
    """A policy of a dream that does nothing."""
    return lambda _, belief: belief.feat.new_zeros(len(belief.feat), module.agent.action_dim)


if __name__ == "__main__":
    main()
