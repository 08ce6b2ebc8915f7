"""Targets of the critic and weights of imagined steps.

Shapes: I imagined steps (leading, as they are rolled out), N imagination starts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lambda_returns(
    reward_IN: Tensor, value_IN: Tensor, discount_IN: Tensor, bootstrap_N: Tensor, lam: float
) -> Tensor:
    """Compute the λ-target V^λ of each imagined step.

    ``V_i = r_i + γ_i · ((1 - λ) · v_{i+1} + λ · V_{i+1})`` with ``V_I = v_I = bootstrap``: λ = 0
    gives one-step targets, λ = 1 discounted Monte-Carlo returns.

    Args:
        reward_IN: Predicted reward of state i, (I, N), in units of the environment's reward.
        value_IN: Slow critic's value of state i, (I, N), same units.
        discount_IN: γ times the probability to go on, (I, N), in [0, 1].
        bootstrap_N: Value of the state after the last one, (N,).
        lam: λ in [0, 1].

    Returns:
        Targets, (I, N). Gradients flow through every input; detach for the critic.

    Raises:
        ValueError: ``lam`` is outside [0, 1].

    Source:
        V^λ of eq. (4) and (5) of the MAPO paper; eq. (4) of DreamerV2, arXiv:2010.02193; facts 4.
    """
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"lam must lie in [0, 1], got {lam}")
    next_value_IN = torch.cat([value_IN[1:], bootstrap_N[None]])
    inputs_IN = torch.addcmul(reward_IN, discount_IN, next_value_IN, value=1.0 - lam)
    target_N, targets = bootstrap_N, []
    for inputs_N, factor_N in zip(
        reversed(inputs_IN.unbind()), reversed((lam * discount_IN).unbind()), strict=True
    ):
        target_N = torch.addcmul(inputs_N, factor_N, target_N)
        targets.append(target_N)
    return torch.stack(targets[::-1])


def step_weights(discount_IN: Tensor) -> Tensor:
    """Probability that imagination is still going on: 1, γ_0, γ_0·γ_1, ...; (I, N), detached."""
    ones_1N = torch.ones_like(discount_IN[:1])
    return torch.cat([ones_1N, discount_IN[:-1]]).cumprod(dim=0).detach()
