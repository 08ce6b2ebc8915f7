"""What a world model and an agent are: the two plugs that a second implementation fills.

Trainers, callbacks, evaluation and `load_agent` know these protocols and nothing behind them.

Shapes: B batch, T time, F feat, A action, N imagination starts, I imagined steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

from torch import Tensor, nn

from mapo_lightning.types import Batch

B = TypeVar("B", bound="Belief")


@runtime_checkable
class Belief(Protocol):
    """What a world model knows of the present; leading axes (B,) or (B, T)."""

    @property
    def feat(self) -> Tensor:
        """What an agent may read, (..., F)."""
        ...

    def at(self: B, t: int) -> B:
        """Belief at one time: axes (B, T) -> (B,)."""
        ...

    def flatten(self: B) -> B:
        """Merge batch and time: axes (B, T) -> (B*T,)."""
        ...

    def repeat(self: B, times: int) -> B:
        """Every row ``times`` times, one after the other: axes (B,) -> (B*times,)."""
        ...

    def detach(self: B) -> B:
        """The same values without their graph."""
        ...


class Fit(NamedTuple):
    """One evaluation of a world model's loss."""

    total: Tensor  # scalar to back-propagate
    log: dict[str, Tensor]  # unscaled terms and diagnostics, detached scalars
    belief: Belief  # after each frame of the batch, axes (B, T)


class Dream(NamedTuple):
    """An imagined future; entry 0 of the state-like fields is the start."""

    feat: Tensor  # (I + 1, N, F)
    reward: Tensor  # (I + 1, N) expected on reaching each state
    discount: Tensor  # (I + 1, N) probability in [0, 1] that the episode goes on from each state
    action: Tensor | None = None  # (I, N, A) leads from state i to state i + 1; see `imagine`
    frames: Tensor | None = None  # (I + 1, N, H, W, 3) uint8, from models that dream in pixels
    uncertainty: Tensor | None = None  # (I + 1, N) >= 0, how little is known of each step; 0 first


Policy: TypeAlias = Callable[[int, Belief], Tensor]
"""Number i of the step and the belief it starts from, axes (N,) -> action (N, A) in [-1, 1]."""


class DreamPolicy(Protocol):
    """A policy whose actions are differentiable, for `DifferentiableWorldModel`."""

    def __call__(self, feat: Tensor) -> Tensor:
        """Action (N, A) of the next step; its graph ends at ``feat`` (N, F), which is data."""
        ...


@runtime_checkable
class WorldModel(Protocol):
    """Learns what follows from what is done; every implementation is an ``nn.Module``."""

    @property
    def feat_dim(self) -> int:
        """Width F of a belief's features."""
        ...

    def observe(self, batch: Batch, start: Belief | None = None) -> Belief:
        """Follow frames and actions.

        Args:
            batch: The keys of `types`, axes (B, T); reward and end of episodes are not read.
            start: Belief before the first frame, axes (B,); None starts afresh.

        Returns:
            Belief after each frame, axes (B, T).
        """
        ...

    def loss(self, batch: Batch) -> Fit:
        """How badly the batch is predicted; ready to back-propagate."""
        ...

    def imagine(self, start: Belief, policy: Policy, steps: int) -> Dream:
        """Dream ``steps`` steps ahead of every row of ``start``, axes (N,), without gradients."""
        ...

    def open_loop(self, batch: Batch, seen: int) -> Tensor:
        """Watch ``seen`` frames, then dream the rest of the batch from its actions alone.

        Runs in evaluation mode, whatever mode the model is in.

        Returns:
            Frames (B, T, H, W, 3) in [0, 1]: what was seen, as drawn by the model, and the dream.
        """
        ...

    def parts(self) -> Mapping[str, nn.Module]:
        """Modules by name: what is handed over from pre-training, frozen, or compiled."""
        ...

    def groups(self) -> Mapping[str, list[nn.Parameter]]:
        """All that learns, by optimiser group; the names are those of the learning rates."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of ``nn.Module``."""
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode for what `observe` uses; the modes before it come back afterwards."""
        ...


@runtime_checkable
class ClipsAlong(Protocol):
    """A world model some of whose parameters are moved by no optimiser and clipped all the same."""

    def clipped_along(self) -> Mapping[str, list[nn.Parameter]]:
        """Name of a group -> parameters whose gradients count, and shrink, when it is clipped."""
        ...


@runtime_checkable
class DifferentiableWorldModel(WorldModel, Protocol):
    """A world model through whose dreams gradients reach the actions, as Dreamer's actor needs."""

    def imagine_with_gradients(self, start: Belief, policy: DreamPolicy, steps: int) -> Dream:
        """As `imagine`, without ``action``: the policy has them.

        feat, reward and discount are differentiable in the policy's actions.
        """
        ...


@runtime_checkable
class Draughtsman(Protocol):
    """A world model that draws the states of its dreams, which hold no frames."""

    def draw(self, feat: Tensor, shown: Tensor) -> Tensor:
        """Draw states.

        Args:
            feat: Their features, (B, T, F).
            shown: Frames of the same scenes that were seen before, (B, S, H, W, 3) uint8.

        Returns:
            Frames (B, T, H, W, 3) in [0, 1].
        """
        ...


Driver: TypeAlias = Literal["action", "phrase", "latent", "nothing"]
"""What leads a dream: the robot's actions, phrases, inferred actions, or nothing at all."""


class Dreaming(Protocol):
    """One moment of a dream that is dreamt step by step, of N rows.

    A moment never changes: `step` makes the next one. So past moments can be kept, and left again
    in another way.
    """

    @property
    def belief(self) -> Belief:
        """What an agent may read, axes (N,)."""
        ...

    @property
    def frame(self) -> Tensor:
        """The picture, (N, H, W, 3) in [0, 1]."""
        ...

    @property
    def reward(self) -> Tensor | None:
        """Expected on reaching this moment, (N,); None: nothing predicts it."""
        ...

    @property
    def uncertainty(self) -> Tensor | None:
        """How little is known of the step to this moment, (N,) >= 0; None: nothing tells."""
        ...

    def step(self, drive: Batch) -> Dreaming:
        """Dream one step on, with torch's random numbers and in evaluation mode.

        Args:
            drive: What leads to the next moment, axes (N,): ``action`` (N, A) where actions or
                inferred actions lead; ``semantic``, ``has_semantic`` and ``position`` where phrases
                do. Other keys are not read.
        """
        ...


@runtime_checkable
class Stepwise(WorldModel, Protocol):
    """A world model whose dreams can be led one step at a time, as `mapo-play` does."""

    @property
    def driver(self) -> Driver:
        """What leads its dreams."""
        ...

    @property
    def drive_dim(self) -> int:
        """Width A of the actions, or inferred actions, that lead its dreams; 0: none do."""
        ...

    def dreaming(self, start: Belief, shown: Tensor) -> Dreaming:
        """Begin a dream, which goes as `imagine` and `open_loop` go.

        Args:
            start: Belief after the newest frame, axes (N,).
            shown: The frames up to there, (N, T, H, W, 3) uint8, which tell the scene.
        """
        ...


class AgentLoss(NamedTuple):
    """What an agent adds to one update."""

    losses: dict[str, Tensor]  # scalars to back-propagate with the world model's; may be empty
    log: dict[str, Tensor]  # detached scalars


@runtime_checkable
class Agent(Protocol):
    """Learns to act; every implementation is an ``nn.Module``.

    An agent may leave `groups` and `losses` empty and step optimisers of its own, in `losses` or in
    `after_update`, at its own pace; their state then goes into its ``get_extra_state``.
    """

    @property
    def action_dim(self) -> int:
        """Width A of an action."""
        ...

    def act(self, belief: Belief, explore: bool) -> Tensor:
        """Actions (B, A) in [-1, 1] for a belief with axes (B,)."""
        ...

    def losses(self, world_model: WorldModel, fit: Fit, batch: Batch) -> AgentLoss:
        """Learn from a batch, and from dreams that start in what ``fit`` believes of it.

        No gradient flows into ``fit``: its graph may be gone.
        """
        ...

    def groups(self) -> Mapping[str, Iterable[nn.Parameter]]:
        """Parameters that the shared optimiser moves, by group."""
        ...

    def after_update(self, updates: int) -> None:
        """Called once between two updates, with the number made so far, from 1."""
        ...


@runtime_checkable
class Proposer(Protocol):
    """An agent whose actions in a dream are not quite those of `Agent.act`."""

    def propose(self, belief: Belief) -> Tensor:
        """Sample actions (N, A) in [-1, 1] in a dreamt state, axes (N,); nothing is counted."""
        ...


@runtime_checkable
class Valuer(Protocol):
    """An agent with a critic of states."""

    def value(self, feat: Tensor) -> Tensor:
        """Discounted sum of what a state with features (..., F) and all after it are worth, (...).

        The reward on reaching the state is part of it.
        """
        ...


@runtime_checkable
class Codebook(Protocol):
    """Codes that follow moving averages instead of gradients; sums over all ranks move them."""

    batch_count: Tensor  # (M,) rows of this batch that chose each code
    batch_sum: Tensor  # (M, Z) their sum
    candidates: Tensor  # (M, Z) rows that dead codes may move to

    @property
    def frozen(self) -> bool:
        """Whether the codes stay as they are."""
        ...

    def update(self, count: Tensor, total: Tensor, candidates: Tensor) -> Any:
        """Move the codes; returns named scalars (a NamedTuple) for the log."""
        ...
