"""iVideoGPT's world model: frames become tokens, a transformer predicts them, tokens become frames.

Shapes: B clips, T frames, K context frames, N rows of a dream, I imagined steps, S stacked frames,
H W image, A action, F feat = S * 3 * H * W, P and Q codes of a context frame and of a later one.

Source: iVideoGPT, arXiv:2405.15223; facts 7.5, 7.6.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mapo_lightning.models.blocks import evaluation_mode
from mapo_lightning.models.interfaces import Belief, Dream, Fit, Policy
from mapo_lightning.models.objective import check_scales, weigh
from mapo_lightning.models.scalar_outputs import symexp, symlog
from mapo_lightning.models.settings import ObjectiveConfig
from mapo_lightning.models.token_world.belief import StackedFrames, stacked
from mapo_lightning.models.token_world.frame_predictor import FramePredictor
from mapo_lightning.models.token_world.settings import TokenWorldConfig
from mapo_lightning.models.token_world.tokenizer import Tokenizer
from mapo_lightning.types import Batch

_DRAWING = ("context", "future", "codes")
"""Loss terms of the tokenizer."""


class TokenWorldModel(nn.Module):
    """Tokenizer and transformer.

    Gradients do not pass through a dream, whose tokens are drawn, and a dream ends with its last
    step: nothing predicts the end of an episode.

    Args:
        cfg: Sizes, and what the released code does differently.
        objective: Loss weights of the stage.
        action_dim: Width A of the environment's action; None builds the pre-training model, without
            actions and rewards.
    """

    def __init__(
        self, cfg: TokenWorldConfig, objective: ObjectiveConfig, action_dim: int | None
    ) -> None:
        super().__init__()
        self.cfg, self.objective = cfg, objective
        self.tokenizer = Tokenizer(cfg.tokenizer)
        self.predictor = FramePredictor(cfg.transformer, cfg.tokenizer, action_dim)
        if action_dim is not None:
            # In control the codes stay as they are: the transformer knows them by their number.
            for book in (self.tokenizer.context_codes, self.tokenizer.future_codes):
                book.requires_grad_(False)
        self.feat_dim = cfg.stacked * 3 * cfg.tokenizer.size**2
        self.updates = 0
        check_scales(self._terms(), objective.scales)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _terms(self) -> list[str]:
        """Names of the loss terms."""
        names = [] if self.cfg.learn == "transformer" else [*_DRAWING]
        if self.cfg.learn != "tokenizer":
            names += ["tokens"]
            names += [] if self.predictor.transformer.reward is None else ["reward"]
        return names

    def observe(self, batch: Batch, start: Belief | None = None) -> StackedFrames:
        """Stack the frames; nothing is computed of them.

        Raises:
            TypeError: ``start`` is not a belief of this model.
        """
        if start is not None and not isinstance(start, StackedFrames):
            raise TypeError(f"start must be StackedFrames, got {type(start).__name__}")
        return stacked(batch["obs"], batch["is_first"], self.cfg.stacked, start)

    def loss(self, batch: Batch) -> Fit:
        """How badly clips are drawn from their tokens, and how badly the tokens are predicted.

        The first K frames of a clip are its context. A clip must not reach into another episode.
        """
        frames = _pictures(batch["obs"])
        terms: dict[str, Tensor] = {}
        if self.cfg.learn != "transformer":
            due = self.cfg.learn == "tokenizer" or self.updates % self.cfg.tokenizer_every == 0
            terms |= self._drawing(frames) if due else self._nothing()
        if self.cfg.learn != "tokenizer":
            terms |= self._predicting(frames, batch)
        if self.training:
            self.updates += 1
        total, log = weigh(terms, self.objective.weights)
        return Fit(total, log, self.observe(batch))

    def _drawing(self, frames: Tensor) -> dict[str, Tensor]:
        """Terms of the tokenizer, on all context frames and some of the others."""
        shown = self.cfg.tokenizer.context_frames
        count = frames.shape[1] - shown
        chosen = torch.randperm(count)[: self.cfg.tokenizer_frames].sort().values + shown
        some = torch.cat([frames[:, :shown], frames[:, chosen.to(frames.device)]], dim=1)
        drawn = self.tokenizer(some)
        return {
            "context": F.l1_loss(drawn.context, some[:, :shown]),
            "future": F.l1_loss(drawn.future, some[:, shown:]),
            "codes": drawn.context_loss + drawn.future_loss,
        }

    def _nothing(self) -> dict[str, Tensor]:
        """The same terms of an update in which the tokenizer does not learn."""
        zero = self.predictor.transformer.head.weight.new_zeros(())
        return dict.fromkeys(_DRAWING, zero)

    def _predicting(self, frames: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Terms of the transformer."""
        with torch.no_grad(), evaluation_mode(list(self.tokenizer.modules())):
            tokens, _ = self.tokenizer.tokenize(frames)
        taken = None
        if self.predictor.transformer.action is not None:
            taken = F.pad(batch["action"][:, 1:], (0, 0, 0, 1))  # in frame i, towards i + 1
        found = self.predictor(tokens, taken)
        terms = {"tokens": found.loss}
        if found.reward is not None:
            reward = batch["reward"][:, self.cfg.tokenizer.context_frames :]
            said = found.reward
            if self.cfg.late_reward:
                reward, said = reward[:, 1:], said[:, :-1]
            terms["reward"] = F.mse_loss(said, symlog(reward))
        return terms

    @torch.no_grad()
    def imagine(self, start: Belief, policy: Policy, steps: int) -> Dream:
        """Dream in pictures; the last K frames of ``start`` are the context.

        Entry 0 of the rewards is zero: nothing says what the start was worth.

        Raises:
            TypeError: ``start`` is not a belief of this model.
        """
        if not isinstance(start, StackedFrames):
            raise TypeError(f"start must be StackedFrames, got {type(start).__name__}")
        quiet = [] if self.cfg.dream_dropout else list(self.modules())
        with evaluation_mode(quiet):
            return self._imagine(start, policy, steps)

    def _imagine(self, start: StackedFrames, policy: Policy, steps: int) -> Dream:
        shown = self.cfg.tokenizer.context_frames
        dream = _Continuation(self, _pictures(start.frames[:, -shown:]))
        beliefs, actions = [start], []
        rewards = [start.frames.new_zeros(len(start.frames), dtype=torch.float32)]
        for step in range(steps):
            now = beliefs[-1]
            seen = now._replace(scale=now.scale / 255.0) if self.cfg.blind_policy else now
            actions.append(policy(step, seen))
            frame, reward = dream.next(actions[-1])
            rewards.append(rewards[0] if reward is None else symexp(reward).float())
            beliefs.append(now.followed_by(_bytes(frame)))
        reward_IN = torch.stack(rewards)
        return Dream(
            torch.stack([belief.feat for belief in beliefs]),
            reward_IN,
            torch.ones_like(reward_IN),
            torch.stack(actions),
            torch.stack([belief.frames[:, -1] for belief in beliefs]),
        )

    @torch.no_grad()
    def open_loop(self, batch: Batch, seen: int) -> Tensor:
        """Watch ``seen`` frames, then dream the rest of the batch from its actions alone.

        Runs in evaluation mode, whatever mode the model is in. Where fewer than K frames are
        shown, the first one stands in for those that are missing.

        Returns:
            Frames (B, T, H, W, 3) in [0, 1]: what was seen, as drawn by the model, and the dream.
        """
        with evaluation_mode(list(self.modules())):
            driven = self.predictor.transformer.action is not None
            action = batch["action"] if driven else None
            return self._open_loop(_pictures(batch["obs"]), action, seen)

    def _open_loop(self, frames: Tensor, action: Tensor | None, seen: int) -> Tensor:
        shown = self.cfg.tokenizer.context_frames
        head = frames[:, :seen]
        if seen < shown:
            head = torch.cat([head[:, :1].expand(-1, shown - seen, -1, -1, -1), head], dim=1)
        if head.shape[1] > shown:
            drawn = self.tokenizer(head)
            film = [drawn.context, drawn.future]
        else:
            film = [self.tokenizer.view(head).frames[:, -seen:]]
        dream = _Continuation(self, head[:, -shown:])
        for t in range(seen, frames.shape[1]):
            frame, _ = dream.next(None if action is None else action[:, t])
            film.append(frame[:, None])
        return torch.cat(film, dim=1).clamp(0.0, 1.0).movedim(2, -1)

    def parts(self) -> Mapping[str, nn.Module]:
        """``tokenizer`` and ``predictor``."""
        return {"tokenizer": self.tokenizer, "predictor": self.predictor}

    def groups(self) -> Mapping[str, list[nn.Parameter]]:
        """``lower``: the tokenizer. ``model``: the transformer."""
        return {
            "lower": list(self.tokenizer.parameters()),
            "model": list(self.predictor.parameters()),
        }

    def evaluating(self) -> AbstractContextManager[None]:
        """Nothing that `observe` uses has modes."""
        return evaluation_mode([])

    def get_extra_state(self) -> Tensor:
        """The number of updates, which says when the tokenizer learns."""
        return torch.tensor(self.updates)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the number of updates up again."""
        self.updates = int(state)


class _Continuation:
    """Frames that follow a context, drawn one after the other with one cache.

    Where the transformer has no position left for another frame, the last K frames that it drew
    become the context, and it begins anew.
    """

    def __init__(self, world: TokenWorldModel, context: Tensor) -> None:
        self.tokenizer, self.predictor, self.cfg = world.tokenizer, world.predictor, world.cfg
        self._look(context)

    def _look(self, context: Tensor) -> None:
        self.view = self.tokenizer.view(context)
        self.cache = self.predictor.start(self.view.ids)
        self.recent = list(context.unbind(1))

    def next(self, action: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Frame (N, 3, H, W) in [0, 1], and reward on reaching it (N,) in symlog if known."""
        layout, shown = self.predictor.layout, self.cfg.tokenizer.context_frames
        if self.cache.length + layout.future_tokens + 1 > self.cfg.transformer.positions:
            self._look(torch.stack(self.recent[-shown:], dim=1))
        tokens, reward, self.cache = self.predictor.next_frame(
            self.cache, action, self.cfg.temperature, self.cfg.top
        )
        drawn = self.tokenizer.detokenize(layout.codes(tokens)[:, None], self.view)
        self.recent.append(drawn[:, 0].clamp(0.0, 1.0))
        return self.recent[-1], reward


def _pictures(obs: Tensor) -> Tensor:
    """Bytes (B, T, H, W, 3) -> (B, T, 3, H, W) in [0, 1]."""
    return obs.movedim(-1, 2).float() / 255.0


def _bytes(frame: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] -> (N, H, W, 3) uint8."""
    return (frame * 255.0).round().to(torch.uint8).movedim(1, -1)
