"""Writes dreams and truths where other programs can score them.

The layout is that of worldproof 0.1 (https://pypi.org/project/worldproof): a folder for each clip,
frames as PNG, without loss.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mapo_lightning.judging.clips import Clips

FORMAT = "0.1-provisional"


def write_rollouts(
    folder: Path, clips: Clips, dream: Tensor, seen: int, fps: float, model: str
) -> None:
    """Write every clip with its dream.

    Args:
        folder: Gets one folder for each clip; is made if it is not there.
        clips: What was shown, what really followed, and what drove the dream.
        dream: (C, T, H, W, 3) in [0, 1].
        seen: Frames that were shown.
        fps: Frames per second of the clips.
        model: Whose dreams they are.
    """
    truth = clips.batch["obs"].cpu().numpy()
    dreamt = (dream.clamp(0, 1) * 255).round().byte().cpu().numpy()
    key = "action" if clips.driver == "action" else "semantic"
    driver = clips.batch[key][:, seen:].float().cpu().numpy()
    for number in range(len(truth)):
        place = folder / f"clip_{number:04d}"
        place.mkdir(parents=True, exist_ok=True)
        _frames(place / "context", truth[number, :seen])
        _frames(place / "ground_truth", truth[number, seen:])
        _frames(place / "predictions" / "sample_00", dreamt[number, seen:])
        np.save(place / "actions.npy", driver[number])
        manifest = {
            "format_version": FORMAT,
            "modality": "pixels",
            "storage": "png_sequence",
            "fps": fps,
            "resolution": list(truth.shape[2:4]),
            "channels": 3,
            "model_id": model,
            "seed": 0,
            "camera_id": None,
            "lossy_source": False,
            "inference_latency_s": None,
            "context_id": f"{int(clips.group[number])}",
            "is_failure": None,
            "horizon": truth.shape[1] - seen,
            "n_samples": 1,
            "has_ground_truth": True,
        }
        text = json.dumps(manifest, indent=1) + "\n"
        (place / "manifest.json").write_text(text, encoding="utf-8")


def _frames(folder: Path, frames: NDArray[np.uint8]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"frame_{number:05d}.png")
