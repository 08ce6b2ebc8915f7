"""The picture of a dream, and its numbers."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from replay_entries import make, play

from callbacks.rollout import ImaginationRollout, drift, strip
from mapo_lightning.training.datamodule import ReplayDataModule


def test_strip_has_three_rows_a_column_per_clip_and_coloured_edges() -> None:
    truth = torch.full((4, 6, 64, 64, 3), 0.5)
    dream = torch.full((4, 6, 64, 64, 3), 0.75)
    frames = strip(truth, dream, seen=2)
    assert frames.shape == (6, 3 * 68 * 2, 4 * 68 * 2, 3)
    assert frames.dtype == np.uint8
    middle = frames[3, 68, 68]
    assert middle.tolist() == [128, 128, 128]
    assert frames[3, 3 * 68, 68].tolist() == [191, 191, 191]
    assert frames[3, 5 * 68, 68].tolist() == [64, 64, 64]
    shown, dreamt = frames[1, 2 * 68, 0], frames[2, 2 * 68, 0]
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
