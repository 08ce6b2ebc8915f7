"""Does the disagreement of an ensemble tell how wrong a dream is?

    python benchmarks/uncertainty.py runs/NAME/finetune/last.ckpt [more checkpoints]

The checkpoints are of runs with world_model.ensemble.members. Episodes on reset seeds that no
training has used are played by the agent, and by random actions that are held for four steps. From
every state that the model has followed, it dreams on with the actions that were really taken. The
*error* of a dream is that of its picture (squared, per pixel and colour) or of its reward
(absolute), 1, 5 or 15 steps ahead. What is held against it is what the dream could know of itself:
the disagreement of the ensemble, and the entropy of the prior, both summed from the first step on
and, like the errors, averaged over a few dreams of the same start.

The table has Spearman's rank correlation over all starts, with 95 % percentile bootstrap intervals
over episodes.

Shapes: E episodes, T steps of an episode, N starts of a dream, R dreams of each, I dreamt steps,
F feat, A action, H W image.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.agent import Played, play  # noqa: E402
from mapo_lightning.config.compose import from_base  # noqa: E402
from mapo_lightning.models.rssm_world.belief import DreamtBelief  # noqa: E402
from mapo_lightning.models.rssm_world.world_model import RSSMWorldModel  # noqa: E402
from mapo_lightning.run import build  # noqa: E402
from mapo_lightning.run.config import RunConfig  # noqa: E402
from mapo_lightning.run.from_checkpoint import agent_settings  # noqa: E402
from mapo_lightning.training.finetune import FinetuneModule  # noqa: E402
from mapo_lightning.training.told import Interval  # noqa: E402

EPISODES, DREAMS, HORIZONS = 40, 4, (1, 5, 15)
RESAMPLES = 2000
Scores = dict[str, NDArray[np.float64]]
"""By name, one number for each start, (E, starts of an episode)."""


def main() -> None:
    """Measure every checkpoint, and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--episodes", type=int, default=EPISODES)
    parser.add_argument("--dreams", type=int, default=DREAMS)
    options = parser.parse_args()
    print("| checkpoint | played | steps | error of | mean error | disagreement | entropy |")
    print("|---|---|---|---|---|---|---|")
    for number, path in enumerate(options.checkpoints):
        for line in measured(path, options.episodes, options.dreams):
            print(f"| {number} | {line}", flush=True)


def measured(path: Path, episodes: int, dreams: int) -> Iterator[str]:
    """The lines of one checkpoint."""
    cfg = from_base(agent_settings(path), RunConfig)
    module, _ = build.load_finetuned(cfg, path)
    module.eval()
    if not cfg.world_model.ensemble.members:
        raise SystemExit(
            f"'{path}' was trained without an ensemble: add world_model.ensemble.members=5 to its "
            "training"
        )
    for random in (False, True):
        torch.manual_seed(0)
        with torch.no_grad():
            played = play(cfg, module, episodes, random)
            for steps in HORIZONS:
                if steps <= played.action.shape[1]:
                    found = dreamt(module, played, steps, dreams)
                    who = "at random" if random else "agent"
                    yield from (f"{who} | {steps} | {text}" for text in lines(found))


def lines(found: Scores) -> Iterator[str]:
    """One for each kind of error."""
    for error in ("picture", "reward"):
        both = (correlation(found[name], found[error]) for name in ("disagreement", "entropy"))
        yield " | ".join([error, f"{found[error].mean():.3g}", *map(str, both)]) + " |"


def dreamt(module: FinetuneModule, played: Played, steps: int, dreams: int) -> Scores:
    """Errors of dreams ``steps`` ahead, and what was said of them before."""
    model = module.world_model
    if not isinstance(model, RSSMWorldModel):
        raise SystemExit(f"this study is about RSSM world models, got {type(model).__name__}")
    episodes, starts = len(played.action), played.action.shape[1] + 1 - steps
    start = DreamtBelief(played.feat[:, :starts].flatten(0, 1))
    taken_NAI = played.action.unfold(1, steps, 1).flatten(0, 1).repeat_interleave(dreams, 0)
    dream = model.imagine(start.repeat(dreams), lambda i, _: taken_NAI[:, :, i], steps)
    assert dream.uncertainty is not None
    seen_NHWC = played.frames[:, :starts].flatten(0, 1)
    drawn_NCHW = model.decoder(dream.feat[-1], model._look(seen_NHWC[:, None]).maps) + 0.5
    true_NHWC = played.frames[:, steps:].flatten(0, 1).float() / 255.0
    off = drawn_NCHW.movedim(1, -1) - true_NHWC.repeat_interleave(dreams, 0)
    reward = played.reward[:, steps:].flatten().repeat_interleave(dreams)
    found = {
        "picture": off.square().mean(dim=(1, 2, 3)),
        "reward": (dream.reward[-1] - reward).abs(),
        "disagreement": dream.uncertainty[1:].sum(0),
        "entropy": prior_entropy(model, dream.feat[1:]).sum(0),
    }
    shape = episodes, starts, dreams
    return {name: x.double().view(shape).mean(2).numpy() for name, x in found.items()}


def prior_entropy(model: RSSMWorldModel, feat: Tensor) -> Tensor:
    """Entropy of what each dreamt stochastic state was drawn from, (..., F) -> (...), in nats."""
    dynamics = model.upper or model.lower
    assert dynamics is not None
    groups = dynamics.cfg.stoch, dynamics.cfg.classes
    logits = dynamics.prior(feat[..., groups[0] * groups[1] :]).unflatten(-1, groups)
    log = dynamics.mixed(logits).log_softmax(-1)
    return -(log.exp() * log).sum(dim=(-2, -1))


def correlation(said: NDArray[np.float64], error: NDArray[np.float64]) -> Interval:
    """Of what was said (E, starts) with the error (E, starts); the episodes are drawn anew."""
    rng = np.random.default_rng(0)
    draws = [rng.integers(len(said), size=len(said)) for _ in range(RESAMPLES)]
    found = [_rank(said[drawn], error[drawn]) for drawn in draws]
    low, high = np.percentile(found, [2.5, 97.5])
    return Interval(_rank(said, error), float(low), float(high))


def _rank(said: NDArray[np.float64], error: NDArray[np.float64]) -> float:
    return float(stats.spearmanr(said.ravel(), error.ravel()).statistic)


if __name__ == "__main__":
    main()
