"""A trained agent outside the trainer: frames in, actions out."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mapo_lightning.config.compose import compose
from mapo_lightning.envs.live_labels import LiveLabeler
from mapo_lightning.models.interfaces import Belief, WorldModel
from mapo_lightning.run.build import acting_vlm, build_live_labeler, load_finetuned
from mapo_lightning.run.config import RunConfig, conf_folder
from mapo_lightning.run.from_checkpoint import agent_settings
from mapo_lightning.run.renamed import RENAMED
from mapo_lightning.semantics.factory import log_servers
from mapo_lightning.training.acting import ActingPolicy, acting
from mapo_lightning.training.finetune import FinetuneModule
from mapo_lightning.types import ConfigError, MapoError

Arrays = dict[str, NDArray[Any]]


class ObservationError(MapoError):
    """What the agent was shown is not what it was trained on."""


class Mark(NamedTuple):
    """What an agent remembers at one moment."""

    policy: ActingPolicy
    random: dict[str, torch.Tensor]
    batch: int | None
    labels: dict[str, Any] | None


def load_agent(
    checkpoint: str | Path,
    device: str | torch.device = "cpu",
    describe: bool = True,
    words: Sequence[str] = (),
) -> Agent:
    """Load a trained agent; its method, sizes and describer come from the checkpoint.

    A checkpoint that somebody else has made chooses neither servers nor models nor folders; what it
    needs of them is asked for (docs/evaluate.md).

    Args:
        checkpoint: A fine-tuning checkpoint, such as ``runs/NAME/finetune/last.ckpt``.
        device: Where the networks run, such as ``cpu`` or ``cuda:0``.
        describe: Query the describer of the checkpoint's run about the frames as they come. If
            False, no describer is queried, and the agent acts as with ``vlm=none``.
        words: Settings that win over those of the checkpoint, as on the command line, such as
            ``["vlm.server.base_url=http://127.0.0.1:8000/v1"]``.

    Raises:
        CheckpointError: The file is no checkpoint of an agent, or does not fit its settings.
        ConfigError: There is no such device, the settings cannot be read, or they name what only
            the user may choose.
    """
    path, typed = Path(checkpoint), [*words, *([] if describe else ["vlm=none"])]
    cfg = compose(typed, RunConfig, conf_folder(), agent_settings(path, typed), RENAMED).config
    with torch.random.fork_rng(devices=[]):  # fresh weights are drawn before they are replaced
        module, metadata = load_finetuned(cfg, path)
    try:
        module.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"device='{device}' cannot be used ({reason}); try 'cpu'") from error
    cfg.vlm = acting_vlm(cfg)
    log_servers(cfg.vlm)
    return Agent(cfg, module.eval(), int(metadata["action_dim"]))


class Agent:
    """Acts greedily on the frames it is shown, one environment or N side by side.

    It remembers what it has seen since `reset`. Its random numbers are its own: the posteriors are
    sampled, as in evaluation, from a stream that ``reset(seed)`` starts.

    Attributes:
        cfg: The settings of the checkpoint's run.
        action_dim: Width A of an action.
    """

    def __init__(self, cfg: RunConfig, module: FinetuneModule, action_dim: int) -> None:
        self.cfg, self.action_dim = cfg, action_dim
        self._module = module
        self._labels = tempfile.TemporaryDirectory(prefix="mapo-labels-")
        # Labels of this process only: a program that acts has no shared store to write to.
        self._private = replace(cfg, work_dir=self._labels.name)
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Forget everything; the next `act` is the first of an episode.

        Args:
            seed: Of the agent's random numbers; None: ``evaluate.seed`` of its run. With the
                environment's reset seed here, one environment at a time, an episode goes as in
                ``stage=evaluate evaluate.num_envs=1``.
        """
        start = self.cfg.evaluate.seed if seed is None else seed
        device = self._device
        self._random = {"cpu": torch.Generator().manual_seed(start).get_state()}
        if device.type == "cuda":
            self._random["cuda"] = torch.Generator(device).manual_seed(start).get_state()
        self._policy = acting(self._module, explore=False)
        self._batch: int | None = None
        self._single = True
        self._labeler: LiveLabeler | None = None

    def act(
        self,
        obs: NDArray[np.uint8],
        label_obs: NDArray[np.uint8] | None = None,
        is_first: NDArray[np.bool_] | None = None,
    ) -> NDArray[np.float32]:
        """Take in the newest frame and answer with an action: `see`, then `choose`.

        Args:
            obs: RGB, (H, W, 3) uint8, or (N, H, W, 3) from N environments.
            label_obs: The same moment in the size that the describer was shown in training, where
                ``env.label_size`` or ``vlm.collect.size`` of the run ask for one of their own.
            is_first: (N,), for N environments: which of them have just begun an episode. None:
                all of them after `reset`, then none.

        Returns:
            (A,) or (N, A), in [-1, 1], as the wrapped environments of this package take them.

        Raises:
            ObservationError: A wrong type, shape or number of environments.
        """
        self.see(obs, label_obs, is_first)
        return self.choose()

    def see(
        self,
        obs: NDArray[np.uint8],
        label_obs: NDArray[np.uint8] | None = None,
        is_first: NDArray[np.bool_] | None = None,
    ) -> None:
        """Take in the newest frame; arguments and errors as of `act`."""
        single = np.ndim(obs) == 3
        frames = self._checked(obs, single, "obs", self.cfg.env.size)
        envs = len(frames)
        if self._batch is None:
            self._batch = envs
            self._labeler = build_live_labeler(self._private, envs, "agent")
            is_first = np.ones(envs, bool)
        if envs != self._batch:
            raise ObservationError(
                f"act() was given {envs} environments after {self._batch}; call reset() first"
            )
        first = np.zeros(envs, bool) if is_first is None else np.asarray(is_first, bool)
        if first.shape != (envs,):
            raise ObservationError(f"is_first must be ({envs},), got {first.shape}")
        shown = {"image": frames} | self._label_frames(label_obs, single)
        assert self._labeler is not None
        step = {"obs": frames, "is_first": first, **self._labeler.update(shown, first)}
        self._single = single
        with self._own_stream():
            self._policy.see(step)

    def choose(self) -> NDArray[np.float32]:
        """Answer to what was seen with an action, (A,) or (N, A) in [-1, 1]; it counts as done."""
        with self._own_stream():
            action = self._policy.choose()
        return action[0] if self._single else action

    def take(self, action: NDArray[np.float32]) -> None:
        """Note that this action, (A,) or (N, A), was done in place of one that `choose` gave."""
        self._policy.take(action[None] if self._single else action)

    @property
    def belief(self) -> Belief:
        """What is known after the newest frame, axes (N,).

        Raises:
            ObservationError: Nothing was seen yet.
        """
        if self._policy.belief is None:
            raise ObservationError("the agent has seen nothing yet: call act() or see() first")
        return self._policy.belief

    @property
    def world_model(self) -> WorldModel:
        """What it believes with."""
        return self._module.world_model

    def mark(self) -> Mark:
        """All that it remembers now, to come `back` to."""
        labels = None if self._labeler is None else self._labeler.state()
        return Mark(copy.copy(self._policy), dict(self._random), self._batch, labels)

    def back(self, mark: Mark) -> None:
        """Remember what it did at `mark`, of the same episodes, and nothing after it."""
        self._policy, self._random = copy.copy(mark.policy), dict(mark.random)
        self._batch = mark.batch
        if self._labeler is not None and mark.labels is not None:
            self._labeler.restore(mark.labels)

    def close(self) -> None:
        """Remove the labels kept for this agent."""
        self._labels.cleanup()

    def __enter__(self) -> Agent:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _device(self) -> torch.device:
        return next(self._module.parameters()).device

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """Draw from the agent's random numbers, and leave those of the program alone."""
        device = self._device
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.set_rng_state(self._random["cpu"])
            if cuda:
                torch.cuda.set_rng_state(self._random["cuda"], device)
            yield
            self._random["cpu"] = torch.get_rng_state()
            if cuda:
                self._random["cuda"] = torch.cuda.get_rng_state(device)

    def _label_frames(
        self, label_obs: NDArray[np.uint8] | None, single: bool
    ) -> dict[str, NDArray[np.uint8]]:
        """The describer's own view, if it has one."""
        size = self.cfg.vlm.collect.size or self.cfg.env.label_size
        if size is None or self.cfg.vlm.kind == "none":
            return {}
        if label_obs is None:
            raise ObservationError(
                f"this agent's describer was shown frames of {size} pixels: give them as "
                "label_obs=, or load the agent with describe=False"
            )
        frames = self._checked(label_obs, single, "label_obs", size)
        if len(frames) != self._batch:
            raise ObservationError(f"label_obs must hold {self._batch} frames, got {len(frames)}")
        return {"label_image": frames}

    def _checked(self, obs: Any, single: bool, name: str, size: int) -> NDArray[np.uint8]:
        """Frames (N, size, size, 3) uint8 as they are; nothing is cast or resized unasked."""
        shape = (size, size, 3) if single else ("N", size, size, 3)
        found = np.shape(obs)
        if not isinstance(obs, np.ndarray) or obs.dtype != np.uint8:
            kind = obs.dtype if isinstance(obs, np.ndarray) else type(obs).__name__
            raise ObservationError(f"{name} must be a numpy array of uint8 in [0, 255], got {kind}")
        if found[-3:] != (size, size, 3) or len(found) != len(shape) or not len(obs):
            wanted = f"({size}, {size}, 3) or (N, {size}, {size}, 3)"
            raise ObservationError(f"{name} must have the shape {wanted}, got {found}")
        return obs[None] if single else obs
