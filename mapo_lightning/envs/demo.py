"""The demo's videos, rendered on this machine instead of shipped or downloaded.

A few dozen short videos of the kind that pre-training reads: pixels, without actions or rewards.
``truth.jsonl`` beside them says where the moving parts are seen and whether an expert solved its
task; it is used to judge labels, and training never reads it. ``captions.jsonl`` holds a sentence
about each video in which an expert solves its task, if there is one for that task.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from mapo_lightning.data.video import write_mp4
from mapo_lightning.envs.factory import light_start, needs_gl
from mapo_lightning.envs.filming import NOISE, film
from mapo_lightning.envs.gl import prepare_gl
from mapo_lightning.envs.settings import EnvConfig
from mapo_lightning.files import FileLock, atomic_write
from mapo_lightning.types import ConfigError, VideoError
from mapo_lightning.waiting import waiting

log = logging.getLogger(__name__)

VERSION = 2
"""Increased when the same settings would give other videos."""

_VERSIONS = {"metaworld": 3}  # suites whose videos have changed since then
_MANIFEST, _TRUTH, _CAPTIONS = "manifest.json", "truth.jsonl", "captions.jsonl"


def default_scenes() -> list[EnvConfig]:
    """Eight DMC tasks, four of Meta-World and the toy."""
    dmc = (
        "cheetah_run",
        "walker_run",
        "hopper_hop",
        "quadruped_run",
        "cartpole_swingup",
        "reacher_easy",
        "finger_spin",
        "ball_in_cup_catch",
    )
    metaworld = ("door-open", "drawer-close", "lever-pull", "dial-turn")
    return [
        *(EnvConfig(kind="dmc", name=name) for name in dmc),
        *(EnvConfig(kind="metaworld", name=name) for name in metaworld),
        EnvConfig(kind="toy", name="disc_anywhere"),
    ]


def render_demo_videos(
    root: Path,
    scenes: Sequence[EnvConfig] | None = None,
    *,
    clips_per_scene: int = 3,
    frames: int = 75,
    size: int = 256,
    fps: int = 25,
    seed: int = 0,
    scenery: int = 0,
    noise: float = NOISE,
    sentences: Mapping[str, str] | None = None,
    processes: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Render videos into a folder, unless they are there already.

    A killed call loses only the videos in progress. Videos of a call with other settings are
    removed; files of others are left alone. Of several processes, one renders and others wait.

    Args:
        root: Folder, made if missing.
        scenes: What to film; None or empty: `default_scenes`.
        clips_per_scene: Videos of each scene; they differ in start, motion, camera and colours.
        frames: Length of a video.
        size: Height and width, in pixels; even.
        fps: Frames per second.
        seed: Of everything random; the same seed gives the same pixels.
        scenery: Colourings of each scene that its videos take in turn; 0: each has its own.
        noise: See `filming.NOISE`.
        sentences: Name of a task -> what its expert does, for ``captions.jsonl``.
        processes: Processes that render; 1 renders in this one.
        progress: Called with (videos done, videos in all), also at the start.

    Returns:
        The videos, ordered by scene and clip.

    Raises:
        ConfigError: A number is out of range.
        EnvironmentSetupError: A scene cannot be built or rendered.
        VideoError: The folder cannot be written.
    """
    _check(clips_per_scene, frames, size, fps, processes)
    jobs = [
        _Job(Path(root), scene, clip, frames, size, fps, seed, scenery, noise)
        for scene, clip in product(scenes or default_scenes(), range(clips_per_scene))
    ]
    with _locked(Path(root)):
        _render_missing(_Manifest(Path(root), sentences or {}), jobs, processes, progress)
    return [job.path for job in jobs]


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Let one process at a time render into a folder: the ranks of a job begin together."""
    lock = FileLock(root / ".lock")
    try:
        lock.acquire()
    except OSError as error:
        raise VideoError(f"cannot make the folder '{root}': {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def _render_missing(
    done: _Manifest,
    jobs: Sequence[_Job],
    processes: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    done.keep_only({job.name: job.fingerprint for job in jobs})
    todo = [job for job in jobs if job.name not in done.videos]
    if any(needs_gl(job.scene) for job in todo):
        prepare_gl()  # here, so that workers inherit the choice and an error is raised once
    if progress is not None:
        progress(len(jobs) - len(todo), len(jobs))
    for job, seen in _run(todo, min(processes, len(todo))):
        done.add(job, seen)
        if progress is not None:
            progress(len(done.videos), len(jobs))


class _Job(NamedTuple):
    """One video to be rendered; picklable."""

    root: Path
    scene: EnvConfig
    clip: int
    frames: int
    size: int
    fps: int
    seed: int
    scenery: int
    noise: float

    @property
    def name(self) -> str:
        # A scene may be listed twice, from two cameras.
        view = "" if self.scene.camera is None else f"_camera-{self.scene.camera}"
        task = "".join(c if c.isalnum() or c in "-_" else "-" for c in self.scene.name)
        return f"{self.scene.kind}_{task}{view}_{self.clip:02d}.mp4"

    @property
    def path(self) -> Path:
        return self.root / self.name

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the video depends on."""
        version = _VERSIONS.get(self.scene.kind, VERSION)
        settings = [version, asdict(self.scene), *self[2:-1]]
        if self.noise != NOISE:
            settings.append(self.noise)
        return hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()


def _render(job: _Job) -> dict[str, Any]:
    """Render one video; returns the truth about it."""
    clip = film(job.scene, *job[2:])
    _replace(job.path, write_mp4(None, clip.frames, job.fps))
    truth: dict[str, Any] = {"video": job.name, "size": job.size, "paths": clip.paths}
    if job.scene.kind == "metaworld":
        task = job.scene.name.removesuffix("-v3")
        truth |= {"task": task, "success": clip.success is not None, "solved_at": clip.success}
    return truth


def _run(jobs: Sequence[_Job], processes: int) -> Iterator[tuple[_Job, Any]]:
    if processes <= 1:
        yield from ((job, _render(job)) for job in jobs)
        return
    # spawn: if the parent has rendered, a forked child hangs at its first frame (EGL and OSMesa).
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        with light_start():
            running = {pool.submit(_render, job): job for job in jobs}
        completed = as_completed(running)
        try:
            for left in range(len(running), 0, -1):
                with waiting(f"the next of {left} videos to be rendered"):
                    future = next(completed)
                yield running[future], future.result()
        finally:  # after an error, do not render the rest
            pool.shutdown(wait=True, cancel_futures=True)


class _Manifest:
    """What the folder holds: ``manifest.json``, ``truth.jsonl`` and ``captions.jsonl``."""

    def __init__(self, root: Path, sentences: Mapping[str, str]) -> None:
        self._root, self._sentences = root, sentences
        self.videos: dict[str, str] = {}
        """Name of a complete video -> fingerprint of its settings."""
        try:
            self.videos = {str(k): str(v) for k, v in json.loads(self._read(_MANIFEST)).items()}
        except (ValueError, AttributeError):
            log.warning("'%s' is damaged: the videos are rendered again", root / _MANIFEST)

    def keep_only(self, wanted: dict[str, str]) -> None:
        """Drop videos that are missing, and delete those that were made with other settings."""
        for name, fingerprint in list(self.videos.items()):
            path = self._root / Path(name).name  # a manifest must not reach outside the folder
            if wanted.get(name) != fingerprint:
                path.unlink(missing_ok=True)
            if not path.is_file():
                del self.videos[name]
        lines = self._read(_TRUTH, "").splitlines()
        kept = [line for line in lines if _video_of(line) in self.videos]
        _replace(self._root / _TRUTH, "".join(f"{line}\n" for line in kept).encode())
        if self._sentences:
            captions = "".join(self._caption(json.loads(line)) for line in kept)
            _replace(self._root / _CAPTIONS, captions.encode())
        self._write_manifest()

    def add(self, job: _Job, truth: dict[str, Any]) -> None:
        """Add a complete video."""
        with (self._root / _TRUTH).open("a") as file:
            file.write(json.dumps(truth) + "\n")
        if caption := self._caption(truth):
            with (self._root / _CAPTIONS).open("a") as file:
                file.write(caption)
        self.videos[job.name] = job.fingerprint
        self._write_manifest()

    def _caption(self, truth: Mapping[str, Any]) -> str:
        """Line of a solved task's sentence, which holds until then: the rest is random motion."""
        text = self._sentences.get(truth.get("task", ""))
        if text is None or truth["solved_at"] is None:
            return ""
        frames = {"first_frame": 0, "last_frame": truth["solved_at"]}
        return json.dumps({"video": truth["video"], **frames, "text": text}) + "\n"

    def _write_manifest(self) -> None:
        text = json.dumps(self.videos, indent=1, sort_keys=True)
        _replace(self._root / _MANIFEST, text.encode())

    def _read(self, name: str, missing: str = "{}") -> str:
        path = self._root / name
        return path.read_text() if path.exists() else missing


def _video_of(line: str) -> str | None:
    try:
        return str(json.loads(line)["video"])
    except (ValueError, KeyError, TypeError):
        return None


def _replace(path: Path, content: bytes) -> None:
    try:
        with atomic_write(path) as draft:
            draft.write_bytes(content)
    except OSError as error:
        raise VideoError(f"cannot write '{path}': {error.strerror}") from error


def _check(clips: int, frames: int, size: int, fps: int, processes: int) -> None:
    for name, value in (
        ("clips_per_scene", clips),
        ("frames", frames),
        ("fps", fps),
        ("processes", processes),
    ):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if size < 16 or size % 2:
        raise ConfigError(f"size must be even and at least 16 pixels, got {size}")
