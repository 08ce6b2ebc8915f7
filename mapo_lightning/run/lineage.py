"""Where a run comes from, for MLflow: what it learns from, and the pre-training it starts from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from mapo_lightning.ownership import is_own
from mapo_lightning.run.config import RunConfig
from mapo_lightning.semantics.factory import build_describer
from mapo_lightning.tracking.logger import Source
from mapo_lightning.training.checkpoint import read_checkpoint
from mapo_lightning.training.datamodule import VideoDataModule
from mapo_lightning.training.export import TENSORS, is_export
from mapo_lightning.training.metadata import signed_part
from mapo_lightning.training.published_weights import is_published

_DIGEST = 16  # bytes
_BLOCK = 1 << 20  # bytes hashed at once


class Origin(NamedTuple):
    """A pre-trained checkpoint that fine-tuning starts from."""

    path: Path
    """Absolute."""
    digest: str
    """SHA-256 of the file; of an export, that of its tensors; empty for other folders."""
    run: str
    """Id of the MLflow run that wrote it; empty if there was none, or it is not the user's own."""

    def tags(self) -> dict[str, str]:
        """As the fine-tuning's run is tagged."""
        named = {
            "pretrained_checkpoint": str(self.path),
            "pretrained_sha256": self.digest,
            "pretrained_run": self.run,
        }
        return {name: text for name, text in named.items() if text}


def origin_of(path: Path) -> Origin:
    """Find out where a pre-trained checkpoint comes from; reads the file once, for its hash.

    Raises:
        CheckpointError: It cannot be read.
    """
    run = ""
    if not is_published(path):
        metadata = read_checkpoint(path, mapped=True)["mapo"]
        # Somebody else's checkpoint names a run of theirs, or claims one of this user's.
        if is_own(signed_part(metadata), metadata.get("config_signature") or ""):
            run = str(metadata.get("mlflow_run") or "")
    file = path / TENSORS if path.is_dir() and is_export(path) else path
    return Origin(path.absolute(), _sha256(file) if file.is_file() else "", run)


def videos_of(cfg: RunConfig, data: VideoDataModule, phase: str) -> list[Source]:
    """The videos of a phase and, where it has labels, the labels; no video is read.

    Args:
        cfg: The run.
        data: Its videos, after ``setup``.
        phase: Of learning from videos.
    """
    assert data.index is not None
    videos = [*data.index.train, *data.index.holdout]
    corpus = _digest(sorted(video.fingerprint for video in videos))
    found = Source(
        f"videos {Path(cfg.data.root).name}",
        corpus,
        str(Path(cfg.data.root).absolute()),
        {
            "kind": cfg.data.kind,
            "videos": len(videos),
            "frames": sum(video.frames for video in videos),
            "held_out": len(data.index.holdout),
            "set_aside": len(data.index.quarantined),
        },
    )
    if phase == "tokenizer" or not cfg.reads_phrases:
        return [found]
    describer, window = build_describer(data.vlm).name, asdict(data.vlm.window)
    # Sentences that came with the videos, and people's reviews, change labels too.
    told = [str(video.captions) for video in sorted(videos, key=lambda video: video.fingerprint)]
    reviews = _sha256(Path(cfg.vlm.reviews)) if cfg.vlm.reviews else ""
    labels = Source(
        f"labels {cfg.vlm.kind}",
        _digest([corpus, describer, json.dumps(window, sort_keys=True), reviews, *told]),
        str(Path(data.root / data.vlm.store).absolute()),
        {"describer": describer, "videos_digest": corpus, **window},
    )
    return [found, labels]


def task_of(cfg: RunConfig, replay: Path) -> list[Source]:
    """The simulator that fine-tuning learns from, through its replay."""
    env = asdict(cfg.env)
    settings = json.dumps({"env": env, "seed": cfg.seed}, sort_keys=True, default=str)
    profile = {
        "environments": cfg.env.num_envs,
        "agent_steps": cfg.finetune.agent_steps,
        "frames": cfg.finetune.agent_steps * cfg.env.frames_per_step,
        "random_agent_steps": cfg.finetune.prefill,
        "seed": cfg.seed,
    }
    name = f"replay {cfg.env.kind}/{cfg.env.name}"
    return [Source(name, _digest([settings]), str(replay.absolute()), profile)]


def _digest(parts: list[str]) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=_DIGEST).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
