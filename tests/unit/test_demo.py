"""Demo videos: they move, they are the same every time, and a call never does work twice."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mapo_lightning.config.compose import compose
from mapo_lightning.data.video import probe_video, read_frames
from mapo_lightning.envs.demo import default_scenes, render_demo_videos
from mapo_lightning.envs.filming import SmoothActions, film
from mapo_lightning.envs.settings import EnvConfig
from mapo_lightning.run.config import RunConfig, conf_folder
from mapo_lightning.run.stages import render_demo
from mapo_lightning.types import ConfigError, EnvironmentSetupError

pytestmark = pytest.mark.slow

TOY = [EnvConfig(kind="toy", name="disc_anywhere")]


def render(root: Path, **change: object) -> list[Path]:
    settings = {"clips_per_scene": 2, "frames": 12, "size": 64, "processes": 1} | change
    return render_demo_videos(root, settings.pop("scenes", TOY), **settings)  # type: ignore[arg-type]


def written(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in root.glob("*.mp4")}


def test_the_videos_are_readable_and_as_long_and_large_as_asked(tmp_path: Path) -> None:
    paths = render(tmp_path)
    assert [path.name for path in paths] == [
        "toy_disc_anywhere_00.mp4",
        "toy_disc_anywhere_01.mp4",
    ]
    info = probe_video(paths[0])
    assert (info.frames, info.height, info.width, round(info.fps)) == (12, 64, 64, 25)
    decoded = read_frames(paths[0], range(12), 64).astype(int)
    filmed = film(TOY[0], 0, 12, 64, 25, seed=0).frames
    assert np.abs(decoded - filmed).mean() < 12.0, "what was filmed is what is read"


def test_half_the_frames_per_second_show_every_second_frame(tmp_path: Path) -> None:
    (fast, slow) = (film(TOY[0], 0, n, 64, fps, seed=0).frames for n, fps in ((11, 10), (6, 5)))
    np.testing.assert_array_equal(slow, fast[::2])
    cfg = compose(["env=toy", "demo.fps=5", f"data.root={tmp_path}"], RunConfig, conf_folder())
    cfg.config.demo.clips_per_scene, cfg.config.demo.frames = 1, 12
    render_demo(cfg.config)
    (path,) = tmp_path.glob("*.mp4")
    assert round(probe_video(path).fps) == 5


def test_a_second_call_renders_nothing_and_reports_all_as_done(tmp_path: Path) -> None:
    first = render(tmp_path)
    before = written(tmp_path)
    reports: list[tuple[int, int]] = []
    assert render(tmp_path, progress=lambda done, total: reports.append((done, total))) == first
    assert written(tmp_path) == before
    assert reports == [(2, 2)]


def test_a_missing_film_alone_is_rendered_again(tmp_path: Path) -> None:
    first, second = render(tmp_path)
    content = first.read_bytes()
    before = written(tmp_path)
    first.unlink()
    reports: list[tuple[int, int]] = []
    render(tmp_path, progress=lambda done, total: reports.append((done, total)))
    assert reports == [(1, 2), (2, 2)]
    assert first.read_bytes() == content
    assert written(tmp_path)[second.name] == before[second.name]


def test_other_settings_replace_our_films_and_leave_those_of_others(tmp_path: Path) -> None:
    render(tmp_path)
    (tmp_path / "holiday.mp4").write_bytes(b"mine")
    (path,) = render(tmp_path, clips_per_scene=1, frames=9)
    assert sorted(written(tmp_path)) == ["holiday.mp4", "toy_disc_anywhere_00.mp4"]
    assert probe_video(path).frames == 9
    videos = [json.loads(x)["video"] for x in (tmp_path / "truth.jsonl").read_text().splitlines()]
    assert videos == [path.name]


@pytest.mark.parametrize("content", ["{broken", "[1]", '{"../../secret": "x"}'])
def test_a_damaged_manifest_costs_time_and_nothing_else(tmp_path: Path, content: str) -> None:
    (tmp_path / "secret").write_text("kept")
    root = tmp_path / "a" / "b"
    render(root)
    (root / "manifest.json").write_text(content)
    assert len(render(root)) == 2
    assert len(json.loads((root / "manifest.json").read_text())) == 2
    assert (tmp_path / "secret").read_text() == "kept"


def test_no_unfinished_file_is_left(tmp_path: Path) -> None:
    render(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *written(tmp_path),
        ".lock",
        "manifest.json",
        "truth.jsonl",
    }


def test_two_callers_at_once_render_every_film_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        seen: list[list[tuple[int, int]]] = [[], []]
        calls = [pool.submit(render, tmp_path, progress=lambda *n, s=s: s.append(n)) for s in seen]
        first, second = (call.result() for call in calls)
    assert first == second
    made = sorted(len(counts) - 1 for counts in seen)
    assert made == [0, len(first)]


def test_the_truth_says_where_the_disc_is_seen() -> None:
    filmed = film(TOY[0], 1, 20, 64, 25, seed=3)
    assert set(filmed.paths) == {"disc"}, "the pad does not move"
    for image, (right, down) in zip(filmed.frames, filmed.paths["disc"], strict=True):
        assert image[min(down, 63), min(right, 63), 0] > 200


SCENES = [
    EnvConfig(kind="dmc", name="walker_run"),
    EnvConfig(kind="dmc", name="cartpole_swingup"),
    EnvConfig(kind="metaworld", name="drawer-close"),
    EnvConfig(kind="toy", name="disc"),
]


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_films_move_differ_and_repeat(scene: EnvConfig) -> None:
    one, again, other = (film(scene, clip, 30, 64, 25, seed=0) for clip in (0, 0, 1))
    np.testing.assert_array_equal(one.frames, again.frames)
    assert np.abs(one.frames[0].astype(int) - other.frames[0]).mean() > 2.0, "clips look different"
    for filmed in (one, other):
        change = np.abs(np.diff(filmed.frames.astype(int), axis=0)).max(axis=(1, 2, 3))
        assert np.mean(change > 20) > 0.9, "something moves in nearly every frame"
        assert filmed.paths


@pytest.mark.parametrize(("scenery", "alike"), [(0, []), (1, [(0, 1), (1, 2)]), (2, [(0, 2)])])
def test_scenery_says_how_many_colourings_take_turns(
    scenery: int, alike: list[tuple[int, int]]
) -> None:
    scene = EnvConfig(kind="dmc", name="cartpole_swingup")
    films = [film(scene, clip, 1, 64, 25, 0, scenery).frames[0] for clip in range(3)]
    corners = [frame[:8, :8].astype(int) for frame in films]  # the sky: no cart gets there
    for one, other in ((0, 1), (1, 2), (0, 2)):
        apart = np.abs(corners[one] - corners[other]).max()
        assert (apart == 0) == ((one, other) in alike or scenery == 1), (one, other, apart)


def test_two_processes_render_what_one_renders(tmp_path: Path) -> None:
    scenes = [EnvConfig(kind="dmc", name="reacher_easy"), *TOY]
    alone = render(tmp_path / "one", scenes=scenes, clips_per_scene=1)
    together = render(tmp_path / "two", scenes=scenes, clips_per_scene=1, processes=2)
    assert [p.read_bytes() for p in alone] == [p.read_bytes() for p in together]


def test_smooth_actions_are_smooth_and_use_their_range() -> None:
    actions = SmoothActions(3, np.random.default_rng(0), (0.25, 1.2))
    path = np.array([actions.at(t) for t in np.arange(0.0, 20.0, 0.02)])
    assert np.abs(path).max() <= 1.0
    assert np.abs(np.diff(path, axis=0)).max() < 0.5
    assert (path.std(axis=0) > 0.3).all()
    assert (np.abs(path.mean(axis=0)) < 0.15).all()


def test_the_default_corpus_has_at_least_thirty_films_of_all_suites() -> None:
    scenes = default_scenes()
    assert {scene.kind for scene in scenes} == {"dmc", "metaworld", "toy"}
    assert 3 * len(scenes) >= 30


def test_an_unknown_scene_is_refused_and_leaves_what_was_there(tmp_path: Path) -> None:
    render(tmp_path)
    with pytest.raises(EnvironmentSetupError, match="toy has no task 'disk'"):
        render(tmp_path, scenes=[*TOY, EnvConfig(kind="toy", name="disk")])
    assert len(written(tmp_path)) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("clips_per_scene", 0), ("frames", 0), ("fps", 0), ("processes", 0), ("size", 63)],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be .*got {value}"):
        render(tmp_path, **{name: value})
