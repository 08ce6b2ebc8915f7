"""`CollectExperience` in a real training loop: what fills the replay, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import lightning as L
import numpy as np
import pytest
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from callbacks.collect import CollectExperience
from mapo_lightning.config.compose import compose
from mapo_lightning.envs.collector import Collector
from mapo_lightning.run.build import build_collection
from mapo_lightning.run.config import RunConfig
from mapo_lightning.training.datamodule import ReplayDataModule
from mapo_lightning.training.finetune import FinetuneModule
from tests.contract.throwaways import CopyLastFrame, RandomShooting

CONF = Path(__file__).parents[2] / "conf"


class Watched(Collector):
    """Keeps what it was asked for, and the actions that were taken."""

    def collect(self, policy: Any, steps: int, ahead: bool = False) -> int:
        self.asked: list[bool] = [*getattr(self, "asked", []), ahead]

        def watched(step: Any) -> NDArray[np.float32]:
            action: NDArray[np.float32] = policy(step)
            self.taken: list[NDArray[np.float32]] = [*getattr(self, "taken", []), action]
            return action

        return super().collect(watched, steps, ahead)


def run(folder: Path, updates: int, *words: str) -> Watched:
    """Train a model without weights worth the name on the toy, one environment."""
    words = ("env=toy", "vlm=none", "env.num_envs=1", f"work_dir={folder}", *words)
    cfg = compose(words, RunConfig, CONF).config
    stage = build_collection(cfg, folder / "replay", 0)
    stage.collector.__class__ = Watched
    world = CopyLastFrame()
    module = FinetuneModule(world, RandomShooting(world, stage.action_dim), cfg.finetune)
    data = ReplayDataModule(stage.replay, cfg.finetune.batch_size, cfg.finetune.chunk_length, 0)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=updates, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[CollectExperience(stage.collector, cfg.env.frames_per_step, 0)],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert isinstance(stage.collector, Watched)
    return stage.collector


SMALL = ["finetune.batch_size=2", "finetune.chunk_length=5", "finetune.train_every=1"]


@pytest.mark.parametrize("hold", [1, 3])
def test_the_prefill_holds_each_random_action_as_long_as_asked(hold: int, tmp_path: Path) -> None:
    words = [*SMALL, "finetune.prefill=30", f"finetune.prefill_hold={hold}"]
    collector = run(tmp_path, 1, *words, "finetune.initial_updates=1")
    actions = np.concatenate(collector.taken)
    assert len(actions) >= 30  # one more where an episode began anew
    changes = (actions[1:] != actions[:-1]).any(axis=1)
    assert np.flatnonzero(changes).tolist() == list(range(hold - 1, len(actions) - 1, hold))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ahead", "exact", "expected"),
    [(True, False, True), (False, False, False), (True, True, False)],
)
def test_steps_are_left_under_way_unless_the_settings_say_otherwise(
    ahead: bool, exact: bool, expected: bool, tmp_path: Path
) -> None:
    words = [*SMALL, "finetune.prefill=20", f"finetune.collect_ahead={str(ahead).lower()}"]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(exact)
    try:
        collector = run(tmp_path, 5, *words, "finetune.initial_updates=2")
    finally:
        torch.use_deterministic_algorithms(before)
    assert len(collector.asked) >= 23  # the prefill goes on until a chunk can be drawn
    assert not any(collector.asked[:-3])
    assert collector.asked[-3:] == [expected] * 3  # updates 3, 4 and 5: none in the initial two


class Seven(gym.Env[Any, Any]):
    """Its task ends after seven steps."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = spaces.Box(0.0, 1.0, (1,))
    action_space = spaces.MultiDiscrete([2, 3])

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode, self.steps = render_mode, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return np.zeros(1, np.float32), 1.0, self.steps == 7, False, {}

    def render(self) -> NDArray[np.uint8]:
        return np.full((16, 16, 3), self.steps, np.uint8)


gym.register("Seven-v0", Seven, max_episode_steps=500)


def test_episodes_shorter_than_a_chunk_are_learned_from(tmp_path: Path) -> None:
    """Waiting for one that fills a chunk would never end."""
    words = [*SMALL, "env=gym", "env.name=Seven-v0", "env.num_envs=1"]
    words += ["finetune.chunk_length=16", "finetune.prefill=20", "finetune.initial_updates=2"]
    collector = run(tmp_path, 4, *words)
    # 20 steps of prefill, 2 after updates, and the third episode had to begin with a reset.
    replay = collector.replay
    assert (replay.episodes, replay.longest) == (3, 8)
    assert collector.finished[0] == (7.0, 7, None)
    sample = replay.sample(np.random.default_rng(0), 8, 16)
    np.testing.assert_array_equal(sample["is_terminal"], sample["obs"][..., 0, 0, 0] == 7)


def test_the_prefill_tells_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    @contextmanager
    def waiting(what: Callable[[], str]) -> Iterator[None]:
        said.append(what())
        yield
        said.append(what())

    monkeypatch.setattr("callbacks.collect.waiting", waiting)
    run(tmp_path, 1, *SMALL, "finetune.prefill=20", "finetune.initial_updates=1")
    assert said == [
        "random experience: 0 of 20 agent steps, and for the first episode to end",
        "random experience: 25 of 20 agent steps",
    ]
