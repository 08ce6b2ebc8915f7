"""The preset of the learning study changes nothing but where its runs are recorded."""

from __future__ import annotations

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
