"""Settings of the agents; free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mapo_lightning.models.settings import ScalarKind
from mapo_lightning.types import ConfigError, check_at_least


@dataclass
class PlanConfig:
    """Planning: dreams of many action sequences before every step (docs/evaluate.md).

    Population, iterations, elites, proposals and least deviation are those of TD-MPC2,
    arXiv:2310.16828.
    """

    kind: Literal["none", "cem", "mppi"] = "none"
    """none: the agent's policy acts. cem: the mean of the best sequences. mppi: their mean, the
    better ones with more weight."""
    where: Literal["acting", "evaluation", "both"] = "evaluation"
    """What is planned: the actions that collect experience (acting), those of test episodes and of
    `load_agent` (evaluation), or both."""
    population: int = 512
    """Sequences that are dreamt side by side in each iteration, for every environment."""
    horizon: int = 8
    """Steps of such a dream. TD-MPC2 has 3, with a critic that was trained for it."""
    iterations: int = 6
    """Dreams before each step. From one to the next, the distribution of sequences follows the best
    of them."""
    elites: int = 64
    """How many count as the best."""
    temperature: float = 0.5
    """mppi: a sequence whose return is lower by this much has 1/e of the weight, in units of the
    return. TD-MPC2's 0.5 is a factor, and 2 here."""
    std_start: float = 1.0
    """Standard deviation of the actions in the first iteration, in units of the range [-1, 1]."""
    std_min: float = 0.05
    """Least standard deviation in all others."""
    warm_start: bool = True
    """Begin with what is left of the plan of the step before."""
    proposals: int = 24
    """Sequences among them that the agent's policy proposes: the first by its greedy actions, the
    others by samples. 0 plans without the policy."""
    value: bool = True
    """Add what the agent's critic says of the last state, where the agent has a critic of states;
    otherwise nothing after the horizon counts."""
    caution: float = 0.0
    """Weight of the dream's uncertainty, which is subtracted from its rewards: needs
    ``world_model.ensemble.members``."""

    def __post_init__(self) -> None:
        check_at_least(self, population=1, horizon=1, iterations=1, elites=1, proposals=0)
        for name in ("elites", "proposals"):
            if getattr(self, name) > self.population:
                raise ConfigError(
                    f"{name} must not exceed population={self.population}, got "
                    f"{getattr(self, name)}"
                )
        if self.temperature <= 0.0:
            raise ConfigError(f"temperature must be positive, got {self.temperature}")
        if not 0.0 <= self.std_min <= self.std_start:
            raise ConfigError(
                f"std_min must lie between 0 and std_start={self.std_start}, got {self.std_min}"
            )
        if self.caution < 0.0:
            raise ConfigError(f"caution must not be negative, got {self.caution}")

    def holds(self, explore: bool) -> bool:
        """Whether actions are planned while exploring, or else in evaluation."""
        return self.kind != "none" and self.where in ("both", "acting" if explore else "evaluation")


@dataclass
class MBPOConfig:
    """DrQ-v2 on real and imagined experience, half and half (facts 7.6).

    Numbers of updates are those of the world model: published, one per five agent steps.
    """

    updates: int = 10
    """Updates of the agent per update of the world model: two per agent step."""
    hold: int = 1000
    """First updates of the world model, in which the agent only acts."""
    batch: int = 256
    """Transitions per update."""
    imagined: float = 0.5
    """Share of them that are imagined, in [0, 1]; 0 is DrQ-v2 alone, without dreams."""
    n_step: int = 3
    """Rewards that a target sums before it trusts the critics."""
    discount: float = 0.99
    """γ per agent step."""
    rate: float = 1e-4
    """Learning rate of Adam, for actor and critics."""
    weight_decay: float = 1e-6
    """Of Adam."""
    target_rate: float = 0.01
    """How far the slow critics go towards the critics after each update."""
    hidden: int = 1024
    """Width of the hidden layers."""
    shift: int = 4
    """Pixels by which a picture is moved at most, at random, while learning."""
    noise_start: float = 1.0
    """Standard deviation of the noise on actions at first."""
    noise_end: float = 0.1
    """... and in the end."""
    noise_steps: int = 100_000
    """Agent steps from one to the other."""
    noise_limit: float = 0.3
    """Largest noise while learning; acting has no limit."""
    dreams: int = 32
    """Dreams of a round, from states of the batch."""
    horizon: int = 10
    """Steps of a dream."""
    dream_every: int = 20
    """Updates of the world model between two rounds."""
    first_rounds: int = 20
    """Rounds at once, with random actions, when the agent begins to learn."""
    kept: int = 100_000
    """Dreams that are kept; the oldest go first."""
    store_dreams: bool = True
    """Put them into checkpoints, so that a resumed run goes on as if never stopped."""

    def __post_init__(self) -> None:
        check_at_least(
            self, updates=1, hold=0, batch=2, n_step=1, hidden=1, shift=0, noise_steps=1, dreams=1,
            dream_every=1, first_rounds=1, kept=1,
        )  # fmt: skip
        if self.horizon < self.n_step:
            raise ConfigError(
                f"horizon must be at least n_step={self.n_step}, so that a dream holds a "
                f"transition, got {self.horizon}"
            )
        for name in ("discount", "target_rate", "imagined"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("rate", "weight_decay", "noise_start", "noise_end", "noise_limit"):
            if getattr(self, name) < 0.0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass
class AgentConfig:
    """Behaviour learning (facts 4)."""

    kind: Literal["dreamer", "mbpo"] = "dreamer"
    """dreamer: Dreamer's actor-critic, which learns inside the dream only. Its settings below are
    those of DreamerV2; agent=dreamerv3 changes them to those of DreamerV3. mbpo: DrQ-v2, which
    learns from real and dreamt pictures; its settings are in agent.mbpo."""
    horizon: int = 15
    """Number of imagined steps from every replayed state."""
    discount: float = 0.99
    """γ per agent step."""
    lam: float = 0.95
    """λ of the critic's target."""
    entropy: float = 1e-4
    """Weight η of the policy's entropy in eq. (5), per nat."""
    explore_noise: float = 0.0
    """Standard deviation of normal noise added to actions while collecting, in units of the action
    range [-1, 1]; the published systems rely on the policy's own samples."""
    greedy: Literal["mode", "mean"] = "mode"
    """Action in evaluation: the policy's mode, as published, or its mean. The mode of a policy that
    is still wide often lies at the edge of the range."""
    critic: ScalarKind = "normal"
    """How the critic says a value: as the mean of a unit normal, or by weights of 255 fixed values
    on a symlog scale, as in DreamerV3."""
    target_every: int = 100
    """Updates between two steps of the slow critic towards the critic."""
    target_rate: float = 1.0
    """How far it goes each time, in (0, 1]: 1 copies the critic; DreamerV3 goes 0.02 of the way
    after every update."""
    bootstrap: Literal["slow", "fast"] = "slow"
    """Whose values the targets use: the slow critic's, or the critic's own (DreamerV3)."""
    slow_weight: float = 0.0
    """Weight of the term that holds the critic to the slow critic's values: 1 in DreamerV3."""
    normalise: Literal["none", "percentile"] = "none"
    """percentile: divide what the actor gains by the range of its imagined returns, from the 5th to
    the 95th percentile, if that is above 1 (DreamerV3). The entropy's weight then means the same
    in every task."""
    gradient: Literal["dynamics", "reinforce"] = "dynamics"
    """How the actor learns of a return: by gradients through the dream, as published for
    continuous actions, or by the likelihood of its actions (DreamerV3)."""

    plan: PlanConfig = field(default_factory=PlanConfig)
    """Planning instead of the policy, or on top of it."""
    mbpo: MBPOConfig = field(default_factory=MBPOConfig)
    """DrQ-v2 on real and imagined experience."""

    def __post_init__(self) -> None:
        if self.horizon < 2:
            raise ConfigError(f"horizon must be at least 2, got {self.horizon}")
        for name in ("discount", "lam"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("entropy", "explore_noise", "slow_weight"):
            if getattr(self, name) < 0.0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.target_every < 1:
            raise ConfigError(f"target_every must be at least 1, got {self.target_every}")
        if not 0.0 < self.target_rate <= 1.0:
            raise ConfigError(f"target_rate must lie in (0, 1], got {self.target_rate}")
