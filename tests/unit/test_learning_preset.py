"""The preset of the learning study changes nothing but where its runs are recorded."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mapo_lightning.config.compose import compose
from mapo_lightning.run.config import RunConfig, conf_folder


@pytest.mark.parametrize(
    ("preset", "env"),
    [
        ("toy", "toy"),
        ("demo", "demo"),
        ("cheetah_run", "dmc/cheetah_run"),
        ("cartpole_swingup", "dmc/cartpole_swingup"),
    ],
)
@pytest.mark.parametrize("method", ["mapo", "apv", "dreamerv2"])
def test_the_preset_has_the_settings_that_are_shipped(preset: str, env: str, method: str) -> None:
    words = [f"method={method}", "seed=3"]
    given = compose([f"experiment=learning/{preset}", *words], RunConfig, conf_folder()).flat
    shipped = compose([f"env={env}", *words], RunConfig, conf_folder()).flat
    differ = {key: value for key, value in given.items() if value != shipped[key]}
    assert differ == {"tracking.experiment": "learning"}


def test_the_door_has_the_settings_of_its_protocol() -> None:
    """docs/protocols/learning.md, third study."""
    cfg = compose(["experiment=learning/door"], RunConfig, conf_folder()).config
    demo = compose(["env=demo"], RunConfig, conf_folder()).config
    suite = ["env=metaworld/door-open", f"finetune.chunk_length={demo.finetune.chunk_length}"]
    usual = compose(suite, RunConfig, conf_folder()).config
    assert cfg.data.kind == "metaworld_experts"
    assert (cfg.demo.clips_per_scene, cfg.pretrain.updates) == (4, 1500)
    assert cfg.env == replace(usual.env, action_repeat=2, time_limit=100, num_envs=2)
    assert cfg.agent == demo.agent
    assert cfg.world_model == usual.world_model  # with the suite's bonus
    tuned = replace(demo.finetune, agent_steps=10_000, train_every=3, hold_lower=100)
    assert cfg.finetune == tuned
    assert cfg.evaluate == replace(demo.evaluate, every=500, first=0)
