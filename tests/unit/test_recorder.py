from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import mlflow
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from callbacks.recorder import MLflowRecorder, contact_sheet, recorder_of
from mapo_lightning.data.clips import LabelExample
from mapo_lightning.tracking.logger import RunLogger, make_logger, store_uri
from mapo_lightning.tracking.settings import TrackingConfig
from mapo_lightning.tracking.versions import GitState, git_state


class Line(L.LightningModule):
    """The smallest thing that trains."""

    def __init__(self, breaks_at: int = -1) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.breaks_at = breaks_at

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if batch_idx == self.breaks_at:
            raise ArithmeticError("loss is not\x1b[31m finite")
        loss: torch.Tensor = self.layer(batch[0]).pow(2).mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def example(text: str, height: int = 30) -> LabelExample:
    frames, path = np.full((4, height, 40, 3), 90, np.uint8), Path("clips/<b>=cup.mp4")
    return LabelExample(frames, path.name, 12, text, "slots", None, path, 15)


def fit(run: Any, recorder: MLflowRecorder, place: Path, breaks_at: int = -1) -> L.Trainer:
    data = torch.utils.data.TensorDataset(torch.ones(20, 1))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        log_every_n_steps=1,
        logger=run or False,
        callbacks=[recorder, ModelCheckpoint(dirpath=place, save_last=True)],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=place,
    )
    trainer.fit(Line(breaks_at), torch.utils.data.DataLoader(data, batch_size=1))
    return trainer


@pytest.fixture
def run(cfg: TrackingConfig) -> Iterator[RunLogger]:
    logger = make_logger(cfg, "fit")
    assert isinstance(logger, RunLogger)
    yield logger
    logger.finalize("success")


def stored(cfg: TrackingConfig, run: RunLogger) -> tuple[Any, Path]:
    client = mlflow.MlflowClient(store_uri(cfg))
    return client.get_run(run.active_run), Path(client.download_artifacts(run.active_run, ""))


@pytest.mark.slow
def test_a_fit_leaves_everything_needed_to_repeat_it(
    cfg: TrackingConfig, run: RunLogger, tmp_path: Path
) -> None:
    recorder = MLflowRecorder("seed: 3\n", {"seed": 3}, {"stage": "pretrain"}, every=5)
    trainer = fit(run, recorder, tmp_path)
    assert recorder_of(trainer) is recorder
    found, place = stored(cfg, run)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"seed": "3"}
    assert found.data.tags["stage"] == "pretrain"
    assert found.data.tags["version.python"].startswith("3.")
    assert (place / "config.yaml").read_text() == "seed: 3\n"
    assert "python" in json.loads((place / "versions.json").read_text())
    assert (place / "checkpoints/last.ckpt").stat().st_size > 0
    figures = found.data.metrics
    assert figures["time/updates_per_second"] > 0
    assert 0 <= figures["time/data_wait_share"] <= 1
    assert figures["time/step_seconds"] > 0
    history = mlflow.MlflowClient(store_uri(cfg)).get_metric_history(run.active_run, "train/loss")
    assert len(history) == 20


@pytest.mark.slow
def test_the_git_state_is_that_of_the_package_wherever_a_run_starts(
    cfg: TrackingConfig, run: RunLogger, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "another project"
    elsewhere.mkdir()
    for words in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a@b", *COMMIT]):
        subprocess.run(["git", "-C", str(elsewhere), *words], check=True)
    monkeypatch.chdir(elsewhere)
    fit(run, MLflowRecorder(), tmp_path)
    found, _ = stored(cfg, run)
    own, other = git_state(root), git_state(elsewhere)
    assert other is not None
    assert found.data.tags.get("git.commit") == (own.commit if own else None) != other.commit


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [False, True])
def test_changes_of_the_code_are_recorded_only_where_they_are_asked_for(
    wanted: bool,
    cfg: TrackingConfig,
    run: RunLogger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = GitState("c" * 40, True, "-a secret plan\n")
    monkeypatch.setattr("callbacks.recorder.own_git_state", lambda: state)
    fit(run, MLflowRecorder(git_diff=wanted), tmp_path)
    found, place = stored(cfg, run)
    assert (found.data.tags["git.commit"], found.data.tags["git.dirty"]) == ("c" * 40, "true")
    assert (place / "git.diff").exists() == wanted
    assert not TrackingConfig().git_diff


COMMIT = ["commit", "-q", "--allow-empty", "-m", "x"]


def test_a_fit_that_breaks_says_why(cfg: TrackingConfig, run: RunLogger, tmp_path: Path) -> None:
    with pytest.raises(ArithmeticError):
        fit(run, MLflowRecorder(), tmp_path, breaks_at=3)
    found, _ = stored(cfg, run)
    assert found.info.status == "FAILED"
    assert found.data.tags["failure"] == "ArithmeticError: loss is not [31m finite"


def test_what_callbacks_show_can_be_found(
    cfg: TrackingConfig, run: RunLogger, tmp_path: Path
) -> None:
    recorder = MLflowRecorder()
    trainer = fit(run, recorder, tmp_path)
    frames_THWC = np.zeros((6, 64, 64, 3), np.uint8)
    recorder.log_metrics(trainer, {"eval/return": 4.0}, 1200)
    for words in ("It dreams.", "It runs.", "It dreams."):
        recorder.describe(trainer, words)
    recorder.log_video(trainer, "dream", frames_THWC, 10.0, 1200)
    recorder.log_image(trainer, "codes", frames_THWC[0], 1200)
    recorder.log_html(trainer, "page", "<p>x</p>", 1200)
    recorder.log_table(trainer, "rows", [{"a": 1}], 1200)
    recorder.log_phrases(trainer, [example("[hand][lifts]\x1b[31m"), example("=null", 60)], 1200)
    run.flush()

    found, place = stored(cfg, run)
    assert found.data.metrics["eval/return"] == 4.0
    assert found.data.tags["mlflow.note.content"] == "It dreams.\n\nIt runs."
    video = (place / "videos/dream/step_00001200.mp4").read_bytes()
    assert video[4:8] == b"ftyp"
    assert (place / "images/codes/step_00001200.png").exists()
    assert (place / "pages/page/step_00001200.html").exists()
    assert (place / "tables/rows/step_00001200.json").exists()
    rows = json.loads((place / "phrases/step_00001200.json").read_text())
    assert rows[0] == {
        "video": "<b>=cup.mp4",
        "start": 12,
        "status": "slots",
        "text": "[hand][lifts] [31m",
    }
    assert "'=null" in (place / "phrases/step_00001200.csv").read_text()
    with Image.open(place / "phrases/step_00001200.png") as sheet:
        assert sheet.height == 240


def test_without_a_logger_nothing_happens(tmp_path: Path) -> None:
    recorder = MLflowRecorder("seed: 3\n", {"seed": 3}, every=1)
    trainer = fit(None, recorder, tmp_path)
    recorder.log_phrases(trainer, [example("x")], 1)
    recorder.log_metrics(trainer, {"a": 1.0}, 1)
    recorder.describe(trainer, "It dreams.")
    assert recorder_of(L.Trainer(logger=False, accelerator="cpu")) is None


def test_the_contact_sheet_shows_frames_beside_words() -> None:
    sheet_HWC = contact_sheet([example("moves left")] * 3, tile=50, text_width=200)
    assert sheet_HWC.shape[0] == 3 * 58
    assert (sheet_HWC[:50, :60] == 90).all()  # the first frame
    words_HWC = sheet_HWC[:50, -200:]
    assert words_HWC.min() < 100  # something is written there
