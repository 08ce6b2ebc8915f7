"""The picture of a dream, and its numbers."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from replay_entries import make, play

from callbacks.rollout import ImaginationRollout, drift, strip
from mapo_lightning.config.compose import compose
from mapo_lightning.run.config import RunConfig, conf_folder
from mapo_lightning.training.datamodule import ReplayDataModule
from mapo_lightning.training.finetune import FinetuneModule
from tests.contract.throwaways import CopyLastFrame, RandomShooting


def test_strip_has_three_rows_a_column_per_clip_and_coloured_edges() -> None:
    truth = torch.full((4, 6, 64, 64, 3), 0.5)
    dream = torch.full((4, 6, 64, 64, 3), 0.75)
    frames = strip(truth, dream, seen=2)
    assert frames.shape == (6, 3 * 68, 4 * 68, 3)
    assert frames.dtype == np.uint8
    middle = frames[3, 34, 34]
    assert middle.tolist() == [128, 128, 128]
    assert frames[3, 3 * 34, 34].tolist() == [191, 191, 191]
    assert frames[3, 5 * 34, 34].tolist() == [64, 64, 64]
    shown, dreamt = frames[1, 2 * 34, 0], frames[2, 2 * 34, 0]
    assert shown[1] > shown[0]  # green while the truth is shown
    assert dreamt[0] > dreamt[1]  # red while it dreams


def test_drift_against_written_out_psnr() -> None:
    torch.manual_seed(0)
    truth = torch.rand(2, 12, 64, 64, 3)
    dream = (truth + 0.1 * torch.randn_like(truth)).clamp(0, 1)
    metrics = drift(truth, dream, seen=3)
    mse = float((truth[:, 7] - dream[:, 7]).pow(2).mean())
    assert metrics["rollout/psnr_5"] == pytest.approx(-10 * np.log10(mse), rel=1e-4)
    still = float((truth[:, 2] - truth[:, 7]).pow(2).mean())
    assert metrics["rollout/psnr_copy_5"] == pytest.approx(-10 * np.log10(still), rel=1e-4)
    assert metrics["rollout/psnr_moving_5"] == pytest.approx(metrics["rollout/psnr_5"], abs=0.1)
    scene = truth.median(dim=1).values
    apart = float((truth[:, 7] - scene).pow(2).mean())
    found = metrics["rollout/psnr_moving_still_scene_5"]
    assert found == pytest.approx(-10 * np.log10(apart), abs=0.1)
    assert 0.0 < metrics["rollout/ssim_5"] < 1.0
    assert "rollout/psnr_10" not in metrics  # the clip is too short for it


def test_pictures_show_one_episode_each_as_far_as_it_goes(tmp_path: Path) -> None:
    replay = make(tmp_path)
    for agent_steps in (2, 7, 4):
        play(replay, 0, agent_steps)
    batch = ReplayDataModule(replay, 4, 50, 0).rollout_batch(3)
    assert batch["obs"].shape[:2] == (3, 8)
    assert batch["obs"][:, :, 0, 0, 0].tolist() == [list(range(8))] * 3
    assert "episode" not in batch


def test_where_no_frame_is_left_to_dream_it_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = make(tmp_path)
    play(replay, 0, 4)
    monkeypatch.setattr("callbacks.rollout.recorder_of", Mock())
    trainer: Any = SimpleNamespace(
        is_global_zero=True, logger=Mock(), datamodule=ReplayDataModule(replay, 4, 50, 0)
    )
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    with caplog.at_level(logging.INFO):
        ImaginationRollout(every=1, seen=5)._roll(trainer, module)
    assert "the longest sequence has 5 frames" in caplog.text
    trainer.logger.log_metrics.assert_not_called()


@pytest.mark.parametrize(
    ("updates", "expected"), [(2, ("initial/", 2)), (3, ("", 120))], ids=["initial", "acting"]
)
def test_films_are_large_and_stand_where_the_curves_do(
    updates: int, expected: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = make(tmp_path)
    play(replay, 0, 9)
    recorder, logger = Mock(), Mock()
    recorder.records.return_value = True
    monkeypatch.setattr("callbacks.rollout.recorder_of", lambda trainer: recorder)
    # The entries of the replay are too small to compare.
    monkeypatch.setattr("callbacks.rollout.drift", lambda *args: {"rollout/psnr_5": 20.0})
    trainer: Any = SimpleNamespace(
        is_global_zero=True, logger=logger, loggers=[logger, logger], global_step=updates,
        datamodule=ReplayDataModule(replay, 4, 50, 0),
    )  # fmt: skip
    world = CopyLastFrame()
    cfg = compose(["finetune.initial_updates=2"], RunConfig, conf_folder()).config.finetune
    module = FinetuneModule(world, RandomShooting(world, 2), cfg)
    module.env_frames = 120
    ImaginationRollout(every=1, seen=2)._roll(trainer, module)
    prefix, step = expected
    (_, name, film, fps, at, height), _ = recorder.log_video.call_args
    assert (name, fps, at) == (f"{prefix}rollout", 8, step)
    assert film.shape[1:] == (3 * (4 + 4), 6 * (4 + 4), 3)
    assert height == 24 * 256 // 4  # a row of 4 pixels is 256 high
    assert logger.log_metrics.call_args_list == [call({f"{prefix}rollout/psnr_5": 20.0}, step)] * 2
