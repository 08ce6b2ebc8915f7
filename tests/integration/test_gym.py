"""The program with Gymnasium's environments, whose episodes end early, and with broken ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from program import SMALL, train

from mapo_lightning.training.checkpoint import read_checkpoint

GYM = [*SMALL, "env=gym", "size=tiny"]


def test_the_example_of_the_readme_trains_to_its_end(tmp_path: Path) -> None:
    """Random episodes last about seven steps there; a chunk has fifty."""
    words = [*GYM, "env.name=InvertedPendulum-v5", "data=toy", f"data.root={tmp_path}/toy"]
    words += ["demo.clips_per_scene=4", "demo.frames=30", "finetune.chunk_length=50"]
    said = train(tmp_path, *words, "run_dir=run")
    assert re.search(r"gym/InvertedPendulum-v5 after \d+ frames", said)
    checkpoint = read_checkpoint(tmp_path / "run/finetune/last.ckpt")
    (collection,) = checkpoint["collection"]
    lengths = [entries for _, entries in collection["replay"]["episodes"]]
    assert len(lengths) > 2
    assert max(lengths) < 50


BROKEN = """
import gymnasium as gym
import numpy as np


class Broken(gym.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(0.0, 1.0, (1,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode=None, fault=None):
        self.render_mode, self.fault, self.steps = render_mode, fault, 0
        if fault == "constructor":
            raise OSError("no licence")

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        reward = float("nan") if self.fault == "reward" and self.steps == 5 else 1.0
        return np.zeros(1, np.float32), reward, False, False, {}

    def render(self):
        return np.zeros((8, 8, 1 if self.fault == "render" else 3), np.uint8)


for fault in ("constructor", "render", "reward"):
    gym.register(f"Broken-{fault}-v0", Broken, max_episode_steps=20, kwargs={"fault": fault})
"""


@pytest.mark.parametrize(
    ("fault", "message", "begun"),
    [
        ("constructor", "because its constructor fails: OSError: no licence", False),
        ("render", r"at reset: render must return an \(H, W, 3\) uint8 array", False),
        ("reward", "at step 5 of an episode: the reward must be a finite number, got nan", True),
    ],
)
def test_a_broken_environment_costs_one_sentence(
    fault: str, message: str, begun: bool, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    words = [*GYM, "stage=finetune", f"env.name=broken:Broken-{fault}-v0", "run_dir=run"]
    said = train(tmp_path, *words, code=2, script=str(runner(tmp_path)))
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"Broken-{fault}-v0" in line
    assert re.search(message, line)
    assert (tmp_path / "run").exists() is begun


def runner(folder: Path) -> Path:
    """The program started from ``folder``, where its own packages lie."""
    script = folder / "start.py"
    script.write_text("import sys\nfrom mapo_lightning.run.main import main\nsys.exit(main())\n")
    return script
