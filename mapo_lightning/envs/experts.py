"""Meta-World's 50 scripted experts: a sentence about each task, and the scenes to film them in."""

from __future__ import annotations

from collections.abc import Sequence

from mapo_lightning.envs.settings import EnvConfig
from mapo_lightning.types import ConfigError

SENTENCES = {
    "assembly": "A robot arm picks a ring up and puts it over a peg",
    "basketball": "A robot arm drops a ball into a basket",
    "bin-picking": "A robot arm moves a block from one bin into another bin",
    "box-close": "A robot arm covers a box with its lid",
    "button-press": "A robot arm presses a button on the front of a box",
    "button-press-topdown": "A robot arm presses a button on top of a box down",
    "button-press-topdown-wall": "A robot arm presses a button on top of a box behind a wall down",
    "button-press-wall": "A robot arm presses a button behind a wall",
    "coffee-button": "A robot arm presses the button of a coffee machine",
    "coffee-pull": "A robot arm pulls a mug from a coffee machine",
    "coffee-push": "A robot arm pushes a mug under a coffee machine",
    "dial-turn": "A robot arm turns a dial",
    "disassemble": "A robot arm removes a ring from a peg",
    "door-close": "A robot arm closes a door",
    "door-lock": "A robot arm turns a lock shut and locks a door",
    "door-open": "A robot arm opens a door by its handle",
    "door-unlock": "A robot arm turns a lock open and unlocks a door",
    "drawer-close": "A robot arm pushes a drawer shut",
    "drawer-open": "A robot arm pulls a drawer open",
    "faucet-close": "A robot arm turns a faucet shut",
    "faucet-open": "A robot arm turns a faucet open",
    "hammer": "A robot arm hits a nail with a hammer",
    "hand-insert": "A robot arm enters a hole with its hand",
    "handle-press": "A robot arm presses a handle down",
    "handle-press-side": "A robot arm presses a handle beside it down",
    "handle-pull": "A robot arm pulls a handle up",
    "handle-pull-side": "A robot arm pulls a handle beside it up",
    "lever-pull": "A robot arm pulls a lever up",
    "peg-insert-side": "A robot arm inserts a peg into a hole in a box",
    "peg-unplug-side": "A robot arm pulls a peg out of a hole",
    "pick-out-of-hole": "A robot arm picks a block out of a hole",
    "pick-place": "A robot arm picks a block up and carries it to a goal",
    "pick-place-wall": "A robot arm lifts a block over a wall to a goal",
    "plate-slide": "A robot arm pushes a plate into a cabinet",
    "plate-slide-back": "A robot arm pulls a plate out of a cabinet",
    "plate-slide-back-side": "A robot arm pulls a plate sideways out of a cabinet",
    "plate-slide-side": "A robot arm pushes a plate sideways into a cabinet",
    "push": "A robot arm pushes a block to a goal",
    "push-back": "A robot arm pulls a block to a goal near itself",
    "push-wall": "A robot arm pushes a block around a wall to a goal",
    "reach": "A robot arm reaches a goal",
    "reach-wall": "A robot arm reaches a goal behind a wall",
    "shelf-place": "A robot arm puts a block on a shelf",
    "soccer": "A robot arm pushes a ball into a net",
    "stick-pull": "A robot arm pulls a box with a stick",
    "stick-push": "A robot arm pushes a box with a stick",
    "sweep": "A robot arm sweeps a block off a table",
    "sweep-into": "A robot arm sweeps a block into a hole",
    "window-close": "A robot arm slides a window shut",
    "window-open": "A robot arm slides a window open",
}
"""Name of a task -> what its expert does."""


def expert_scenes(chosen: Sequence[str], env: EnvConfig) -> list[EnvConfig]:
    """Scenes in which the experts are filmed as an agent sees Meta-World.

    Args:
        chosen: Tasks as ``metaworld/NAME``; empty: all of them.
        env: The task of fine-tuning, whose camera and action repeat are used if it is one of
            Meta-World's. Otherwise the camera is the suite's, and time runs as fast as in a video.

    Raises:
        ConfigError: One of them is no task of Meta-World.
    """
    for scene in chosen:
        kind, _, name = scene.partition("/")
        if kind != "metaworld" or name.removesuffix("-v3") not in SENTENCES:
            raise ConfigError(
                f"demo.scenes must hold metaworld/TASK with data=metaworld_experts, got '{scene}'; "
                f"the tasks are {', '.join(SENTENCES)}"
            )
    names = [scene.partition("/")[2].removesuffix("-v3") for scene in chosen] or list(SENTENCES)
    same = env.kind == "metaworld"
    camera = env.camera if same and env.camera is not None else "corner"
    repeat = env.action_repeat if same else None
    return [
        EnvConfig(
            kind="metaworld",
            name=name,
            camera=camera,
            action_repeat=repeat,
            render_quality=env.render_quality,
        )
        for name in names
    ]
