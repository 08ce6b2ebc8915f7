"""Settings of environments and of the demo's videos."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional, Union

from mapo_lightning.types import ConfigError, check_at_least

SUITE_REPEAT = {"toy": 1, "dmc": 2, "metaworld": 1, "gym": 1}
"""Action repeat of each suite in the published experiments (facts 6.1)."""


SUITE_FRAMES = {"toy": 50, "dmc": 1000, "metaworld": 500}
"""Environment frames after which the suite itself ends an episode."""


@dataclass
class EnvConfig:
    """Which task to act in, its camera and its time step (O31, O32)."""

    kind: Literal["toy", "dmc", "metaworld", "gym"] = "toy"
    """Suite: ``toy`` needs numpy alone, ``dmc`` and ``metaworld`` are MuJoCo, ``gym`` is any
    registered Gymnasium id that renders as ``rgb_array``."""
    name: str = "disc"
    """Task: ``disc`` or ``disc_anywhere`` (toy), ``walker_run`` as domain_task (dmc),
    ``door-open`` (metaworld), a Gymnasium id (gym)."""
    camera: Optional[Union[int, str]] = None  # noqa: UP007, UP045 (read by OmegaConf)
    """Camera id or name; null: 0 (2 for quadruped) in dmc, ``corner`` in metaworld."""
    action_repeat: Optional[int] = None  # noqa: UP045
    """Environment frames per agent step; null: the suite's, 2 in dmc and 1 elsewhere."""
    size: int = 64
    """Height and width of the observed image, in pixels."""
    label_size: Optional[int] = None  # noqa: UP045
    """Height and width in pixels of a second image for the describer; null: none."""
    render_quality: Literal["full", "fast"] = "fast"
    """``full``: as the suite draws; ``fast``: no shadows, reflections and multisampling. Videos
    and observations of one experiment should use the same."""
    time_limit: Optional[int] = None  # noqa: UP045
    """Longest episode, in agent steps; null: the suite's (500 in dmc at repeat 2 and in
    metaworld, 50 in toy, the registered one in gym). May shorten a suite's, not lengthen it."""
    num_envs: int = 1
    """Environments that act side by side, each in its own process if it renders with OpenGL."""
    deaths_per_hour: int = 10
    """Processes of environments that may die, and are replaced, within an hour; one more stops the
    run."""

    def __post_init__(self) -> None:
        if self.kind not in SUITE_REPEAT:
            raise ConfigError(f"kind must be one of {', '.join(SUITE_REPEAT)}, got '{self.kind}'")
        check_at_least(self, action_repeat=1, label_size=1, time_limit=1, size=1, num_envs=1)
        if self.deaths_per_hour < 0:
            raise ConfigError(f"deaths_per_hour must not be negative, got {self.deaths_per_hour}")
        if self.render_quality not in ("full", "fast"):
            raise ConfigError(f"render_quality must be full or fast, got '{self.render_quality}'")
        frames = SUITE_FRAMES.get(self.kind)
        if frames and self.time_limit and (self.time_limit - 1) * self.frames_per_step >= frames:
            raise ConfigError(
                f"time_limit must fit the {frames} frames of an episode of {self.kind}, "
                f"got {self.time_limit} agent steps of {self.frames_per_step} frames"
            )

    @property
    def frames_per_step(self) -> int:
        """Environment frames per agent step: ``action_repeat``, or what the suite uses."""
        return self.action_repeat or SUITE_REPEAT[self.kind]

    @property
    def fps(self) -> int:
        """Frames per second of an episode's video, one frame per agent step."""
        return max(5, 50 // self.frames_per_step)


@dataclass
class DemoConfig:
    """Videos that ``data=demo`` and ``data=metaworld_experts`` render once, without actions."""

    scenes: list[str] = field(default_factory=list)
    """Scenes as kind/name, for example dmc/walker_run, metaworld/door-open, toy/disc. Empty: a few
    of each suite; with data=metaworld_experts, all of its 50 tasks."""
    clips_per_scene: int = 4
    """Videos per scene."""
    frames: int = 75
    """Frames per video."""
    fps: int = 25
    """Frames per second of simulated time: fewer show more motion from one frame to the next. A
    simulator that is slower, such as the toy with its 10, gives what it has."""
    size: int = 256
    """Height and width of the videos, in pixels."""
    scenery: int = 0
    """Colourings of a scene that its videos take in turn: 1 keeps the simulator's own colours, and
    motion is learned sooner; 0 gives every video its own. The toy's floors always differ."""
    noise: float = 0.15
    """How far smooth random motion moves the actions of Meta-World's experts away, in [0, 1]; an
    action lies in [-1, 1]."""

    def __post_init__(self) -> None:
        check_at_least(self, clips_per_scene=1, frames=1, fps=1)
        if self.scenery < 0:
            raise ConfigError(f"scenery must not be negative, got {self.scenery}")
        if not 0.0 <= self.noise <= 1.0:
            raise ConfigError(f"noise must lie in [0, 1], got {self.noise}")
        if self.size < 64 or self.size % 2:
            raise ConfigError(f"size must be even and at least 64 pixels, got {self.size}")
