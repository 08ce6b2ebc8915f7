"""Another program scores the dreams that are written, and finds what we find."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mapo_lightning.judging.looks import looks
from mapo_lightning.judging.rollouts import write_rollouts
from tests.constructed_dreams import ConstructedWorld, toy_clips

pytestmark = pytest.mark.slow
SEEN = 5
SCORER = """
import json, sys
from worldproof import iter_rollouts
from worldproof.metrics.fidelity import PSNR
import torch
scores = [PSNR()._curve(r, torch.device("cpu"))[0].tolist() for r in iter_rollouts(sys.argv[1])]
print(json.dumps(scores))
"""


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Worldproof 0.1.0 in a folder of its own; it needs numpy, torch and pillow, which are here."""
    folder = tmp_path_factory.mktemp("worldproof")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    done = subprocess.run(
        [*command, str(folder), "worldproof==0.1.0"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"worldproof cannot be installed here: {done.stderr.strip()[-200:]}")
    return folder


def test_worldproof_finds_the_same_psnr(scorer: Path, tmp_path: Path) -> None:
    clips = toy_clips(range(100, 104), steps=10)
    torch.manual_seed(0)
    dream = ConstructedWorld("noisy").open_loop(clips.batch, SEEN)
    dream = (255 * dream).round() / 255  # files hold bytes: of noise, rounding alone makes 0.01 dB
    write_rollouts(tmp_path / "rollouts", clips, dream, SEEN, 5.0, "noisy")
    said = subprocess.run(
        [sys.executable, "-c", SCORER, str(tmp_path / "rollouts")],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": str(scorer)},
    )  # fmt: skip
    theirs = np.array(json.loads(said.stdout))
    ours = looks(clips.truth, dream, SEEN, (1, 2, 3, 4, 5))["psnr"].values
    assert theirs.shape == ours.shape == (4, 5)
    assert theirs == pytest.approx(ours, abs=0.01)
