"""Meta-World's experts as a data set: every task has one and a sentence; films, truth, captions."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from mapo_lightning.config.compose import compose
from mapo_lightning.data.clips import ClipDataset
from mapo_lightning.data.listing import list_experts
from mapo_lightning.data.scan import scan_videos
from mapo_lightning.data.settings import VideoDataConfig
from mapo_lightning.envs.demo import render_demo_videos
from mapo_lightning.envs.experts import SENTENCES, expert_scenes
from mapo_lightning.envs.filming import film, rehearse
from mapo_lightning.envs.metaworld import MetaWorldTask, scripted_expert
from mapo_lightning.envs.settings import EnvConfig
from mapo_lightning.run import build
from mapo_lightning.run.config import RunConfig, conf_folder
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.semantics.templates import read_caption
from mapo_lightning.types import ConfigError

DOOR = EnvConfig(kind="metaworld", name="door-open")


def test_every_task_has_an_expert_and_a_sentence_of_its_own() -> None:
    for name in SENTENCES:
        assert callable(scripted_expert(name).get_action)
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert {f"{name}-v3" for name in SENTENCES} == set(ALL_V3_ENVIRONMENTS)
    assert len(SENTENCES) == len(set(SENTENCES.values())) == 50


@pytest.mark.parametrize("name", SENTENCES)
def test_every_sentence_says_who_does_what_to_which_thing(name: str) -> None:
    phrase = read_caption(SENTENCES[name])
    assert phrase is not None
    assert phrase.body == "A robot arm"
    assert phrase.action
    assert phrase.target.split()[0] in ("a", "the")
    # Left, right and depth depend on the camera.
    assert phrase.direction in ("", "up", "down")


def test_experts_are_filmed_as_the_agent_sees_the_task() -> None:
    plain = expert_scenes([], EnvConfig(kind="dmc", name="walker_run", camera=1, action_repeat=4))
    assert [scene.name for scene in plain] == list(SENTENCES)
    assert {(scene.camera, scene.action_repeat) for scene in plain} == {("corner", None)}
    env = EnvConfig(kind="metaworld", name="reach", camera="topview", render_quality="full")
    (scene,) = expert_scenes(["metaworld/door-open-v3"], env)
    assert (scene.name, scene.camera, scene.render_quality) == ("door-open", "topview", "full")
    for wrong in ("dmc/walker_run", "metaworld/door-opne", "door-open"):
        with pytest.raises(ConfigError, match=f"must hold metaworld/TASK .*got '{wrong}'"):
            expert_scenes([wrong], env)


def cfg(*words: str) -> RunConfig:
    return compose(["data=metaworld_experts", *words], RunConfig, conf_folder()).config


@pytest.mark.slow
def test_the_task_of_fine_tuning_is_left_out_unless_told_otherwise() -> None:
    door = ["env=metaworld", "env.name=door-open"]
    assert build.left_out(cfg(*door)) == ["door-open"]
    assert build.left_out(cfg("env=metaworld", "env.name=door-open-v3")) == ["door-open"]
    assert build.build_videos(cfg(*door)).data.leave_out == ["door-open"]
    assert build.left_out(cfg(*door, "data.leave_out=[door-close,door-open]")) == [
        "door-close",
        "door-open",
    ]
    assert build.left_out(cfg(*door, "data.leave_out=[]")) == []
    assert build.left_out(cfg("env=dmc/walker_run")) == []
    assert build.left_out(cfg(*door, "demo.scenes=[metaworld/reach]")) == []
    demo = compose(["data=demo", *door], RunConfig, conf_folder()).config
    assert build.left_out(demo) is None


@pytest.mark.slow
def test_an_expert_that_is_told_the_goal_reaches_it() -> None:
    task = MetaWorldTask("reach")
    try:
        task.reset(3)
        assert task.state[-3:] == pytest.approx(task._env._get_pos_goal())
        assert any(task.state[-3:])
    finally:
        task.close()
    assert all(
        rehearse(EnvConfig(kind="metaworld", name="reach"), clip, 60, 25, 0) for clip in (0, 1)
    )


@pytest.mark.slow
def test_a_rehearsal_plays_what_is_filmed() -> None:
    solved = rehearse(DOOR, 0, 40, 25, seed=0, noise=0.05)
    assert solved is not None
    assert 10 < solved < 40
    assert film(DOOR, 0, 40, 64, 25, seed=0, noise=0.05).success == solved
    assert rehearse(DOOR, 0, solved, 25, seed=0, noise=0.05) is None  # cut a frame before


@pytest.mark.slow
def test_two_experts_are_filmed_captioned_and_one_of_them_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "films"
    scenes = expert_scenes(["metaworld/door-open", "metaworld/bin-picking"], DOOR)
    settings = {"clips_per_scene": 1, "frames": 30, "size": 64, "noise": 0.05, "processes": 1}
    render_demo_videos(root, scenes, sentences=SENTENCES, **settings)  # type: ignore[arg-type]
    truth = [json.loads(line) for line in (root / "truth.jsonl").read_text().splitlines()]
    by_task = {row["task"]: row for row in truth}
    assert by_task["door-open"]["success"] is True
    assert by_task["bin-picking"]["success"] is False  # 30 frames are too short for it
    assert by_task["bin-picking"]["solved_at"] is None
    (said,) = [json.loads(line) for line in (root / "captions.jsonl").read_text().splitlines()]
    last = by_task["door-open"]["solved_at"]
    assert said == {
        "video": "metaworld_door-open_camera-corner_00.mp4",
        "first_frame": 0,
        "last_frame": last,
        "text": SENTENCES["door-open"],
    }
    before = (root / "captions.jsonl").read_bytes()
    render_demo_videos(root, scenes, sentences=SENTENCES, **settings)  # type: ignore[arg-type]
    assert (root / "captions.jsonl").read_bytes() == before

    data = VideoDataConfig(kind="metaworld_experts", root=str(root), workers=0, holdout=0.0)
    with caplog.at_level(logging.INFO):
        index = scan_videos(data, tmp_path / "c", "")
    assert {video.label for video in index.videos} == {"door-open", "bin-picking"}
    assert "1 sentences about 1 of 2 videos" in caplog.text
    clips = ClipDataset(index.videos, data, VlmConfig(kind="templates"), tmp_path)
    number = [video.label for video in index.videos].index("door-open")
    (first,) = clips.labeler.label(clips.window_requests(number, [3]))
    assert first.phrase is not None
    assert (first.phrase.action, first.phrase.target) == ("opens", "a door")

    data.leave_out = ["door-open"]
    assert [v.label for v in scan_videos(data, tmp_path / "c").videos] == ["bin-picking"]
    data.leave_out = ["door-open", "bin-picking"]
    with pytest.raises(ConfigError, match="leaves none of the 2 videos"):
        scan_videos(data, tmp_path / "c")
    data.leave_out = ["dor-open"]
    with pytest.raises(ConfigError, match=r"data\.leave_out holds 'dor-open'.*mean 'door-open'"):
        scan_videos(data, tmp_path / "c")
    (root / "holiday.mp4").write_bytes(b"mine")
    assert list_experts(root).unlisted == ["holiday.mp4"]
