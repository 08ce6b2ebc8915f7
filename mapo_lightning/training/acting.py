"""The agent in environments: beliefs in, actions out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mapo_lightning.envs.episodes import Policy
from mapo_lightning.models.agents.planner import Planner
from mapo_lightning.models.interfaces import Agent, Belief, WorldModel
from mapo_lightning.training.finetune import FinetuneModule
from mapo_lightning.types import Batch


class ActingPolicy:
    """The agent in an environment: keeps a belief per environment and acts on it.

    The belief is sampled, in evaluation too; only the action is the mode there (facts 2.4).

    Args:
        world_model: Trained model; used in evaluation mode, whatever mode it is in.
        agent: Trained agent.
        explore: Sample actions; otherwise take the policy's mode.
        planner: Chooses the actions in place of the agent; None: the agent does.
    """

    def __init__(
        self,
        world_model: WorldModel,
        agent: Agent,
        explore: bool,
        planner: Planner | None = None,
    ) -> None:
        self.world_model, self.agent, self.explore = world_model, agent, explore
        self.planner = planner
        self.belief: Belief | None = None
        self.action: Tensor | None = None
        self.plan: Tensor | None = None
        self._first: Tensor | None = None
        self._resumed: Any = None

    def state(self) -> dict[str, Any]:
        """Belief, last action and plan, as a checkpoint may hold them."""
        return {"belief": _plain(self.belief), "action": self.action, "plan": self.plan}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state` returned."""
        self._resumed = state["belief"]
        self.action = None if state["action"] is None else state["action"].to(self.device)
        plan = state.get("plan")  # checkpoints of earlier versions know of none
        self.plan = None if plan is None else plan.to(self.device)

    def __call__(self, step: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Take one step of N environments: `see`, then `choose`."""
        self.see(step)
        return self.choose()

    @torch.inference_mode()
    def see(self, step: dict[str, NDArray[Any]]) -> None:
        """Take in the newest frames of N environments.

        Args:
            step: ``obs`` (N, H, W, 3) uint8, ``is_first`` (N,) bool, ``semantic`` (N, V) float32,
                ``has_semantic`` (N,) bool, ``position`` (N,) int64.
        """
        device = self.device
        batch = {key: torch.from_numpy(x).to(device)[:, None] for key, x in step.items()}
        envs = batch["obs"].shape[0]
        if self._resumed is not None and self.action is not None and len(self.action) != envs:
            # The run goes on with another number of environments, in which all episodes begin.
            self._resumed = self.action = self.plan = None
        if self.action is None:
            self.action = torch.zeros(envs, self.agent.action_dim, device=device)
        batch["action"], self._first = self.action[:, None], batch["is_first"][:, 0]
        with self.world_model.evaluating():
            if self._resumed is not None:
                self.belief, self._resumed = self._shaped(self._resumed, batch), None
            self.belief = self.world_model.observe(batch, self.belief).at(0)

    @torch.inference_mode()
    def choose(self) -> NDArray[np.float32]:
        """Choose, from what was seen, and remember as done: actions (N, A) in [-1, 1]."""
        assert self.belief is not None, "nothing was seen yet"
        assert self._first is not None
        with self.world_model.evaluating():
            if self.planner is None:
                self.action = self.agent.act(self.belief, self.explore)
            else:
                self.action, self.plan = self.planner.act(
                    self.belief, self.plan, self._first, self.explore
                )
        acted: NDArray[np.float32] = self.action.float().cpu().numpy()
        return acted

    def take(self, action: NDArray[np.float32]) -> None:
        """Remember that somebody else has chosen: actions (N, A) in [-1, 1]."""
        self.action = torch.from_numpy(action).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.world_model.parameters()).device

    def _shaped(self, stored: Any, batch: Batch) -> Belief:
        """Give stored tensors the shape of this world model's beliefs."""
        device = batch["obs"].device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            like = self.world_model.observe(batch).at(0)
        belief: Belief = _like(stored, like, device)
        return belief


def _plain(belief: Any) -> Any:
    """Lists of tensors and None in place of named tuples, which a checkpoint cannot hold."""
    return [_plain(part) for part in belief] if isinstance(belief, tuple) else belief


def _like(stored: Any, like: Any, device: torch.device) -> Any:
    """Undo `_plain` after the pattern of another belief."""
    if isinstance(like, tuple):
        return type(like)(*(_like(x, y, device) for x, y in zip(stored, like, strict=True)))
    return stored.to(device) if isinstance(stored, Tensor) else stored


def acting(module: FinetuneModule, explore: bool) -> ActingPolicy:
    """What acts in an environment: the agent, or a planner where ``agent.plan`` says so."""
    planner = module.planner
    if planner is not None and not planner.cfg.holds(explore):
        planner = None
    return ActingPolicy(module.world_model, module.agent, explore, planner)


def greedy(module: FinetuneModule) -> Callable[[int], Policy]:
    """The agent's policy for a batch of test episodes, and the seed of its random numbers.

    Posteriors are sampled in evaluation too: the same agent must get the same score twice.
    """

    def policy_of(seed: int) -> Policy:
        torch.manual_seed(seed)
        return acting(module, explore=False)

    return policy_of
