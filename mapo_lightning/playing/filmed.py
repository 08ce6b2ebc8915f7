"""A pre-trained model beside held-out clips: phrases lead its dream, or inferred actions do.

Shapes: C clips, T frames, V semantic vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mapo_lightning.models.interfaces import Stepwise
from mapo_lightning.playing.scene import Drive, Moment, dice, pictures, shown
from mapo_lightning.semantics.embed import Encoder
from mapo_lightning.semantics.phrase import format_phrase
from mapo_lightning.types import POSITIONS, Batch, ConfigError

_LATENT_REACH = 3.0  # inferred actions are about Gaussian


class FilmedScene:
    """Held-out clips and the dreams of what follows their first frames.

    Args:
        names: What to call the models.
        worlds: The models, led by the same.
        batch: Clips, keys of `types`, axes (C, T), where the models are.
        encoder: Makes a typed phrase a vector.
        watch: Frames that are watched before the dreams begin.
        suggestions: Slot -> what to suggest for it.

    Raises:
        ConfigError: The models are led by something else each.
    """

    def __init__(
        self,
        names: Sequence[str],
        worlds: Sequence[Stepwise],
        batch: Batch,
        encoder: Encoder,
        watch: int,
        suggestions: dict[str, list[str]] | None = None,
    ) -> None:
        drivers = {(world.driver, world.drive_dim) for world in worlds}
        if len(drivers) > 1:
            led = ", ".join(sorted(driver for driver, _ in drivers))
            raise ConfigError(
                f"models are compared with the same drive, and these are led by {led}: give "
                "checkpoints of one kind"
            )
        self.names, self.worlds = tuple(names), tuple(worlds)
        self.driver, self.drive_dim = drivers.pop()
        self.reach = _LATENT_REACH
        self.auto = "the phrases of the clip" if self.driver == "phrase" else ""
        self.batch, self.encoder = batch, encoder
        self.starts, self.length = batch["obs"].shape[:2]
        self.watch = min(watch, self.length)
        self.device = batch["obs"].device
        self.about: dict[str, Any] = {
            "task": f"{self.starts} held-out clips of {self.length} frames",
            "suggestions": suggestions or {},
        }
        self._start = 0

    def begin(self, start: int) -> list[Moment]:
        """As `Scene.begin`."""
        self._start = start
        past: list[Moment] = []
        for _ in range(self.watch):
            past.append(self._film(len(past)))
            past[-1] = self.dream_anew(past)
        return past

    def advance(self, past: Sequence[Moment], drive: Drive) -> Moment:
        """As `Scene.advance`. Where the clip has ended, the dreams go on alone."""
        now, number = past[-1], len(past)
        drive = drive if number < self.length else drive._replace(auto=False)
        led, said = self._led(number, drive)
        dreams = []
        for dream in now.dreams:
            with dice(self._start, number, self.device):
                dreams.append(dream.step(led))
        return self._film(number)._replace(
            dreams=tuple(dreams),
            frames=pictures(dreams),
            dreamt=now.dreamt + 1,
            action=drive.action if self.drive_dim else (),
            phrase=said,
        )

    def dream_anew(self, past: Sequence[Moment]) -> Moment:
        """As `Scene.dream_anew`."""
        number = min(len(past), self.length)
        clip = {key: x[self._start, :number][None] for key, x in self.batch.items()}
        dreams = []
        for world in self.worlds:
            with torch.no_grad(), dice(self._start, len(past), self.device), world.evaluating():
                belief = world.observe(clip).at(number - 1)
                dreams.append(world.dreaming(belief, shown(past, self.device)))
        return past[-1]._replace(dreams=tuple(dreams), frames=pictures(dreams), dreamt=0)

    def close(self) -> None:
        """Nothing to free."""

    def _film(self, number: int) -> Moment:
        """What the clip shows, without a dream."""
        frame = self.batch["obs"][self._start, min(number, self.length - 1)].cpu().numpy()
        ended = "" if number < self.length - 1 else "the clip is over"
        return Moment(frame, (), (), ended=ended)

    def _led(self, number: int, drive: Drive) -> tuple[Batch, str]:
        """What leads to moment ``number``, for the models and for people."""
        place = torch.tensor([number % POSITIONS], device=self.device)
        if self.driver != "phrase":
            action = np.asarray(drive.action, np.float32)[None]
            return {"action": torch.from_numpy(action).to(self.device), "position": place}, ""
        if drive.auto:
            keys = ("semantic", "has_semantic")
            own = {key: self.batch[key][self._start, number][None] for key in keys}
            said = "as in the clip" if bool(own["has_semantic"]) else "as in the clip: nothing"
            return own | {"position": place}, said
        vector = np.zeros(self.encoder.semantic_dim, np.float32)
        if drive.phrase is not None:
            vector = self.encoder.encode(drive.phrase, None)
        known = torch.tensor([drive.phrase is not None], device=self.device)
        led = {"semantic": torch.from_numpy(vector)[None].to(self.device), "has_semantic": known}
        said = "" if drive.phrase is None else format_phrase(drive.phrase)
        return led | {"position": place}, said
