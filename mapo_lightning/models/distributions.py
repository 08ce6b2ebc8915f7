"""The two distributions of DreamerV2, as functions on tensors.

No ``torch.distributions`` objects: they cost a third of the scan and a host sync each
(docs/performance.md). Everything here runs in float32 whatever the autocast state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

MIN_STD = 0.1
EDGE = 1.0 - 1e-6
"""Samples of the policy are clipped to ±EDGE, straight-through (facts 4)."""


def draw_class(probs_K: Tensor, noise: Tensor) -> Tensor:
    """Class that uniform ``noise`` (...) picks, (..., 1) integers from probabilities (..., K).

    The inverse of the cumulated probabilities at ``noise``: no distribution object, no host sync.
    """
    # Without the last one, which is all that is left: rounding keeps their sum a hair off 1.
    bounds = probs_K[..., :-1].cumsum(dim=-1)
    return torch.searchsorted(bounds, noise[..., None], right=True)


def mixed(logits_K: Tensor, unimix: float) -> Tensor:
    """Logits of a mixture with the uniform distribution, (..., K); unchanged for ``unimix`` 0.

    Source: DreamerV3's categoricals, with ``unimix`` 0.01: no class becomes impossible, and no KL
    infinite.
    """
    if not unimix:
        return logits_K
    probs_K = logits_K.float().softmax(dim=-1)
    return ((1.0 - unimix) * probs_K + unimix / probs_K.shape[-1]).log()


def one_hot_sample(logits_K: Tensor, noise: Tensor) -> Tensor:
    """Draw one-hot samples whose gradient is that of the probabilities.

    Args:
        logits_K: Unnormalised log-probabilities, (..., K).
        noise: Uniform in [0, 1), (...): one number picks the class through the inverse CDF.

    Returns:
        (..., K) float32: the value is the one-hot sample, the gradient the softmax's.
    """
    probs_K = logits_K.float().softmax(dim=-1)
    chosen = draw_class(probs_K.detach(), noise.contiguous())
    return torch.zeros_like(probs_K).scatter_(-1, chosen, 1.0) + (probs_K - probs_K.detach())


def categorical_kl(p_logits_SK: Tensor, q_logits_SK: Tensor) -> Tensor:
    """KL(p || q) in nats, summed over the S independent categoricals; (..., S, K) -> (...)."""
    p_log_SK = p_logits_SK.float().log_softmax(dim=-1)
    q_log_SK = q_logits_SK.float().log_softmax(dim=-1)
    return (p_log_SK.exp() * (p_log_SK - q_log_SK)).sum(dim=(-2, -1))


def balanced_kl(post_SK: Tensor, prior_SK: Tensor, balance: float, free_nats: float) -> Tensor:
    """KL between posterior and prior that teaches the prior more than it bends the posterior.

    ``balance · max(mean KL(sg post || prior), free) + (1 - balance) · max(mean KL(post || sg
    prior), free)``: averaged over batch and time *before* the maximum is taken.

    Args:
        post_SK: Posterior logits, (B, T, S, K).
        prior_SK: Prior logits, same shape.
        balance: Share that moves the prior, in [0, 1].
        free_nats: Mean KL below this many nats is not penalised.

    Returns:
        Scalar, in nats per time step.

    Source:
        facts 2.3; DreamerV2, arXiv:2010.02193, algorithm 2, with ``free_avg``.
    """
    teach = categorical_kl(post_SK.detach(), prior_SK).mean().clamp(min=free_nats)
    regularise = categorical_kl(post_SK, prior_SK.detach()).mean().clamp(min=free_nats)
    return balance * teach + (1.0 - balance) * regularise


@dataclass(frozen=True, eq=False)
class TruncatedNormal:
    """Independent normals cut to [-1, 1]; the leading axes are free, the last one is A."""

    mean: Tensor
    """Of the normal before it is cut, (..., A) in [-1, 1]."""
    std: Tensor
    """Of the same, (..., A)."""

    @classmethod
    def from_raw(cls, raw: Tensor) -> TruncatedNormal:
        """Read a policy head's output, (..., 2A): tanh mean, std = 2·sigmoid(raw / 2) + 0.1."""
        mean, std = raw.float().chunk(2, dim=-1)
        return cls(mean.tanh(), 2.0 * torch.sigmoid(std / 2.0) + MIN_STD)

    @cached_property
    def _edges(self) -> tuple[Tensor, Tensor]:
        """Standardised lower and upper edge, and erf(edge / sqrt(2)) of both, (2, ..., A) each."""
        ends = torch.arange(-1.0, 2.0, 2.0, device=self.mean.device)  # -1 and 1, without a copy
        edges = (ends.view(2, *[1] * self.mean.ndim) - self.mean) / self.std
        return edges, torch.erf(edges * math.sqrt(0.5))

    @cached_property
    def _mass(self) -> Tensor:
        """Probability of [-1, 1] under the normal that is cut, (..., A)."""
        low, high = self._edges[1]
        mass: Tensor = 0.5 * (high - low)
        return mass.clamp(min=1e-8)

    def sample(self, noise: Tensor) -> Tensor:
        """Reparameterised sample from uniform ``noise`` (..., A); gradients reach mean and std."""
        _, (low, high) = self._edges
        # 2q - 1 of the quantile q in [1e-6, 1 - 1e-6].
        centred = torch.lerp(low, high, noise).clamp(2e-6 - 1.0, 1.0 - 2e-6)
        x = torch.addcmul(self.mean, self.std, torch.erfinv(centred), value=math.sqrt(2.0))
        clipped = x.clamp(-EDGE, EDGE)
        return x + (clipped - x).detach() if x.requires_grad else clipped

    def log_prob(self, action: Tensor) -> Tensor:
        """Logarithm of the density at ``action`` (..., A), summed over A: nats, (...)."""
        distance = (action - self.mean) / self.std
        nats = -0.5 * (distance.square() + math.log(2 * math.pi)) - (self.std * self._mass).log()
        total: Tensor = nats.sum(-1)
        return total

    def mode(self) -> Tensor:
        """Most probable action, (..., A)."""
        return self.mean.clamp(-EDGE, EDGE)

    def expectation(self) -> Tensor:
        """Mean action, (..., A); while the policy is wide it lies further inside than the mode."""
        edges, _ = self._edges
        bell = torch.exp(-0.5 * edges.square()) / math.sqrt(2.0 * math.pi)
        mean: Tensor = self.mean + self.std * (bell[0] - bell[1]) / self._mass
        return mean.clamp(-EDGE, EDGE)

    def entropy(self) -> Tensor:
        """Differential entropy in nats, summed over the A dimensions, (...)."""
        edges, mass = self._edges[0], self._mass
        bent = edges * torch.exp(-0.5 * edges.square())
        edge = (bent[0] - bent[1]) * (0.5 / math.sqrt(2 * math.pi)) / mass
        nats = 0.5 * math.log(2 * math.pi * math.e) + (self.std * mass).log() + edge
        total: Tensor = nats.sum(-1)
        return total
