"""Told, untold and mistold: the errors of a model whose every frame is known beforehand."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

from callbacks.told import ToldUntold, save_report
from mapo_lightning.training.told import (
    HORIZONS,
    MOVING,
    ToldReport,
    measure_told,
    over_seeds,
    told_strip,
    versions,
)
from mapo_lightning.types import Batch, VideoError
from tests.contract.throwaways import CopyLastFrame

STEPS, SEEN, SIDE = 12, 5, 8
UNKNOWN = 0.5
"""By how much the model errs that is not told."""
BODY = 0.02


class Teller:
    """Draws the truth, too bright by what its phrases say: body and motion, one number each.

    Where nothing moves it is wrong by nine: those pixels must not count.
    """

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def open_loop(self, batch: Batch, seen: int) -> Tensor:
        assert seen == SEEN
        self.drawn.append(float(torch.rand(())))
        shift = torch.where(batch["has_semantic"], batch["semantic"].sum(dim=-1), UNKNOWN)
        frames = batch["obs"] / 255 + shift[..., None, None, None]
        frames[:, :, SIDE // 2 :] += 9.0
        return frames


def clips(videos: list[int]) -> Batch:
    """Clips whose upper half flickers, and whose phrases differ from frame to frame."""
    count = len(videos)
    rng = np.random.default_rng(0)
    obs = np.full((count, STEPS, SIDE, SIDE, 3), 90, np.uint8)
    obs[:, :, : SIDE // 2] = rng.integers(0, 256, (count, STEPS, SIDE // 2, SIDE, 3))
    obs[:, 0, : SIDE // 2], obs[:, 1, : SIDE // 2] = 0, 255  # every pixel there moves
    time = torch.arange(STEPS)
    motion = 0.1 * (torch.arange(count)[:, None] + 1) + 0.01 * time
    return {
        "obs": torch.from_numpy(obs),
        "semantic": torch.stack([torch.full_like(motion, BODY), motion], dim=-1),
        "has_semantic": torch.ones(count, STEPS, dtype=torch.bool),
        "position": time.expand(count, STEPS),
        "video": torch.tensor(videos),
    }


def measured(videos: list[int], **settings: Any) -> ToldReport:
    picture = torch.full((SIDE, SIDE, 3), 0.25)
    teller: Any = Teller()
    batch = clips(videos)
    report = measure_told(teller, batch, stills(batch), picture, seen=SEEN, **settings)
    assert len(set(teller.drawn)) == 1  # the same random numbers for every version
    return report


YARDSTICKS = ("copy", "still_scene", "mean_picture")


def stills(batch: Batch) -> Tensor:
    """The clips' own medians stand for those of their videos."""
    return batch["obs"].float().median(dim=1).values / 255.0


def said(clip: int, horizon: int, late: int = 0) -> float:
    """What the phrase of a frame says of the motion, or that of ``late`` frames before."""
    return 0.1 * (clip + 1) + 0.01 * (SEEN + horizon - 1 - late)


def test_every_dream_has_its_error() -> None:
    report = measured([0, 1, 2], body=1)
    assert report.horizons == (1, 5) == HORIZONS[:2]  # the clip ends before the others
    assert report.seen == SEEN
    expected = {
        "told": [[said(n, h) + BODY for h in (1, 5)] for n in range(3)],
        "untold": [[UNKNOWN] * 2] * 3,
        "mistold": [[said(n, h) + BODY for h in (1, 5)] for n in (2, 0, 1)],
        "told_late": [[said(n, h, late=1) + BODY for h in (1, 5)] for n in range(3)],
        "told_late_bodiless": [[said(n, h, late=1) for h in (1, 5)] for n in range(3)],
    }
    for name, shift in expected.items():
        np.testing.assert_allclose(report.errors[name], np.square(shift), rtol=1e-4)
        assert report.frames[name].shape == (3, STEPS, SIDE, SIDE, 3)
    assert "told_late_bodiless" not in measured([0, 1, 2]).errors


def test_every_yardstick_has_its_error() -> None:
    report, batch = measured([0, 1, 2]), clips([0, 1, 2])
    truth = batch["obs"][:, :, : SIDE // 2].numpy() / 255  # what moves
    guesses = {
        "copy": truth[:, SEEN - 1 : SEEN],
        "still_scene": np.sort(truth, axis=1)[:, (STEPS - 1) // 2, None],  # torch's median
        "mean_picture": np.full((1, 1, 1, 1, 1), 0.25),
    }
    for name, guess in guesses.items():
        squared = np.square(guess - truth).mean(axis=(2, 3, 4))
        np.testing.assert_allclose(report.errors[name], squared[:, [SEEN, SEEN + 4]], rtol=1e-4)


def test_a_row_is_a_video_and_what_never_moves_is_left_out() -> None:
    report = measured([7, 3, 7, 3])
    told = np.square([[said(n, h) + BODY for h in (1, 5)] for n in range(4)])
    # Videos in the order of their numbers, each the mean of its two clips.
    wanted = [(told[1] + told[3]) / 2, (told[0] + told[2]) / 2]
    np.testing.assert_allclose(report.errors["told"], wanted, rtol=1e-4)
    batch = clips([7, 3, 7, 5])
    batch["obs"][2:] = 90 + (batch["obs"][2:] > 128) * int(255 * MOVING)  # too little to count
    teller: Any = Teller()
    report = measure_told(teller, batch, stills(batch), torch.zeros(SIDE, SIDE, 3), seen=SEEN)
    np.testing.assert_allclose(report.errors["told"], told[[1, 0]], rtol=1e-4)


@pytest.mark.parametrize(
    ("videos", "others"),
    [([0, 1, 2, 0, 1, 2], [5, 0, 1, 2, 3, 4]), ([0, 1, 0], [1, 0, 1]), ([4, 4, 9], [2, 2, 1])],
)
def test_who_is_mistold_hears_of_another_video(videos: list[int], others: list[int]) -> None:
    report = measured(videos)
    shift = np.square([[said(n, h) + BODY for h in (1, 5)] for n in others])
    rows = [shift[np.array(videos) == number].mean(axis=0) for number in sorted(set(videos))]
    np.testing.assert_allclose(report.errors["mistold"], rows, rtol=1e-4)


def test_only_the_future_is_taken_away_or_replaced() -> None:
    batch = clips([0, 1])
    del batch["video"]
    batch["has_semantic"][0, :3] = batch["has_semantic"][1, 8] = False
    found = versions(batch, SEEN, 1, torch.tensor([1, 0]))
    known, semantic = batch["has_semantic"], batch["semantic"]
    assert found["told"] is batch
    assert torch.equal(found["untold"]["has_semantic"][:, :SEEN], known[:, :SEEN])
    assert not found["untold"]["has_semantic"][:, SEEN:].any()
    assert torch.equal(found["untold"]["semantic"], semantic)
    for key in ("semantic", "has_semantic"):
        assert torch.equal(found["mistold"][key][:, :SEEN], batch[key][:, :SEEN])
        assert torch.equal(found["mistold"][key][:, SEEN:], batch[key][[1, 0], SEEN:])
        assert torch.equal(found["told_late"][key][:, 1:], batch[key][:, :-1])
        assert not found["told_late"][key][:, 0].any()
    bodiless = found["told_late_bodiless"]
    assert not bodiless["semantic"][..., 0].any()
    assert torch.equal(bodiless["semantic"][..., 1], found["told_late"]["semantic"][..., 1])
    assert torch.equal(bodiless["has_semantic"], found["told_late"]["has_semantic"])
    for version in found.values():
        assert version["obs"] is batch["obs"]
        assert version["position"] is batch["position"]


def test_the_random_numbers_of_the_program_go_on_as_if_nothing_was_dreamt() -> None:
    torch.manual_seed(5)
    expected = torch.rand(())
    torch.manual_seed(5)
    measured([0, 1])
    assert torch.equal(torch.rand(()), expected)


@pytest.mark.parametrize(
    ("videos", "steps", "found"), [([2, 2, 2], STEPS, "1 and 12"), ([0, 1], SEEN, "2 and 5")]
)
def test_one_video_or_no_future_is_refused(videos: list[int], steps: int, found: str) -> None:
    batch = {k: v[:, :steps] if v.ndim > 1 else v for k, v in clips(videos).items()}
    sentence = f"two videos and more than 5 frames, got {found}"
    teller: Any = Teller()
    with pytest.raises(ValueError, match=sentence):
        measure_told(teller, batch, stills(batch), torch.zeros(SIDE, SIDE, 3), seen=SEEN)


def test_videos_in_which_nothing_moves_say_nothing() -> None:
    batch, teller = clips([0, 1, 2]), Teller()
    batch["obs"][1:] = 90
    with pytest.raises(ValueError, match="in which something moves, got 1 of 3"):
        measure_told(teller, batch, stills(batch), torch.zeros(SIDE, SIDE, 3), seen=SEEN)


def test_models_of_several_seeds_are_the_unit_of_their_interval() -> None:
    def model(told: float) -> ToldReport:
        errors = {name: np.full((2, 1), 0.01) for name in ("untold", "mistold", "copy")}
        return ToldReport({"told": np.full((2, 1), told), **errors}, (5,), {}, SEEN)

    table = over_seeds([model(0.001), model(0.002), model(0.006)])
    half = 4.302653 * np.std([1, 2, 6], ddof=1) / np.sqrt(3)  # Student's t, two degrees of freedom
    assert f"| told | 3.00 [{3 - half:.2f}, {3 + half:.2f}] |" in table
    assert f"| untold - told | 7.00 [{7 - half:.2f}, {7 + half:.2f}] |" in table
    assert "| copy | 10.00 [10.00, 10.00] |" in table
    assert table.startswith("Means over 3 models")


def test_what_not_all_models_have_is_left_out_of_their_mean() -> None:
    def model(horizons: tuple[int, ...], *more: str) -> ToldReport:
        names = ("told", "untold", "mistold", "copy", *more)
        errors = {name: np.full((2, len(horizons)), 0.01) for name in names}
        return ToldReport(errors, horizons, {}, SEEN)

    table = over_seeds([model((1, 5, 10), "told_late"), model((1, 5))])
    assert "| thousandths | 1 ahead | 5 ahead |\n" in table
    assert "| told | 10.00 [10.00, 10.00] | 10.00 [10.00, 10.00] |\n" in table
    assert "late" not in table


def test_intervals_are_over_videos_and_gains_are_paired() -> None:
    told = np.array([[0.001], [0.002], [0.006]])
    errors = {"told": told, "untold": told + 0.004, "mistold": told + 0.001}
    errors |= {name: told + 0.002 for name in YARDSTICKS}
    report = ToldReport(errors, (5,), {}, SEEN)
    error = report.at("told", 5)
    assert error.mean == pytest.approx(3.0)
    assert 1.0 <= error.low < 2.0 < 4.0 < error.high <= 6.0
    # Every video costs the same: the gain is certain, though the videos differ.
    assert report.gain("untold", 5) == pytest.approx((4.0, 4.0, 4.0))
    assert report.metrics()["told/untold_5"] == pytest.approx(7.0)
    assert "The phrases lead the dream: untold costs 4.00 [4.00, 4.00], mistold 1.00" in (
        report.sentence()
    )
    assert "| untold - told | 4.00 [4.00, 4.00] |" in report.table()
    for name in ("untold", "mistold"):  # either is enough
        worse = ToldReport(errors | {name: told[::-1]}, (5,), {}, SEEN)
        assert not worse.led()
        assert "do not lead the dream yet" in worse.sentence()


def test_the_gate_says_what_is_not_beaten_and_how_far_ahead() -> None:
    errors = {name: np.tile([0.003, 0.004, 0.005, 0.009], (2, 1)) for name in YARDSTICKS}
    errors["told"] = np.tile([0.001, 0.002, 0.003, 0.010], (2, 1))
    errors |= {name: errors["told"] + 0.002 for name in ("untold", "mistold")}
    report = ToldReport(errors, (1, 5, 10, 15), {}, SEEN)
    assert report.unbeaten() == {}  # fifteen ahead is no part of it
    said = report.sentence()
    assert "copying the last frame by 4.0, the still scene by 4.0 and one mean picture by 4" in said
    assert said.endswith("Told is better than these three 1, 5 and 10 frames ahead.")
    errors["still_scene"] = np.tile([0.003, 0.002, 0.001, 0.001], (2, 1))  # as good is not better
    errors["copy"] = np.tile([0.0005, 0.004, 0.005, 0.001], (2, 1))
    assert report.unbeaten() == {"copy": (1,), "still_scene": (5, 10)}
    assert report.sentence().endswith(
        "Told is not better than copying the last frame (1 ahead) and the still scene (5 and 10 "
        "ahead)."
    )
    short = ToldReport({name: x[:, :1] for name, x in errors.items()}, (1,), {}, SEEN)
    assert "(1 ahead)." in short.sentence()


@pytest.mark.parametrize(("zoom", "used"), [(0, 8), (3, 3)])
def test_the_strip_shows_truth_and_dreams_with_coloured_edges(zoom: int, used: int) -> None:
    report = measured([0, 1, 2])
    picture = told_strip(report, clips=2, zoom=zoom)
    edge = used
    high, wide = SIDE * used + 2 * edge, SIDE * used + edge
    assert picture.dtype == np.uint8
    assert picture.shape == (2 * 4 * high + 4 * edge, STEPS * wide + 3 * edge, 3)
    edges = [(40, 40, 40), (60, 180, 75), (245, 150, 40), (230, 60, 60)]
    for clip, number in enumerate((0, 2)):  # spread over the three clips
        for row, (name, colour) in enumerate(
            zip(("truth", "told", "untold", "mistold"), edges, strict=True)
        ):
            top = clip * (4 * high + 4 * edge) + row * high
            for left in (0, SEEN * wide + 3 * edge):
                assert picture[top, left].tolist() == list(colour)
                assert picture[top + high - 1, left].tolist() == list(colour)
                assert picture[top + edge, left + SIDE * used].tolist() == list(colour)
            assert (picture[top : top + high, SEEN * wide : SEEN * wide + 3 * edge] == 255).all()
            last = picture[top + edge : top + edge + SIDE * used, -wide:-edge]
            frame = (report.frames[name][number, -1].clamp(0, 1) * 255).round().numpy()
            np.testing.assert_array_equal(last, np.kron(frame, np.ones((used, used, 1))))
    assert (picture[4 * high : 4 * high + 4 * edge] == 255).all()


def ended(callback: ToldUntold, held_out: Mock, monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Ends a training; returns what the callback recorded with."""
    recorder = Mock()
    monkeypatch.setattr("callbacks.told.recorder_of", lambda trainer: recorder)
    data = SimpleNamespace(
        held_out_batch=held_out,
        still_scenes=lambda video: stills(clips(video.tolist())),
        mean_picture=lambda: torch.zeros(SIDE, SIDE, 3),
        body_width=1,
    )
    trainer: Any = SimpleNamespace(is_global_zero=True, datamodule=data, global_step=7)
    module: Any = SimpleNamespace(world_model=CopyLastFrame())
    callback.on_train_end(trainer, module)
    return recorder


def test_the_report_of_a_training_is_logged_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback, held_out = ToldUntold(4), Mock(return_value=clips([0, 1, 0, 1]))
    recorder = ended(callback, held_out, monkeypatch)
    held_out.assert_called_once_with(4)
    report = callback.report
    assert report is not None
    np.testing.assert_allclose(report.errors["told"], report.errors["copy"], rtol=1e-4)
    assert recorder.log_metrics.call_args.args[1:] == (report.metrics(), 7)
    assert recorder.describe.call_args.args[1] == report.sentence()
    table = recorder.log_table.call_args.args[2]
    assert len(table) == (len(report.errors) + 2) * len(report.horizons)
    assert {row["dream"] for row in table} == {*report.errors, "untold - told", "mistold - told"}
    assert {k: table[1][k] for k in list(table[1])[:2]} == {"dream": "told", "frames_ahead": 5}
    assert table[1]["mean"] == pytest.approx(report.at("told", 5).mean, abs=1e-3)
    save_report(report, tmp_path / "pretrain")
    text = (tmp_path / "pretrain/told.md").read_text()
    assert text == f"{report.sentence()}\n\n{report.table()}"
    assert json.loads((tmp_path / "pretrain/told.json").read_text()) == table
    assert (tmp_path / "pretrain/told.png").stat().st_size > 0


@pytest.mark.parametrize("error", [ValueError("one video"), VideoError("it is gone")])
def test_a_trained_model_outlives_what_cannot_be_measured(
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    callback = ToldUntold(4)
    with caplog.at_level(logging.INFO):
        recorder = ended(callback, Mock(side_effect=error), monkeypatch)
    assert f"was not measured: {error}" in caplog.text
    assert recorder.mock_calls == []
    assert callback.report is None
    ended(ToldUntold(0), held_out := Mock(), monkeypatch)
    held_out.assert_not_called()
