"""Measures whether the phrases lead the dream of a pre-trained model: ``mapo-told``.

Usage: mapo-told checkpoint=runs/NAME/pretrain/last.ckpt [checkpoint=... of other seeds] [words]

The same weights dream the rest of held-out clips, told what happens next, untold, and mistold with
another video's phrases, beside copying the last frame, the still scene and one mean picture. The
settings are those of the checkpoint; further words, as of ``mapo-train``, change them, for example
``data.root=DIR`` for other videos or ``callbacks.told=200`` for more clips. Prints a table, and
writes it with a picture of four clips into ``run_dir`` (``runs/told`` if none is given); of several
checkpoints into the folders 1, 2 ... there, with a table over all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mapo_lightning.config.command_line import checkpoints_of, small_program
from mapo_lightning.config.compose import compose
from mapo_lightning.run.config import RunConfig, conf_folder
from mapo_lightning.run.from_checkpoint import agent_settings
from mapo_lightning.run.renamed import RENAMED
from mapo_lightning.types import ConfigError

if TYPE_CHECKING:
    from mapo_lightning.training.told import ToldReport


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every checkpoint, print the tables and write them; returns the exit code."""
    return small_program(argv, __doc__ or "", _run)


def _run(words: Sequence[str]) -> None:
    paths, others = checkpoints_of(words, "mapo-told", "pre-trained")
    from callbacks.told import save_report  # here: it imports torch, which takes seconds

    reports, folder = [], Path()
    settings = [  # all of them are read before the first is measured
        compose(others, RunConfig, conf_folder(), agent_settings(path, others, True), RENAMED)
        for path in paths
    ]
    for path, composed in zip(paths, settings, strict=True):
        if composed.text is not None:
            sys.stdout.write(composed.text + "\n")
            return
        folder = Path(composed.config.run_dir or "runs/told")
        report = _measure(composed.config, path)
        reports.append(report)
        sys.stdout.write(f"{path}\n{report.sentence()}\n\n{report.table()}\n")
        save_report(report, folder / str(len(reports)) if len(paths) > 1 else folder)
    if len(reports) > 1:
        from mapo_lightning.training.told import over_seeds

        together = over_seeds(reports)
        sys.stdout.write(f"{together}\n")
        (folder / "told.md").write_text(together, encoding="utf-8")
    sys.stdout.write(f"Tables and pictures: {folder}\n")


def _measure(cfg: RunConfig, path: Path) -> ToldReport:
    # Torch takes seconds to import: the words were checked without.
    import torch

    from mapo_lightning.run import build
    from mapo_lightning.run.stages import render_demo
    from mapo_lightning.run.trainer import best_device
    from mapo_lightning.semantics.factory import log_servers
    from mapo_lightning.training.checkpoint import read_checkpoint
    from mapo_lightning.training.told import measure_held_out

    if not cfg.reads_phrases:
        raise ConfigError(
            f"'{path}' was pre-trained with method={cfg.method}, whose dreams no phrase drives"
        )
    content = read_checkpoint(path, mapped=True)
    if content["mapo"].get("stage") != "pretrain":
        raise ConfigError(f"'{path}' is no checkpoint of stage=pretrain; phrases drive only those")
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    module = build.load_pretraining(cfg, path)
    module.to(best_device(cfg.trainer.accelerator))
    log_servers(cfg.vlm)
    render_demo(cfg)
    data = build.build_videos(cfg)
    try:
        return measure_held_out(module.world_model, data, max(2, cfg.callbacks.told))
    except ValueError as error:
        raise ConfigError(str(error)) from error
