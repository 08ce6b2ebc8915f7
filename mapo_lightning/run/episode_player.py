"""Plays the test episodes of a run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from types import TracebackType

import torch
from gymnasium.vector import AsyncVectorEnv, VectorEnv

from mapo_lightning.envs.episodes import Episode, Policy, run_episodes
from mapo_lightning.envs.factory import make_vector_env
from mapo_lightning.envs.replacement import (
    DeadEnvironmentError,
    Deaths,
    close_vector_env,
    end_processes,
    lost_processes,
)
from mapo_lightning.run import build
from mapo_lightning.run.config import RunConfig
from mapo_lightning.tracking.logger import is_main_process
from mapo_lightning.types import Frames
from mapo_lightning.waiting import counting


class EpisodePlayer(AbstractContextManager["EpisodePlayer"]):
    """Plays the evaluation's episodes: the same reset seeds whoever plays.

    Its environments are started for the first episodes and kept for the next ones, because starting
    their processes takes seconds; those of Gymnasium, which may remember, are started anew. What an
    episode does depends on its seed and on who plays alone.

    Args:
        cfg: The run.
        deaths: Counts processes that die; None: a count of its own.
    """

    def __init__(self, cfg: RunConfig, deaths: Deaths | None = None) -> None:
        self.cfg = replace(cfg, vlm=build.acting_vlm(cfg))
        self.deaths = deaths or Deaths(cfg.env.deaths_per_hour)
        self.seeds = cfg.evaluate.seeds
        """Reset seed of every episode."""
        self._envs: VectorEnv | None = None

    def __call__(
        self, policy_of: Callable[[int], Policy], film: int
    ) -> tuple[list[Episode], list[Frames]]:
        """Play every episode once, and leave the program's random numbers as they were.

        Where the process of an environment dies, all episodes are played again in new ones, with
        the same results.

        Args:
            policy_of: Makes the policy for a batch of episodes from its first reset seed.
            film: Number of episodes whose frames are returned.

        Raises:
            EnvironmentSetupError: Too many processes died.
        """
        cfg = self.cfg
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        show = cfg.callbacks.progress and is_main_process()
        while True:
            envs = self.start()
            try:
                with (
                    torch.random.fork_rng(devices=devices),
                    counting("test episodes", "episode", show=show, stays=False) as report,
                ):
                    labeler = build.build_live_labeler(cfg, envs.num_envs, "evaluate")
                    return run_episodes(envs, labeler, policy_of, self.seeds, film, report)
            except DeadEnvironmentError:
                self._envs = None
                self.deaths.add(lost_processes(envs))
            except BaseException:
                if isinstance(envs, AsyncVectorEnv):
                    end_processes(envs)  # in the middle of a step they could not be closed
                self.close()
                raise
            finally:
                if cfg.env.kind == "gym":  # other people's code may remember earlier episodes
                    self.close()

    def start(self) -> VectorEnv:
        """Start the environments, unless they are; playing does that too."""
        if self._envs is None:
            test = self.cfg.evaluate
            count = min(test.num_envs, test.episodes)
            self._envs = make_vector_env(build.labelled_env(self.cfg), test.seed, count)
        return self._envs

    def close(self) -> None:
        """End the environments; the next episodes would start new ones."""
        envs, self._envs = self._envs, None
        if envs is not None:
            close_vector_env(envs)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()
