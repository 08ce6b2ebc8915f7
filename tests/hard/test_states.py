"""Every task of every suite is restored exactly: branches from one state in many orders."""

from __future__ import annotations

import pytest
from branch_orders import check_branch_orders

from mapo_lightning.envs.experts import SENTENCES
from mapo_lightning.envs.gl import prepare_gl
from mapo_lightning.envs.settings import EnvConfig

pytestmark = pytest.mark.hard

GYMNASIUM = (
    "Ant-v5", "HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "HumanoidStandup-v5",
    "InvertedDoublePendulum-v5", "InvertedPendulum-v5", "Pusher-v5", "Reacher-v5", "Swimmer-v5",
    "Walker2d-v5",
)  # fmt: skip


def test_every_task_of_dm_control() -> None:
    prepare_gl()  # before the first import of MuJoCo
    from dm_control import suite

    wrong = {}
    for domain, task in suite.ALL_TASKS:
        name = f"{domain}_{task}"
        try:
            compared = check_branch_orders(EnvConfig(kind="dmc", name=name))
            print(f"dmc/{name}: {compared} steps", flush=True)
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"
            print(f"dmc/{name}: {wrong[name]}", flush=True)
    assert not wrong


@pytest.mark.parametrize("name", SENTENCES)
def test_every_task_of_metaworld(name: str) -> None:
    assert check_branch_orders(EnvConfig(kind="metaworld", name=name)) > 0


@pytest.mark.parametrize("name", GYMNASIUM)
def test_every_mujoco_task_of_gymnasium(name: str) -> None:
    assert check_branch_orders(EnvConfig(kind="gym", name=name), lead=4, length=6) > 0
