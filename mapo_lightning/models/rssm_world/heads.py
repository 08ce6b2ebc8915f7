"""What is read off the control state: reward, reward without bonus, whether the episode goes on.

Shapes: B batch, T time, F feat.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from mapo_lightning.models.blocks import mlp, zeroed
from mapo_lightning.models.scalar_outputs import SCALARS
from mapo_lightning.models.settings import MLPStyle, ScalarKind
from mapo_lightning.types import Batch


class Heads(nn.ModuleDict):
    """Networks with one output, by name: ``reward``, ``aux_reward``, ``discount``.

    Args:
        names: Which of them; none in pre-training.
        feat: Width F of the control state.
        units: Width of the hidden layers.
        layers: Number of hidden layers.
        style: Of the hidden layers, see `mlp`.
        rewards: How the reward heads say their number; ``twohot`` ones begin at 0.

    Source: facts 4 and 4.1.
    """

    def __init__(
        self,
        names: Sequence[str],
        feat: int,
        units: int,
        layers: int,
        style: MLPStyle = "elu",
        rewards: ScalarKind = "normal",
    ) -> None:
        kinds = {name: "normal" if name == "discount" else rewards for name in names}
        self.outputs = {name: SCALARS[kind] for name, kind in kinds.items()}
        networks = {
            name: mlp(feat, units, layers, output.width, style)
            for name, output in self.outputs.items()
        }
        for name, kind in kinds.items():
            if kind == "twohot":
                zeroed(networks[name])
        super().__init__(networks)

    def read(self, name: str, feat: Tensor) -> Tensor:
        """Number that one head says, (..., F) -> (...), float32."""
        return self.outputs[name].read(self[name](feat))

    def terms(self, batch: Batch, feat_BTF: Tensor, bonus_BT: Tensor | None) -> dict[str, Tensor]:
        """-ln p(r_t | s_t) of both reward heads, and the discount head's cross-entropy.

        Args:
            batch: ``reward`` (B, T), in units of the environment, and ``is_terminal`` (B, T).
            feat_BTF: Control states, (B, T, F).
            bonus_BT: What is added to the rewards of the first steps, weighted; None for nothing.
                The last states of a chunk have no full window ahead and train no reward.

        Returns:
            One scalar per head, under its name.
        """
        reward_BT = batch["reward"].float()
        target_BT = reward_BT
        if bonus_BT is not None:
            target_BT = reward_BT[:, : bonus_BT.shape[1]] + bonus_BT
        terms = {"reward": self._error("reward", feat_BTF[:, : target_BT.shape[1]], target_BT)}
        if "aux_reward" in self:
            terms["aux_reward"] = self._error("aux_reward", feat_BTF, reward_BT)
        if "discount" in self:
            goes_on_BT = (~batch["is_terminal"]).float()
            logit_BT = self.read("discount", feat_BTF)
            terms["discount"] = F.binary_cross_entropy_with_logits(logit_BT, goes_on_BT)
        return terms

    def _error(self, name: str, feat_BTF: Tensor, target_BT: Tensor) -> Tensor:
        return self.outputs[name].error(self[name](feat_BTF), target_BT).mean()
