"""Chunks joined from short episodes: nothing that a model learns reaches from one into the next."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import NETWORKS, RSSM_METHODS, backbone, image
from replay_entries import entry, make

from mapo_lightning.config.compose import compose
from mapo_lightning.models.rssm_world.action_source import InverseAction
from mapo_lightning.models.rssm_world.context import FrameContext
from mapo_lightning.models.rssm_world.intrinsic import VideoBonus
from mapo_lightning.models.rssm_world.rssm import RSSM
from mapo_lightning.models.rssm_world.settings import (
    BonusConfig,
    ContextConfig,
    ImageConfig,
    RSSMConfig,
    SourceConfig,
)
from mapo_lightning.run.build import build_finetune
from mapo_lightning.run.config import RunConfig
from mapo_lightning.semantics.factory import semantic_dim
from mapo_lightning.training.datamodule import chunk_batch
from mapo_lightning.training.finetune import FinetuneModule
from mapo_lightning.types import Batch

CONF = Path(__file__).parents[2] / "conf"
BONUS = ["world_model.bonus.beta=1.0", "world_model.bonus.queue=64"]
JOIN = 4
"""Entries of the first episode of `experience`; six of the second follow."""


def finetuning(method: str, networks: str, kind: str = "gru") -> tuple[FinetuneModule, Batch]:
    """A small module of a method, with all its heads, and experience for it."""
    words = [f"method={method}", "env=gym", "env.name=any", image(networks, method)]
    words += backbone(kind, method)
    words += BONUS if method != "dreamerv2" else []
    cfg = compose(words, RunConfig, CONF).config
    batch = experience(semantic_dim(cfg.vlm), cfg.env.size)
    torch.manual_seed(0)
    return build_finetune(cfg, 3, None)[0], batch


def experience(width: int, side: int) -> Batch:
    torch.manual_seed(1)
    first = torch.zeros(2, 10, dtype=torch.bool)
    first[:, 0] = first[:, JOIN] = True
    terminal = torch.zeros(2, 10, dtype=torch.bool)
    terminal[:, JOIN - 1] = True
    return {
        "obs": torch.randint(0, 256, (2, 10, side, side, 3), dtype=torch.uint8),
        "semantic": torch.randn(2, 10, width),
        "has_semantic": torch.rand(2, 10) < 0.7,
        "position": torch.arange(10).expand(2, 10) % JOIN,
        "is_first": first,
        "action": torch.rand(2, 10, 3) * 2 - 1,
        "reward": torch.rand(2, 10),
        "is_terminal": terminal,
        "episode": first.cumsum(1) - 1,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("networks", "kind"), [*((name, "gru") for name in NETWORKS), ("tiny", "transformer")]
)
@pytest.mark.parametrize("method", RSSM_METHODS)
def test_no_belief_reaches_into_the_next_episode(method: str, networks: str, kind: str) -> None:
    module, batch = finetuning(method, networks, kind)
    world = module.world_model.eval()
    other = {key: value.clone() for key, value in batch.items()}
    other["obs"][:, :JOIN] = 255 - other["obs"][:, :JOIN]
    for key in ("semantic", "action"):
        # The action and the phrase of the join led to its frame from frames that are not there.
        other[key][:, : JOIN + 1] = -other[key][:, : JOIN + 1]
    other["position"][:, : JOIN + 1] += 3
    found = []
    for one in (batch, other):
        torch.manual_seed(2)
        found.append(world.observe(one).feat)
    assert torch.equal(found[0][:, JOIN:], found[1][:, JOIN:])
    assert not torch.equal(found[0][:, :JOIN], found[1][:, :JOIN])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("networks", "kind"), [*((name, "gru") for name in NETWORKS), ("tiny", "transformer")]
)
@pytest.mark.parametrize("method", RSSM_METHODS)
def test_every_method_learns_from_joined_chunks(method: str, networks: str, kind: str) -> None:
    module, batch = finetuning(method, networks, kind)
    total, log = module.losses(batch)
    total.backward()
    assert all(bool(torch.isfinite(value).all()) for value in log.values()), log
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)
    # Every state of the chunk is a start of imagination, those after the join as well.
    assert module.world_model.observe(batch).flatten().feat.shape[0] == 20


def test_a_sequence_after_the_join_is_the_one_observed_alone() -> None:
    torch.manual_seed(0)
    rssm = RSSM(RSSMConfig(deter=8, hidden=8, stoch=3, classes=4), 2, 5)
    action, embed, noise = torch.randn(2, 9, 2), torch.randn(2, 9, 5), torch.rand(2, 9, 3)
    first = torch.zeros(2, 9, dtype=torch.bool)
    first[:, 0] = first[:, 4] = True
    whole, prior = rssm.observe(action, embed, first, noise_BTS=noise)
    for part in (slice(0, 4), slice(4, 9)):
        alone, alone_prior = rssm.observe(
            action[:, part], embed[:, part], first[:, part], noise_BTS=noise[:, part]
        )
        torch.testing.assert_close(whole.feat[:, part], alone.feat)
        torch.testing.assert_close(prior[:, part], alone_prior)


EPISODE = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 1, 1], [0] * 8])
SIX = [(0, 0, 3), (0, 3, 7), (0, 7, 8), (1, 0, 1), (1, 1, 8), (2, 0, 8)]
"""Row, first and end of each episode in `EPISODE`."""


SMALL = {
    "resnet": ImageConfig(channels=[4, 8, 16], layers=1),
    "cnn": ImageConfig(kind="cnn", size=32, channels=[4]),
}


@pytest.mark.parametrize("networks", SMALL)
@pytest.mark.parametrize("kind", ["features", "quantized"])
def test_each_episode_is_drawn_in_its_own_scene(kind: str, networks: str) -> None:
    """The context of every frame comes from a frame of the same episode."""
    torch.manual_seed(0)
    cfg = SMALL[networks]
    context = FrameContext(ContextConfig(kind=kind, frame="first"), cfg).eval()  # type: ignore[arg-type]
    obs = torch.randint(0, 256, (3, 8, cfg.size, cfg.size, 3), dtype=torch.uint8)
    found = context(obs, EPISODE)
    for row, first, end in SIX:
        alone = context(obs[row : row + 1, first:end])
        for side, maps in found.maps.items():
            rows = maps.view(3, 8, *maps.shape[1:])[row, first:end]
            torch.testing.assert_close(rows, alone.maps[side].expand_as(rows))


@pytest.mark.parametrize("frame", ["random", "first", "last"])
def test_the_frame_of_an_episode_is_any_of_its_own_equally_often(frame: str) -> None:
    context = FrameContext(
        ContextConfig(kind="features", frame=frame),  # type: ignore[arg-type]
        SMALL["cnn"],
    )
    torch.manual_seed(0)
    drawn = torch.stack([context._pick_of_each(EPISODE)[0] for _ in range(2000)])
    scene = context._pick_of_each(EPISODE)[1]
    assert scene.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 3, 4, 4, 4, 4, 4, 4, 4] + [5] * 8
    for number, (row, first, end) in enumerate(SIX):
        counts = torch.bincount(drawn[:, number], minlength=24)
        own = slice(8 * row + first, 8 * row + end)
        assert int(counts[own].sum()) == 2000
        if frame == "random":
            assert float(counts[own].min()) > 0.8 * 2000 / (end - first)
        else:
            assert int(counts[own][0 if frame == "first" else -1]) == 2000


def test_a_window_of_the_bonus_ends_with_its_episode() -> None:
    bonus = VideoBonus(BonusConfig(beta=1.0, window=3, width=4, queue=64, neighbours=2), 5)
    feat = torch.randn(3, 8, 5)
    means = bonus._means(feat, EPISODE)
    assert means.shape == (3, 6, 5)
    for row, first, end in SIX:
        for t in range(first, min(end, 6)):
            torch.testing.assert_close(means[row, t], feat[row, t : min(t + 3, end)].mean(0))
    assert bonus(feat, EPISODE).shape == (3, 6)
    one_episode = torch.zeros_like(EPISODE)
    torch.testing.assert_close(bonus._means(feat, one_episode), bonus._means(feat, None))


@pytest.mark.parametrize("kind", ["published", "fixed"])
def test_what_lies_between_two_episodes_is_no_inferred_action(kind: str) -> None:
    """PreLAR's terms do not change with the last frame before a join, paired with the first."""
    torch.manual_seed(0)
    cfg = SourceConfig(kind="inverse", width=3, sampled=False, consistency=kind)  # type: ignore[arg-type]
    source = InverseAction(SMALL["cnn"], cfg, 8).eval()
    rssm = RSSM(RSSMConfig(deter=8, hidden=8, stoch=3, classes=4), 3, 5)
    batch = experience(1, SMALL["cnn"].size)
    driven = source(batch)
    assert driven.latent is not None
    post, prior = rssm.observe(driven.action, torch.randn(2, 10, 5), batch["is_first"])
    changed = driven.latent._replace(
        **{
            name: x.index_fill(1, torch.tensor([JOIN - 1]), 9.0)
            for name, x in driven.latent._asdict().items()
            if name != "whole"
        }
    )
    found = []
    for latent in (driven.latent, changed, driven.latent._replace(whole=None)):
        torch.manual_seed(3)
        found.append(source.losses(driven._replace(latent=latent), rssm, post, prior))
    assert found[0] == found[1]
    assert found[0]["latent_action_kl"] != found[2]["latent_action_kl"]


def test_a_chunk_of_seven_step_episodes_keeps_rewards_flags_and_positions_together(
    tmp_path: Path,
) -> None:
    replay = make(tmp_path, capacity=1000)
    for start in (0, 100, 200):
        for i in range(8):
            replay.add(0, entry(start + i, first=i == 0, last=i == 7, is_terminal=i == 7))
    batch = chunk_batch(replay, np.random.default_rng(0), 30, 50)
    number = batch["obs"][..., 0, 0, 0].long() % 100
    joined, same = batch["episode"].diff(dim=1) == 1, batch["episode"].diff(dim=1) == 0
    assert bool((number.diff(dim=1)[same] == 1).all())
    assert bool((joined | same).all())
    assert torch.equal(batch["is_terminal"], number == 7)
    assert torch.equal(batch["is_first"][:, 1:], joined)
    assert bool(batch["is_first"][:, 0].all())
    assert bool((number[:, :-1][joined] == 7).all()), "an episode is left at its end"
    assert bool((batch["reward"][:, 1:][joined & (number[:, 1:] == 0)] == 0).all())
    whole = chunk_batch(replay, np.random.default_rng(0), 30, 8)
    assert "episode" not in whole
