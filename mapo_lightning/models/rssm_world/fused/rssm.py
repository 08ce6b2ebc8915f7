"""The state-space model with a backward through time written by hand (docs/performance.md)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mapo_lightning.models.rssm_world.dynamics import FeaturePolicy, HasFeat
from mapo_lightning.models.rssm_world.fused.policy import (
    NetworkPolicy,
    product_dtype,
    recorded,
)
from mapo_lightning.models.rssm_world.fused.scan import Scan
from mapo_lightning.models.rssm_world.fused.tape import Weights
from mapo_lightning.models.rssm_world.rssm import RSSM, RSSMState, update_bias


class FusedRSSM(RSSM):
    """Equal to `RSSM` within rounding, with the same parameters and the same random numbers.

    A sequence runs without autograd and becomes one node of the graph.
    """

    def observe(
        self,
        action_BTA: Tensor,
        embed_BTE: Tensor,
        is_first_BT: Tensor,
        start: RSSMState | None = None,
        noise_BTS: Tensor | None = None,
    ) -> tuple[RSSMState, Tensor]:
        """As `RSSM.observe`."""
        batch, steps = is_first_BT.shape
        state = start or self.initial(batch, embed_BTE)
        if noise_BTS is None:
            noise_BTS = torch.rand(batch, steps, self.cfg.stoch, device=embed_BTE.device)
        keep_BT1 = (~is_first_BT).float()[..., None]
        driven_BTU = self.drive(action_BTA * keep_BT1)
        seen_BTU, deter_weight = self._see(embed_BTE)
        weights = self._weights(deter_weight, self.posterior)
        scan = self._scan(weights, state.feat, steps, 1, keep_BT1)
        with torch.no_grad():
            noise = noise_BTS.transpose(0, 1).contiguous().unbind()
            for given in zip(driven_BTU.unbind(1), seen_BTU.unbind(1), noise, strict=True):
                scan.step(*given)
        feat, logits = scan.with_gradients(driven_BTU, seen_BTU, state.feat)
        assert logits is not None
        post = RSSMState(feat, self._grouped(logits))
        return post, self._grouped(self.prior(post.deter))

    def imagine(
        self,
        start: HasFeat,
        policy: FeaturePolicy | NetworkPolicy,
        steps: int,
        encode: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """As `RSSM.imagine`; with gradients, policies other than a `NetworkPolicy` take that one.

        No gradient reaches the weights and the start here, as none does in behaviour learning.
        """
        wants_gradients = torch.is_grad_enabled()
        # Asked once: `isinstance` of a protocol takes longer than one of the products below.
        network = policy if isinstance(policy, NetworkPolicy) else None
        if wants_gradients and network is None:
            return super().imagine(start, policy, steps, encode)
        start_BF = start.feat
        record = recorded(network.network) if network is not None else None
        first = self.prior[0]
        assert isinstance(first, nn.Linear)
        noise_IBS = torch.rand((steps, len(start_BF), self.cfg.stoch), device=start_BF.device)

        def driven(action: Tensor) -> Tensor:
            return self.drive(action if encode is None else encode(action))

        with torch.no_grad():
            weights = self._weights(first.weight, self.prior)
            bias = first.bias.to(weights.gates.dtype)
            scan = self._scan(weights, start_BF, steps, 0)
            for i in range(steps):
                feat_BF = scan.states[i]
                if network is not None and record is not None:
                    action_BA = network.sample(record(feat_BF), i)
                else:
                    action_BA = policy(feat_BF)
                scan.step(driven(action_BA), bias, noise_IBS[i])
        if not wants_gradients:
            return scan.states
        assert network is not None
        assert record is not None
        return scan.with_gradients(driven(network.sample_all(record.outputs())), bias, start_BF)[0]

    def _weights(self, deter_weight: Tensor, head: nn.Sequential) -> Weights:
        """What a step multiplies with, in the dtype of the products, to be cast once a sequence.

        ``head`` is prior or posterior, ``deter_weight`` its first layer's part for the state.
        """
        dtype = product_dtype(deter_weight)
        linear, norm, last = self.cell.linear, self.cell.norm, head[2]
        assert isinstance(last, nn.Linear)
        entry, deter = linear.weight.split_with_sizes([self.cfg.hidden, self.cfg.deter], dim=1)
        return Weights(
            self.inp.weight[:, : self.cfg.stoch * self.cfg.classes].to(dtype),
            torch.cat([deter, entry], dim=1).to(dtype),
            linear.bias.to(dtype),
            norm.weight,
            update_bias(norm.bias),
            deter_weight.to(dtype),
            last.weight.to(dtype),
            last.bias.to(dtype),
        )

    def _scan(
        self, weights: Weights, start_BF: Tensor, steps: int, axis: int, keep: Tensor | None = None
    ) -> Scan:
        groups = self.cfg.stoch, self.cfg.classes
        return Scan(weights, groups, start_BF.detach(), steps, axis, keep, self.unimix)
