"""PreLAR's action-state consistency: larger changes of the action, larger changes of the state.

Shapes: B batch, T time, A action, S groups, K classes, N = B*(T-1) steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mapo_lightning.models.distributions import categorical_kl
from mapo_lightning.models.rssm_world.dynamics import Dynamics, LatentState
from mapo_lightning.models.rssm_world.settings import Consistency


class LatentAction(NamedTuple):
    """Gaussian over the action between two frames; axes (B, T-1, A)."""

    mean: Tensor
    std: Tensor
    sample: Tensor
    whole: Tensor | None = None  # (B, T-1): both frames are of one episode; None: all are


def gaussian_kl(mean: Tensor, std: Tensor, other_mean: Tensor, other_std: Tensor) -> Tensor:
    """KL(N(mean, std²) || N(other_mean, other_std²)) in nats, summed over A; (..., A) -> (...)."""
    ratio = std / other_std
    away = (mean - other_mean) / other_std
    return (0.5 * (away.pow(2) + ratio.pow(2) - 1.0) - ratio.log()).sum(-1)


def consistency(
    kind: Consistency,
    latent: LatentAction,
    dynamics: Dynamics[Any],
    post: LatentState,
    prior_BTSK: Tensor,
) -> Tensor:
    """Hold what other actions would change against how different those actions are.

    Every state is led on by the action that was inferred, and by that of another clip of the batch.

    Args:
        kind: As in `order_loss`.
        latent: Inferred actions, axes (B, T-1).
        dynamics: Model that the actions drive.
        post: Its posterior states, axes (B, T).
        prior_BTSK: Its prior logits under the inferred actions, (B, T, S, K).

    Returns:
        Scalar in [0, 4].

    Source:
        facts 7.4.
    """
    order_B = torch.randperm(len(prior_BTSK), device=prior_BTSK.device)
    with torch.no_grad():  # the states' side is what the actions are held against
        before = post.until(-1).flatten()
        other_NA = latent.sample[order_B].flatten(0, 1)
        unused_NS = before.stoch.new_zeros(before.stoch.shape[:-1])
        other_NSK = dynamics.mixed(dynamics.imagine_step(before, other_NA, unused_NS).logits)
        state_N = categorical_kl(dynamics.mixed(prior_BTSK[:, 1:].flatten(0, 1)), other_NSK)
        # A clip drawn for itself changes nothing; rounding must not rank it.
        same_B = order_B == torch.arange(len(order_B), device=order_B.device)
        state_N = state_N.masked_fill(same_B.repeat_interleave(latent.mean.shape[1]), 0.0)
    mean, std = latent.mean, latent.std
    action_N = gaussian_kl(mean, std, mean[order_B], std[order_B]).flatten()
    if latent.whole is not None:
        kept_N = (latent.whole & latent.whole[order_B]).flatten()
        state_N, action_N = state_N[kept_N], action_N[kept_N]
    return order_loss(kind, state_N, action_N)


def order_loss(kind: Consistency, state_N: Tensor, action_N: Tensor) -> Tensor:
    """Mean squared disagreement, over all pairs of steps, about which of the two changed more.

    Args:
        kind: ``published`` compares signs, so that its gradient is zero everywhere. ``fixed``
            replaces the sign of the actions' difference by tanh(difference / scale), where scale is
            the mean absolute difference; as the scale goes to zero that is ``published``.
        state_N: How much the predicted state changes; no gradient reaches it, (N,).
        action_N: How much the action changes, (N,).

    Returns:
        Scalar in [0, 4]; ``published`` is 0 where the orders agree and 4 where they are opposite.
    """
    state_NN = torch.sign(state_N[:, None] - state_N[None, :]).detach()
    action_NN = action_N[:, None] - action_N[None, :]
    if kind == "published":
        return (torch.sign(action_NN) - state_NN).pow(2).mean()
    # Not detached: else driving all differences up would look like progress.
    scale = action_NN.abs().mean().clamp(min=1e-6)
    return (torch.tanh(action_NN / scale) - state_NN).pow(2).mean()
