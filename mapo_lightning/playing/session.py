"""One play: commands in, moments out. Knows neither pages nor sockets.

The moments so far are kept. Going back shows one of them again; going on from there drops those
after it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from mapo_lightning.playing import recording
from mapo_lightning.playing.commands import CommandError, action_of, parse, phrase_of, slots_of
from mapo_lightning.playing.scene import Drive, Moment, Scene
from mapo_lightning.playing.settings import FASTEST, MOST_MOMENTS, PlayConfig
from mapo_lightning.types import MapoError

Event = dict[str, Any]


class Session:
    """A play of one player.

    Args:
        scene: What is played; closed with the session.
        cfg: Rate and first start.
        folder: Where recordings are written.
    """

    def __init__(self, scene: Scene, cfg: PlayConfig, folder: Path) -> None:
        self.scene, self.cfg, self.folder = scene, cfg, folder
        self.running = False
        self.fps = cfg.fps
        """Steps a second while it runs."""
        self.saved: dict[str, Path] = {}
        """Recordings of this play, by file name."""
        self._drive = Drive((0.0,) * scene.drive_dim)
        self._serial = 0
        self._film: list[Moment] | None = None
        self._start = cfg.start % scene.starts
        self._past: list[Moment] = []
        self._place = 0

    def open(self) -> Event:
        """Begin at the first start; returns what the page needs to know of the scene."""
        scene = self.scene
        self._begin(self._start)
        return {
            "is": "hello", "names": list(scene.names), "driver": scene.driver,
            "width": scene.drive_dim, "reach": scene.reach, "auto": scene.auto,
            "starts": scene.starts, "fps": self.fps, "side": self.now.real.shape[0],
            "longest": MOST_MOMENTS, **scene.about,
        }  # fmt: skip

    @property
    def now(self) -> Moment:
        """What is shown."""
        return self._past[self._place]

    def close(self) -> None:
        """Free the scene; a second call does nothing."""
        self.scene.close()

    def obey(self, message: str | bytes) -> list[Event]:
        """Do what a message says. Never raises what the player can cause.

        Returns:
            What to tell the page besides the moment that is now shown: errors, saved files.
        """
        try:
            command = parse(message)
            events: list[Event] = getattr(self, f"_do_{command.pop('do')}")(**command) or []
        except MapoError as error:
            self.running = self.running and isinstance(error, CommandError)
            return [_error(error)]
        return events

    def tick(self) -> list[Event]:
        """Take the next step of a play that runs; an error stops it."""
        if not self.running:
            return []
        try:
            self._advance()
        except MapoError as error:
            self.running = False
            return [_error(error)]
        return []

    def state(self) -> Event:
        """The moment that is shown, without its pictures, and how the play stands."""
        now = self.now
        return {
            "is": "moment", "number": self._place, "last": len(self._past) - 1,
            "start": self._start, "dreamt": now.dreamt, "action": list(now.action),
            "phrase": now.phrase, "reward": _finite(now.reward), "ended": now.ended,
            "expected": [_number(dream.reward) for dream in now.dreams],
            "uncertainty": [_number(dream.uncertainty) for dream in now.dreams],
            "running": self.running, "auto": self._drive.auto, "serial": self._serial,
            "recording": self._film is not None,
        }  # fmt: skip

    def pictures(self) -> bytes:
        """Reality, then every dream: rows of RGB bytes, H x W x 3 each."""
        return b"".join(frame.tobytes() for frame in (self.now.real, *self.now.frames))

    def _do_act(self, action: list[Any], serial: int) -> None:
        if not self.scene.drive_dim:
            led = ", but phrases do" if self.scene.driver == "phrase" else ""
            raise CommandError(f"no action leads this dream{led}")
        found = action_of(action, self.scene.drive_dim, self.scene.reach)
        self._serial = max(0, min(serial, 2**53))
        self._drive = self._drive._replace(action=found)

    def _do_phrase(self, text: str) -> list[Event]:
        self._check_told()
        self._drive = self._drive._replace(phrase=phrase_of(text), auto=False)
        return self._told()

    def _do_slots(self, slots: list[Any]) -> list[Event]:
        self._check_told()
        self._drive = self._drive._replace(phrase=slots_of(slots), auto=False)
        return self._told()

    def _check_told(self) -> None:
        if self.scene.driver != "phrase":
            led = {"latent": ", but inferred actions do", "action": ", but actions do"}
            raise CommandError(
                f"no phrase leads this dream{led.get(self.scene.driver, '')}: phrases lead the "
                "dreams of checkpoints of pre-training with method=mapo"
            )

    def _told(self) -> list[Event]:
        """Say how a phrase was understood."""
        phrase = self._drive.phrase
        return [{"is": "told", "slots": None if phrase is None else list(phrase)}]

    def _do_auto(self, on: bool) -> None:
        if on and not self.scene.auto:
            raise CommandError("nothing but you can lead this dream")
        if on and self._ended:
            raise CommandError(
                f"{self.now.ended}, so {self.scene.auto} cannot lead on: begin again, or go back"
            )
        self._drive = self._drive._replace(auto=on)

    def _do_run(self, on: bool) -> None:
        self.running = on

    def _do_speed(self, fps: int) -> None:
        self.fps = max(1, min(fps, FASTEST))

    def _do_step(self) -> None:
        self.running = False
        self._advance()

    def _do_rewind(self, steps: int) -> None:
        self._do_go(self._place - max(0, steps))

    def _do_go(self, number: int) -> None:
        self.running = False
        self._place = max(0, min(number, len(self._past) - 1))

    def _do_begin(self, start: int) -> None:
        if not 0 <= start < self.scene.starts:
            raise CommandError(f"the start must lie in [0, {self.scene.starts - 1}]")
        self._begin(start)

    def _do_dream(self) -> None:
        del self._past[self._place + 1 :]
        self._past[self._place] = self.scene.dream_anew(self._past)

    def _do_record(self, on: bool) -> list[Event]:
        if on:
            self._film = [self.now]
            return []
        film, self._film = self._film or [], None
        files = recording.save(film, self.folder, self.fps)
        self.saved |= {path.name: path for path in files}
        names = [path.name for path in files]
        return [{"is": "saved", "files": names, "folder": str(self.folder)}]

    def _begin(self, start: int) -> None:
        # Nothing is kept of the play before if this fails: the simulator stands elsewhere.
        past = self.scene.begin(start)
        self._start, self._past, self._place = start, past, len(past) - 1
        self._drive = self._drive._replace(auto=False) if self._ended else self._drive
        self._keep()

    @property
    def _ended(self) -> bool:
        return bool(self.now.ended)

    def _advance(self) -> None:
        if self._place + 1 >= MOST_MOMENTS:
            raise CommandError(
                f"a play has at most {MOST_MOMENTS:,} moments: begin again, or go back"
            )
        del self._past[self._place + 1 :]
        before = self._ended
        self._past.append(self.scene.advance(self._past, self._drive))
        self._place += 1
        if self._ended and not before:
            # The reality stands still: whoever wants to dream on alone says so.
            self.running, self._drive = False, self._drive._replace(auto=False)
        self._keep()

    def _keep(self) -> None:
        """Record the moment that is shown."""
        if self._film is not None and len(self._film) < MOST_MOMENTS:
            self._film.append(self.now)


def _error(error: MapoError) -> Event:
    return {"is": "error", "text": str(error)[:1000]}


def _number(value: Tensor | None) -> float | None:
    return None if value is None else _finite(float(value[0]))


def _finite(value: float | None) -> float | None:
    """JSON knows no other numbers."""
    return value if value is not None and math.isfinite(value) else None
