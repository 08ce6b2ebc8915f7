"""What the parts can learn; minutes each, so `pytest -m learning` asks for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mapo_lightning.models.rssm_world.fused.rssm import FusedRSSM
from mapo_lightning.models.rssm_world.settings import RSSMConfig
from mapo_lightning.models.rssm_world.world_model import RSSMWorldModel
from mapo_lightning.models.settings import ObjectiveConfig
from mapo_lightning.types import Batch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.learning


def surprise_after_training(tell_action: bool) -> float:
    """Mean KL, in nats, of a dot that walks a ring of twelve places by coin flips."""
    torch.manual_seed(0)
    rssm = FusedRSSM(RSSMConfig(deter=32, hidden=32, stoch=4, classes=8), 1, 12)
    reader = torch.nn.Linear(rssm.cfg.feat, 12)
    optimizer = torch.optim.Adam([*rssm.parameters(), *reader.parameters()], lr=3e-3)
    kl = torch.zeros(())
    for _ in range(400):
        coin = torch.randint(0, 2, (32, 12)) * 2 - 1
        place = coin.cumsum(1) % 12
        seen = torch.nn.functional.one_hot(place, 12).float()
        first = torch.zeros(32, 12, dtype=torch.bool)
        first[:, 0] = True
        action = coin[..., None].float() * tell_action
        post, prior = rssm.observe(action, seen, first)
        kl = rssm.kl(post.logits[:, 2:], prior[:, 2:], 0.0)
        told = torch.nn.functional.cross_entropy(reader(post.feat).flatten(0, 1), place.flatten())
        optimizer.zero_grad()
        (10 * told + kl).backward()
        optimizer.step()
    return float(kl.detach())


def test_told_actions_beat_untold_ones() -> None:
    """The premise of the paper. A fair coin alone is worth 0.69 nats."""
    assert surprise_after_training(tell_action=True) < surprise_after_training(False) - 0.3


def moving_square(steps: int = 10) -> Batch:
    """Two clips: a white square goes right on grey, or down on green."""
    obs = torch.full((2, steps, 64, 64, 3), 90, dtype=torch.uint8)
    obs[1, ..., 1] = 160
    for t in range(steps):
        obs[0, t, 24:40, 4 * t : 4 * t + 16] = 255
        obs[1, t, 4 * t : 4 * t + 16, 24:40] = 255
    first = torch.zeros(2, steps, dtype=torch.bool)
    first[:, 0] = True
    semantic = torch.eye(2)[:, None].expand(2, steps, 2)
    return {
        "obs": obs,
        "semantic": semantic,
        "has_semantic": ~first,
        "position": torch.arange(steps).expand(2, steps),
        "is_first": first,
    }


def test_two_clips_can_be_overfitted_and_dreamt_and_use_two_codes() -> None:
    from mapo_lightning.config.compose import compose
    from mapo_lightning.run.config import RunConfig

    torch.manual_seed(0)
    words = ["world_model.context.quantizer.shape=global", "world_model.context.quantizer.codes=8"]
    cfg = compose(words, RunConfig, ROOT / "conf").config
    scales = {"image": 1.0, "kl_lower": 0.1, "commitment": 0.25}
    model = RSSMWorldModel(cfg.world_model, ObjectiveConfig(scales), 2, None)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    batch = moving_square()
    assert model.context is not None
    book = model.context.quantizers["frame"]
    for _ in range(500):
        fit = model.loss(batch)
        optimizer.zero_grad()
        fit.total.backward()
        optimizer.step()
        book.update(book.batch_count, book.batch_sum, book.candidates)  # type: ignore[operator]
    model.eval()
    dream = model.open_loop(batch, seen=3)
    truth = batch["obs"].float() / 255
    still = truth[:, 2:3].expand(-1, 7, -1, -1, -1)
    error = (dream[:, 3:] - truth[:, 3:]).pow(2).mean()
    assert float(error) < 0.5 * float((still - truth[:, 3:]).pow(2).mean())
    codes = model.context(batch["obs"]).codes[8].flatten().tolist()
    assert codes[0] != codes[1]


def test_the_toy_world_is_learned(tmp_path: Path) -> None:
    """`python train.py env=toy`: at least three times the random policy's return."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "env=toy"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=900,
    )
    lines = result.stdout.splitlines()
    scores = {
        name: float(line.split("return")[1].split("±")[0])
        for name in ("random", "mapo")
        for line in lines
        if line.startswith(f"  {name}")
    }
    assert scores["mapo"] >= 3 * scores["random"]
