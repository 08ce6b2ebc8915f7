"""iVideoGPT's world model: frames become tokens, a transformer predicts them, tokens become frames.

Shapes: B clips, T frames, K context frames, N rows of a dream, I imagined steps, S stacked frames,
H W image, A action, F feat = S * 3 * H * W, P and Q codes of a context frame and of a later one.

Source: iVideoGPT, arXiv:2405.15223; facts 7.5, 7.6.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mapo_lightning.models.blocks import evaluation_mode
from mapo_lightning.models.interfaces import Belief, Dream, Driver, Fit, Policy
from mapo_lightning.models.objective import check_scales, weigh
from mapo_lightning.models.scalar_outputs import symexp, symlog
from mapo_lightning.models.settings import ObjectiveConfig
from mapo_lightning.models.token_world.augment import augmented
from mapo_lightning.models.token_world.belief import StackedFrames, stacked
from mapo_lightning.models.token_world.continuation import Continuation
from mapo_lightning.models.token_world.dreaming import TokenDreaming, as_bytes
from mapo_lightning.models.token_world.frame_predictor import FramePredictor, Told
from mapo_lightning.models.token_world.perceptual import PerceptualDistance
from mapo_lightning.models.token_world.settings import TokenWorldConfig
from mapo_lightning.models.token_world.tokenizer import Tokenizer
from mapo_lightning.types import Batch, CheckpointError

Taught: TypeAlias = Literal["tokenizer", "transformer", "both"]
"""What a batch teaches: pre-training has a phase for each, control learns both."""


class TokenWorldModel(nn.Module):
    """Tokenizer and transformer.

    Gradients do not pass through a dream, whose tokens are drawn, and a dream ends with its last
    step: nothing predicts the end of an episode.

    Args:
        cfg: Sizes, and what the released code does differently.
        objective: Loss weights of the stage.
        action_dim: Width A of the environment's action; None builds a pre-training model, without
            actions and rewards.
        learn: What a batch teaches. There is no transformer in the tokenizer's own phase.
        semantic_dim: Width V of a semantic vector; read where ``cfg.phrases`` asks for phrases.
        looks: Says how different pictures look; needed where ``cfg.lpips`` asks for LPIPS.

    Raises:
        ConfigError: There are too few positions, or a loss term has no weight.
    """

    def __init__(
        self,
        cfg: TokenWorldConfig,
        objective: ObjectiveConfig,
        action_dim: int | None,
        learn: Taught = "both",
        semantic_dim: int = 0,
        looks: PerceptualDistance | None = None,
    ) -> None:
        super().__init__()
        cfg.check_room()
        self.cfg, self.objective, self.learn = cfg, objective, learn
        self.action_dim = action_dim
        self.tokenizer = Tokenizer(cfg.tokenizer)
        self.predictor = None
        if learn != "tokenizer":
            width = semantic_dim if cfg.phrases else None
            sizes = cfg.transformer, cfg.tokenizer
            self.predictor = FramePredictor(*sizes, action_dim, width)
        if learn == "transformer":
            self.tokenizer.requires_grad_(False)
        elif learn == "both" and not cfg.codes_in_clip:
            for codes in self._codes:
                codes.requires_grad_(False)
        self._looks = (looks,)  # in a tuple, so that it is no part: a checkpoint is without it
        self.feat_dim = cfg.stacked * 3 * cfg.tokenizer.size**2
        self.updates = 0
        self.drawn: dict[str, Tensor] = {}  # the tokenizer's terms of the last update it had
        check_scales(self._terms(), objective.scales)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def _codes(self) -> list[nn.Parameter]:
        """Both codebooks; control leaves them alone, as the transformer knows codes by number."""
        return [self.tokenizer.context_codes.codes, self.tokenizer.future_codes.codes]

    @property
    def _drawing_terms(self) -> list[str]:
        return ["context", "future", "codes", *["lpips"] * self.cfg.lpips]

    def _terms(self) -> list[str]:
        """Names of the loss terms."""
        names = [] if self.learn == "transformer" else self._drawing_terms
        if self.predictor is not None:
            names += ["tokens"]
            names += [] if self.predictor.control is None else ["reward"]
            names += [] if self.predictor.phrases is None else ["phrase"]
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
        belief = self.observe(batch)
        if self.learn == "both":
            batch = {key: x[: self.cfg.clips] for key, x in batch.items()}
        frames = _pictures(batch["obs"])
        if self.cfg.augment and self.training and self.learn != "both":
            frames = augmented(frames)
        terms: dict[str, Tensor] = {}
        if self.learn != "transformer":
            # A validation draws in any case.
            due = self.learn == "tokenizer" or not self.training
            due = due or self.updates % self.cfg.tokenizer_every == 0
            terms |= self._drawing(frames) if due else self._nothing()
        if self.predictor is not None:
            terms |= self._predicting(self.predictor, frames, batch)
        if self.training:
            self.updates += 1
        total, log = weigh(terms, self.objective.weights)
        if self.learn != "transformer":
            # Between its updates, curves show how the tokenizer did in its last one.
            found = {name: log[name] for name in self._drawing_terms}
            if due and self.training:
                self.drawn = found
            log |= found if due else self.drawn
        return Fit(total, log, belief)

    def _drawing(self, frames: Tensor) -> dict[str, Tensor]:
        """Terms of the tokenizer, on all context frames and some of the others."""
        shown, looks = self.cfg.tokenizer.context_frames, self._looks[0]
        every = self.cfg.tokenizer.revive if self.learn == "tokenizer" and self.training else 0
        if every and self.updates and self.updates % every == 0:
            self.tokenizer.context_codes.due = self.tokenizer.future_codes.due = True
        count = frames.shape[1] - shown
        some = self.cfg.tokenizer_frames if self.learn == "both" else self.cfg.pretrain_frames
        chosen = torch.randperm(count)[:some].sort().values + shown
        clips = torch.cat([frames[:, :shown], frames[:, chosen.to(frames.device)]], dim=1)
        drawn = self.tokenizer(clips)
        terms = {
            "context": self._apart(drawn.context, clips[:, :shown]),
            "future": self._apart(drawn.future, clips[:, shown:]),
            "codes": drawn.context_loss + drawn.future_loss,
        }
        if self.cfg.lpips:
            assert looks is not None, "token_world.lpips needs VGG16"
            looks.to(frames.device)
            apart = looks(drawn.context.flatten(0, 1), clips[:, :shown].flatten(0, 1))
            terms["lpips"] = apart + looks(
                drawn.future.flatten(0, 1), clips[:, shown:].flatten(0, 1)
            )
        return terms

    def _apart(self, drawn: Tensor, truth: Tensor) -> Tensor:
        """How far pictures are from the truth, a scalar."""
        if self.cfg.error == "absolute":
            return F.l1_loss(drawn, truth)
        return 10.0 * F.mse_loss(drawn, truth)

    def _nothing(self) -> dict[str, Tensor]:
        """The same terms of an update in which the tokenizer does not learn."""
        zero = self.tokenizer.context_codes.codes.new_zeros(())
        return dict.fromkeys(self._drawing_terms, zero)

    def _predicting(
        self, predictor: FramePredictor, frames: Tensor, batch: Batch
    ) -> dict[str, Tensor]:
        """Terms of the transformer."""
        with torch.no_grad(), evaluation_mode(list(self.tokenizer.modules())):
            tokens, _ = self.tokenizer.tokenize(frames)
        shown = self.cfg.tokenizer.context_frames
        action = None if predictor.control is None else batch["action"][:, shown:]
        told = None
        if predictor.phrases is not None:
            told = Told(batch["semantic"][:, shown:], batch["has_semantic"][:, shown:])
        found = predictor(tokens, action, self._thinned(told))
        terms = {"tokens": found.loss}
        if found.reward is not None:
            reward, said = batch["reward"][:, shown:], found.reward
            if self.cfg.late_reward:
                reward, said = reward[:, 1:], said[:, :-1]
            terms["reward"] = F.mse_loss(said, symlog(reward))
        if told is not None and found.semantic is not None:
            away = (found.semantic - told.semantic).square().sum(-1) * told.known
            terms["phrase"] = away.sum() / told.known.sum().clamp(min=1)
        return terms

    def _thinned(self, told: Told | None) -> Told | None:
        """Leave some phrases out while learning, so that a dream without them means something."""
        if told is None or not self.training:
            return told
        kept = torch.rand(told.known.shape, device=told.known.device) >= self.cfg.phrase_dropout
        return told._replace(known=told.known & kept)

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
        dream = self._dream_after(_pictures(start.frames[:, -shown:]))
        beliefs, actions = [start], []
        rewards = [start.frames.new_zeros(len(start.frames), dtype=torch.float32)]
        for step in range(steps):
            now = beliefs[-1]
            seen = now._replace(scale=now.scale / 255.0) if self.cfg.blind_policy else now
            actions.append(policy(step, seen))
            frame, reward = dream.next(actions[-1], None)
            rewards.append(rewards[0] if reward is None else symexp(reward).float())
            beliefs.append(now.followed_by(as_bytes(frame)))
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
        shown, the first one stands in for those that are missing. In pre-training, phrases take
        the place of actions where the model has learnt with them. In the tokenizer's own phase
        nothing is predicted: every frame is drawn from its own tokens.

        Returns:
            Frames (B, T, H, W, 3) in [0, 1]: what was seen, as drawn by the model, and the dream.
        """
        frames = _pictures(batch["obs"])
        with evaluation_mode(list(self.modules())):
            if self.predictor is not None:
                return self._open_loop(frames, batch, seen)
            drawn = self.tokenizer(frames)
        return torch.cat([drawn.context, drawn.future], dim=1).clamp(0.0, 1.0).movedim(2, -1)

    def _dream_after(self, context: Tensor) -> Continuation:
        assert self.predictor is not None, "in the tokenizer's phase nothing is predicted"
        return Continuation(self.cfg, self.tokenizer, self.predictor, context)

    def _open_loop(self, frames: Tensor, batch: Batch, seen: int) -> Tensor:
        shown = self.cfg.tokenizer.context_frames
        head = frames[:, :seen]
        if seen < shown:
            head = torch.cat([head[:, :1].expand(-1, shown - seen, -1, -1, -1), head], dim=1)
        if head.shape[1] > shown:
            drawn = self.tokenizer(head)
            film = [drawn.context, drawn.future]
        else:
            film = [self.tokenizer.view(head).frames[:, -seen:]]
        dream = self._dream_after(head[:, -shown:])
        driven, told = dream.predictor.control is not None, None
        for t in range(seen, frames.shape[1]):
            if dream.predictor.phrases is not None and not driven:
                told = Told(batch["semantic"][:, t], batch["has_semantic"][:, t])
            frame, _ = dream.next(batch["action"][:, t] if driven else None, told)
            film.append(frame[:, None])
        return torch.cat(film, dim=1).clamp(0.0, 1.0).movedim(2, -1)

    @property
    def driver(self) -> Driver:
        """What leads its dreams: after fine-tuning the robot, before it phrases if there are."""
        if self.action_dim is not None:
            return "action"
        told = self.predictor is not None and self.predictor.phrases is not None
        return "phrase" if told else "nothing"

    @property
    def drive_dim(self) -> int:
        """Width of the actions that lead its dreams; 0: none do."""
        return self.action_dim or 0

    @torch.no_grad()
    def dreaming(self, start: Belief, shown: Tensor) -> TokenDreaming:
        """Begin a dream that goes on step by step; see `models.interfaces.Stepwise`.

        The frames of ``start`` are all that is needed of ``shown``.

        Raises:
            TypeError: ``start`` is not a belief of this model.
        """
        if not isinstance(start, StackedFrames):
            raise TypeError(f"start must be StackedFrames, got {type(start).__name__}")
        context = _pictures(start.frames[:, -self.cfg.tokenizer.context_frames :])
        with evaluation_mode(list(self.modules())):
            dream = self._dream_after(context)
        frame = dream.view.frames[:, -1].clamp(0.0, 1.0).movedim(1, -1)
        driven = self.action_dim is not None
        reward = frame.new_zeros(len(frame)) if driven else None
        return TokenDreaming(dream, start, frame, reward)

    def parts(self) -> Mapping[str, nn.Module]:
        """``tokenizer``, ``transformer``, ``control`` and ``phrases``, as far as there are such."""
        found: dict[str, nn.Module | None] = {"tokenizer": self.tokenizer}
        if self.predictor is not None:
            found["transformer"] = self.predictor.transformer
            found |= {"control": self.predictor.control, "phrases": self.predictor.phrases}
        return {name: part for name, part in found.items() if part is not None}

    def groups(self) -> Mapping[str, list[nn.Parameter]]:
        """``lower``: the tokenizer. ``model``: the transformer. What never learns is in neither."""
        fixed = [] if self.learn == "tokenizer" else self._codes
        still = {id(codes) for codes in fixed}
        lower = [x for x in self.tokenizer.parameters() if id(x) not in still]
        found = {"lower": lower if self.learn != "transformer" else []}
        if self.predictor is not None:
            found["model"] = list(self.predictor.parameters())
        return {name: parameters for name, parameters in found.items() if parameters}

    def clipped_along(self) -> Mapping[str, list[nn.Parameter]]:
        """Parameters that count when a group's gradients are clipped, although it has them not."""
        counted = self.learn == "both" and self.cfg.codes_in_clip
        return {"lower": self._codes} if counted else {}

    def evaluating(self) -> AbstractContextManager[None]:
        """Nothing that `observe` uses has modes."""
        return evaluation_mode([])

    def get_extra_state(self) -> dict[str, Any]:
        """The number of updates, which says when the tokenizer learns, and its last terms."""
        return {"updates": self.updates, "drawn": {k: x.cpu() for k, x in self.drawn.items()}}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take them up again.

        Raises:
            CheckpointError: They are not what `get_extra_state` gives.
        """
        device = self.tokenizer.context_codes.codes.device
        try:
            self.updates = int(state["updates"])
            self.drawn = {str(k): x.to(device).view(()) for k, x in state["drawn"].items()}
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"the world model's own state in this checkpoint is damaged ({error!r:.100}): take "
                "an earlier one from the same folder"
            ) from error


def _pictures(obs: Tensor) -> Tensor:
    """Bytes (B, T, H, W, 3) -> (B, T, 3, H, W) in [0, 1]."""
    return obs.movedim(-1, 2).float() / 255.0
