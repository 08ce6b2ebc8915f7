"""Can a dream be acted on? Which action happened in it, and what it pays.

Shapes: C contexts, T frames, H W image, A action, K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mapo_lightning.judging.measure import Measure, Values, reachable
from mapo_lightning.judging.regression import Reader, fit
from mapo_lightning.models.interfaces import Belief, WorldModel
from mapo_lightning.types import Batch


def inverse_model(batch: Batch, seed: int = 0) -> Reader:
    """Learn, from real pairs of frames, which action leads from one to the next.

    Args:
        batch: Real clips with ``obs`` (C, T, H, W, 3) uint8, ``action`` (C, T, A) and ``is_first``;
            others than those that it will judge.
        seed: Of the training.
    """
    pairs = _pairs(batch["obs"].float() / 255.0).flatten(0, 1)
    action, inside = batch["action"][:, 1:].flatten(0, 1), ~batch["is_first"][:, 1:].flatten()
    return fit(pairs[inside], action[inside], seed)


def executable(
    inverse: Reader, action: Tensor, frames: Tensor, seen: int, steps: int = 5
) -> dict[str, Measure]:
    """R² of the actions that the inverse model reads off frames, per action dimension.

    Of the true frames it is the ceiling: what can be read at all. A dream that does not obey its
    actions is near or below 0, however sharp it looks; so is one in which nothing can be seen. The
    variance is taken over all contexts and steps that are read.

    Args:
        inverse: Of `inverse_model`.
        action: What was really done, (C, T, A).
        frames: Dreamt with these actions, or the truth, (C, T, H, W, 3) in [0, 1].
        seen: Frames that were shown.
        steps: Dreamt steps that are read, from the first pair of dreamt frames on.

    Returns:
        ``action_0`` ... and ``action``, of all dimensions together; one column.
    """
    last = min(seen + 1 + steps, frames.shape[1])
    pairs = _pairs(frames[:, seen:last])
    with torch.no_grad():
        read = inverse(pairs.flatten(0, 1)).unflatten(0, pairs.shape[:2])
    real = action[:, seen + 1 : last]
    error = (read - real).square().sum(dim=1).double().cpu().numpy()  # (C, A)
    spread = (real - real.mean(dim=(0, 1))).square().sum(dim=1).double().cpu().numpy()
    ahead = (last - seen,)
    found = {
        f"action_{i}": Measure(ahead, error[:, i : i + 1], spread[:, i : i + 1])
        for i in range(error.shape[1])
    }
    return found | {"action": Measure(ahead, error.sum(1)[:, None], spread.sum(1)[:, None])}


def foreseen(world_model: WorldModel, batch: Batch, seen: int, seed: int = 0) -> dict[str, Measure]:
    """How well a dream with the true actions foresees rewards and ends of episodes.

    ``reward``: R² of each horizon's reward. ``reward_sum``: R² of the sum up to it. Two ways of
    being wrong that both lower R²: ``reward_bias``, mean of foreseen minus true, and
    ``reward_slope``, how much of a true difference is foreseen; they are 0 and 1 where rewards are
    calibrated. ``going_on``: Brier score of the foreseen probability that an episode goes on, lower
    is better. Where a model learns an intrinsic bonus with the reward, what it foresees holds it.

    Args:
        world_model: With a head for rewards.
        batch: Clips inside one episode each, axes (C, T).
        seen: Frames that were shown.
        seed: Of the dream.
    """
    action, device = batch["action"], batch["obs"].device
    steps = action.shape[1] - seen

    def as_it_was(step: int, belief: Belief) -> Tensor:
        return action[:, seen + step]

    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        world_model.evaluating(),
    ):
        torch.manual_seed(seed)
        start = world_model.observe({key: x[:, :seen] for key, x in batch.items()}).at(seen - 1)
        dream = world_model.imagine(start, as_it_was, steps)
    told, true = dream.reward[1:].T, batch["reward"][:, seen:]
    ahead = reachable(steps)
    at = [horizon - 1 for horizon in ahead]
    goes_on = 1.0 - batch["is_terminal"][:, seen:].float()
    brier = (dream.discount[1:].T - goes_on).square()
    return _of_rewards(told, true, ahead) | {"going_on": Measure(ahead, _plain(brier[:, at]))}


def _of_rewards(told: Tensor, true: Tensor, ahead: tuple[int, ...]) -> dict[str, Measure]:
    """Measures of foreseen (C, I) and true rewards."""
    at = [horizon - 1 for horizon in ahead]
    single = (told[:, at], true[:, at])
    summed = tuple(x.cumsum(dim=1)[:, at] for x in (told, true))
    found = {}
    for name, (guess, real) in (("reward", single), ("reward_sum", summed)):
        spread = (real - real.mean(dim=0)).square()
        found[name] = Measure(ahead, _plain((guess - real).square()), _plain(spread))
    guess, real = single
    around = real - real.mean(dim=0)
    # 1 - sum((real - guess) * around) / sum(around²) is the slope of the guess over the truth.
    rest = (real - guess) * around
    found["reward_slope"] = Measure(ahead, _plain(rest), _plain(around.square()))
    found["reward_bias"] = Measure(ahead, _plain(guess - real))
    return found


def _pairs(frames: Tensor) -> Tensor:
    """Each frame with the next one: (C, T, H, W, 3) -> (C, T - 1, 6, H, W)."""
    pictures = frames.movedim(-1, 2)
    return torch.cat([pictures[:, :-1], pictures[:, 1:]], dim=2)


def _plain(values: Tensor) -> Values:
    found: Values = values.double().cpu().numpy()
    return found
