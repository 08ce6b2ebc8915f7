"""The study of `benchmarks/uncertainty.py`: its correlations, and one whole table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_agent import save

from benchmarks.agent import Played
from benchmarks.uncertainty import correlation, dreamt, lines, prior_entropy
from mapo_lightning.models.rssm_world.belief import DreamtBelief
from mapo_lightning.models.rssm_world.world_model import RSSMWorldModel
from mapo_lightning.run import build


def test_ranks_are_correlated_and_whole_episodes_drawn() -> None:
    error = np.arange(30.0).reshape(10, 3)
    assert correlation(error**3, error) == pytest.approx((1.0, 1.0, 1.0))
    assert correlation(-error, error) == pytest.approx((-1.0, -1.0, -1.0))
    noise = np.random.default_rng(1).normal(size=(10, 30))
    found = correlation(noise, np.random.default_rng(2).normal(size=(10, 30)))
    assert found.low < found.mean < found.high
    assert found.low < 0.0 < found.high
    # Thirty copies of ten numbers are ten numbers: the interval knows it.
    alike = correlation(noise[:, :1].repeat(30, 1), noise[:, 1:2].repeat(30, 1))
    assert alike.high - alike.low > 3 * (found.high - found.low)


@pytest.mark.slow
def test_errors_are_those_of_the_frames_that_followed(tmp_path: Path) -> None:
    cfg = save(tmp_path / "last.ckpt", "world_model.ensemble.members=2")
    module, _ = build.load_finetuned(cfg, tmp_path / "last.ckpt")
    model = module.eval().world_model
    assert isinstance(model, RSSMWorldModel)
    torch.manual_seed(0)
    side = cfg.env.size
    frames = torch.randint(0, 256, (2, 5, side, side, 3), dtype=torch.uint8)
    played = Played(torch.rand(2, 5, model.feat_dim), torch.rand(2, 4, 2), torch.rand(2, 5), frames)
    with torch.no_grad():
        torch.manual_seed(1)
        found = dreamt(module, played, 3, 1)
        assert {name: x.shape for name, x in found.items()} == dict.fromkeys(found, (2, 2))
        # Episode 1, start 1: its frame, its actions 1 to 3, and what frame 4 showed.
        torch.manual_seed(1)
        start = played.feat[:, :2].flatten(0, 1)
        actions = torch.stack([played.action[e, t : t + 3] for e in (0, 1) for t in (0, 1)], 1)
        dream = model.imagine(DreamtBelief(start), lambda i, _: actions[i], 3)
        maps = model._look(frames[:, :2].flatten(0, 1)[:, None]).maps
        drawn = model.decoder(dream.feat[-1], maps)[3].movedim(0, -1) + 0.5
        error = (drawn - frames[1, 4] / 255).square().mean()
        assert found["picture"][1, 1] == pytest.approx(float(error), rel=1e-4)
        off = float((dream.reward[3, 3] - played.reward[1, 4]).abs())
        assert found["reward"][1, 1] == pytest.approx(off, rel=1e-4)
        assert dream.uncertainty is not None
        total = float(dream.uncertainty[:, 3].sum())
        assert found["disagreement"][1, 1] == pytest.approx(total, rel=1e-4)
        entropy = float(prior_entropy(model, dream.feat[1:])[:, 3].sum())
        assert found["entropy"][1, 1] == pytest.approx(entropy, rel=1e-4)
    assert [line.count("|") for line in lines(found)] == [4, 4]
