"""Records everything about a run that is not a loss curve."""

from __future__ import annotations

import logging
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import ModelCheckpoint
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mapo_lightning.data.clips import LabelExample
from mapo_lightning.data.video import FILM_HEIGHT
from mapo_lightning.stopping import Stopped
from mapo_lightning.tracking import artifacts, mlflow_client
from mapo_lightning.tracking.curves import CurvesFile
from mapo_lightning.tracking.logger import Kept, RunLogger, run_logger
from mapo_lightning.tracking.versions import own_git_state, versions
from mapo_lightning.training.checkpoint import BEST, read_checkpoint
from mapo_lightning.training.log_due import Place, log_at, log_now
from mapo_lightning.types import CheckpointError, Frames

log = logging.getLogger(__name__)

KEPT = ("last", "best")
"""Names of the checkpoints that stay."""


def recorder_of(trainer: L.Trainer) -> MLflowRecorder | None:
    """Return the recorder among a trainer's callbacks, None where there is none."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, MLflowRecorder)), None)


class MLflowRecorder(L.Callback):
    """Records configuration, versions, git state, timing, checkpoints, videos and tables.

    Every method can be called on every rank and without a logger; it then does nothing.

    Args:
        config_yaml: The resolved run without secrets, logged as ``config.yaml``.
        params: The same as dotted key -> value, logged as parameters.
        tags: Further tags of the run.
        every: Updates between two records of the timing.
        system_metrics: Also record CPU, memory and GPU use.
        git_diff: Also record what the package's own checkout changes since its commit.
        about: What MLflow's list of models says about the checkpoints.
    """

    def __init__(
        self,
        config_yaml: str = "",
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        every: int = 50,
        system_metrics: bool = False,
        git_diff: bool = False,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.config_yaml, self.params, self.tags = config_yaml, dict(params or {}), dict(tags or {})
        self.every, self.system_metrics, self.git_diff = every, system_metrics, git_diff
        self.about = {name: str(value) for name, value in (about or {}).items()}
        self._monitor: Any = None
        self._reset_clock()
        self._batch_ended = self._batch_began = 0.0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record configuration, versions and the git state of the package's own checkout."""
        run = _run_of(trainer)
        if run is None:
            return
        git, found = own_git_state(), versions()
        tags = {f"version.{name}": version for name, version in found.items()} | self.tags
        if git is not None:
            tags |= {"git.commit": git.commit, "git.dirty": str(git.dirty).lower()}
            if self.git_diff and git.diff:
                artifacts.log_text(run, git.diff, "git.diff")
        run.attempt("tags", lambda: mlflow_client.set_tags(run.experiment, run.active_run, tags))
        run.log_hyperparams(self.params)
        artifacts.log_dict(run, found, "versions.json")
        if self.config_yaml:
            artifacts.log_text(run, self.config_yaml, "config.yaml")
        run.keep(Kept("last"), self.about)
        if self.system_metrics:
            self._monitor = mlflow_client.system_monitor(run.active_run)
            self._monitor.start()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note how far the curves have come; only the main process knows, and it writes."""
        run = _run_of(trainer)
        if run is not None:
            checkpoint["curves"] = run.state()
        for file in _curves_files(trainer):
            checkpoint["curves_rows"] = file.rows

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up the curves."""
        run = _run_of(trainer)
        if run is not None and "curves" in checkpoint:
            run.resume(checkpoint["curves"])
        for file in _curves_files(trainer):
            file.resume(int(checkpoint.get("curves_rows", 0)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._reset_clock()
        self._batch_ended = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the time since the last batch as waiting for data."""
        self._batch_began = time.perf_counter()
        self._wait += self._batch_began - self._batch_ended

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any
    ) -> None:
        """Log ``time/...`` every few updates; what other callbacks do counts as waiting."""
        self._batch_ended = time.perf_counter()
        self._busy += self._batch_ended - self._batch_began
        self._batches += 1
        if trainer.global_step % self.every:  # at the same updates in a run that was resumed
            return
        total = max(self._wait + self._busy, 1e-9)
        figures = {
            "time/updates_per_second": self._batches / total,
            "time/data_wait_seconds": self._wait / self._batches,
            "time/step_seconds": self._busy / self._batches,
            "time/data_wait_share": self._wait / total,
        }
        log_now(pl_module, figures)
        self._reset_clock()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the checkpoints."""
        self._close(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Record why the run ended early, and, unless it was stopped, the checkpoints so far."""
        run = _run_of(trainer)
        if run is not None:
            reason = f"{type(exception).__name__}: {exception}"
            tags = {"failure": artifacts.plain_text(reason)}
            if isinstance(exception, Stopped | KeyboardInterrupt):
                run.stopped, tags = True, {"stopped": artifacts.plain_text(str(exception))}
            run.attempt(
                "the failure", lambda: mlflow_client.set_tags(run.experiment, run.active_run, tags)
            )
        # A cluster kills soon after it has asked to stop, and the run that goes on has the files.
        self._close(trainer, files=run is None or not run.stopped)

    def records(self, trainer: L.Trainer) -> bool:
        """Whether files, pictures and tables are kept: in MLflow, by the main process."""
        return _run_of(trainer) is not None

    def keep(self, trainer: L.Trainer, path: Path) -> None:
        """List a checkpoint that was just written among MLflow's models."""
        run = _run_of(trainer)
        if run is not None:
            list_kept(run, path, self.about, final=False)

    def describe(self, trainer: L.Trainer, text: str) -> None:
        """Say in words what came out: a paragraph of the description on the run's page."""
        run = _run_of(trainer)
        if run is not None:
            run.attempt(
                "the description",
                lambda: mlflow_client.describe(run.experiment, run.active_run, text),
            )

    def log_metrics(self, trainer: L.Trainer, metrics: Mapping[str, float], step: int) -> None:
        """Record values at a step of the caller's choice, wherever curves go."""
        if trainer.is_global_zero:
            log_at(trainer, metrics, Place("", step))

    def log_video(
        self,
        trainer: L.Trainer,
        name: str,
        frames_THWC: Frames,
        fps: float,
        step: int,
        height: int = FILM_HEIGHT,
    ) -> None:
        """Record a video as ``videos/<name>/step_00001200.mp4``.

        Args:
            trainer: The trainer at work.
            name: What the video shows, such as ``dream``.
            frames_THWC: RGB frames, (T, H, W, 3) uint8, T >= 1.
            fps: Frames per second of the file.
            step: Position on the x-axis of the curves.
            height: Rows of the film; lower frames are enlarged.
        """
        artifacts.log_video(_run_of(trainer), frames_THWC, name, step, fps, height)

    def log_image(
        self, trainer: L.Trainer, name: str, image_HWC: NDArray[np.uint8], step: int
    ) -> None:
        """Record a picture, (H, W, 3) uint8, as ``images/<name>/step_00001200.png``."""
        target = f"images/{name}/{artifacts.step_name(step)}.png"
        artifacts.log_image(_run_of(trainer), image_HWC, target)

    def log_html(self, trainer: L.Trainer, name: str, body: str, step: int) -> None:
        """Record a page as ``pages/<name>/step_00001200.html``; the caller escapes the body."""
        target = f"pages/{name}/{artifacts.step_name(step)}.html"
        artifacts.log_html(_run_of(trainer), body, target, name)

    def log_page(self, trainer: L.Trainer, name: str, page: str, step: int) -> None:
        """Record a whole HTML page as ``pages/<name>/step_00001200.html``, unchanged."""
        target = f"pages/{name}/{artifacts.step_name(step)}.html"
        artifacts.log_page(_run_of(trainer), page, target)

    def log_table(
        self, trainer: L.Trainer, name: str, rows: Sequence[Mapping[str, object]], step: int
    ) -> None:
        """Record rows as ``tables/<name>/step_00001200.csv`` and ``.json``."""
        artifacts.log_table(_run_of(trainer), rows, f"tables/{name}/{artifacts.step_name(step)}")

    def log_phrases(self, trainer: L.Trainer, examples: Sequence[LabelExample], step: int) -> None:
        """Record phrases next to their frames: one picture and one table in ``phrases/``."""
        run = _run_of(trainer)
        if run is None or not examples:
            return
        target = f"phrases/{artifacts.step_name(step)}"
        artifacts.log_image(run, contact_sheet(examples), f"{target}.png")
        rows = [
            {
                "video": e.video,
                "start": e.start,
                "status": e.status,
                "text": artifacts.plain_text(e.text),
            }
            for e in examples
        ]
        artifacts.log_table(run, rows, target)

    def _reset_clock(self) -> None:
        self._wait = self._busy = 0.0
        self._batches = 0

    def _close(self, trainer: L.Trainer, files: bool = True) -> None:
        run = _run_of(trainer)
        if run is None:
            return
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        # First: no file is tried while the store is away.
        run.flush(5.0 if run.stopped else 30.0)
        for checkpoint in trainer.checkpoint_callbacks:
            if files and isinstance(checkpoint, ModelCheckpoint):
                paths = {checkpoint.last_model_path, checkpoint.best_model_path} - {""}
                for path in sorted({*map(Path, paths), *Path(checkpoint.dirpath or "").glob(BEST)}):
                    artifacts.log_file(run, path, "checkpoints")
                    if path.stem in KEPT:
                        list_kept(run, path, self.about)
                if not paths:
                    run.give_up("last")


def list_kept(
    run: RunLogger, path: Path, about: Mapping[str, str], final: bool = True
) -> str | None:
    """List a checkpoint of this package among MLflow's models.

    Args:
        run: The run that keeps it.
        path: The file.
        about: What to say about it.
        final: Whether it stays as it is.

    Returns:
        The model's id; None where the file is no checkpoint, or the store is away.
    """
    try:
        content = read_checkpoint(path, mapped=True)
    except CheckpointError as error:
        log.warning("not among MLflow's models: %s", error)
        return None
    step = int(content["mapo"].get("env_frames", content.get("global_step", 0)))
    return run.keep(Kept(path.stem, path.absolute(), step, final), about)


def contact_sheet(
    examples: Sequence[LabelExample], tile: int = 112, text_width: int = 560
) -> NDArray[np.uint8]:
    """Draw one row per example: its frames, then its words.

    Args:
        examples: Labelled windows of frames.
        tile: Height of a frame in the picture, in pixels.
        text_width: Width of the words' column, in pixels.

    Returns:
        (H, W, 3) uint8.
    """
    strips = [_strip(example.frames, tile) for example in examples]
    widest = max(strip.width for strip in strips)
    sheet = Image.new("RGB", (widest + text_width, (tile + 8) * len(strips)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, (strip, example) in enumerate(zip(strips, examples, strict=True)):
        top = row * (tile + 8)
        sheet.paste(strip, (0, top))
        name = artifacts.plain_text(example.video)
        head = f"{name}  frames from {example.start}  ({example.status})"
        lines = [head, *textwrap.wrap(artifacts.plain_text(example.text), text_width // 8)[:4]]
        draw.multiline_text((widest + 10, top + 6), "\n".join(lines), fill="black", font=font)
    return np.asarray(sheet)


def _strip(frames_THWC: Frames, height: int) -> Image.Image:
    frames = [Image.fromarray(frame) for frame in frames_THWC]
    width = max(1, round(frames[0].width * height / frames[0].height))
    strip = Image.new("RGB", ((width + 2) * len(frames), height), "white")
    for index, frame in enumerate(frames):
        strip.paste(frame.resize((width, height)), (index * (width + 2), 0))
    return strip


def _run_of(trainer: L.Trainer) -> RunLogger | None:
    return run_logger(trainer.loggers) if trainer.is_global_zero else None


def _curves_files(trainer: L.Trainer) -> list[CurvesFile]:
    return [one for one in trainer.loggers if isinstance(one, CurvesFile)]
