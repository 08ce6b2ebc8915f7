"""From configuration to objects."""

from __future__ import annotations

from pathlib import Path

from mapo_lightning.config.compose import compose
from mapo_lightning.run.build import build_collection, labelled_env
from mapo_lightning.run.config import RunConfig

CONF = Path(__file__).parents[2] / "conf"


def test_the_describer_gets_pictures_of_the_size_it_wants(tmp_path: Path) -> None:
    words = ["env=toy", "vlm.collect.size=96", f"work_dir={tmp_path}/work"]
    cfg = compose(words, RunConfig, CONF).config
    assert labelled_env(cfg).label_size == 96
    stage = build_collection(cfg, tmp_path / "replay", rank=0)
    spaces = stage.collector.envs.single_observation_space
    assert {name: space.shape for name, space in spaces.items()} == {  # type: ignore[attr-defined]
        "image": (cfg.env.size, cfg.env.size, 3),
        "label_image": (96, 96, 3),
    }
    stage.collector.envs.close()


def test_every_rank_plays_its_own_episodes(tmp_path: Path) -> None:
    cfg = compose(["env=toy", f"work_dir={tmp_path}/work"], RunConfig, CONF).config
    first, second = (build_collection(cfg, tmp_path / "replay", rank) for rank in (0, 1))
    assert not set(first.collector.first_seeds) & set(second.collector.first_seeds)
    a, b = (x.collector.envs.reset(seed=x.collector.first_seeds)[0] for x in (first, second))
    assert (a["image"] != b["image"]).any()
    for stage in (first, second):
        stage.collector.envs.close()
