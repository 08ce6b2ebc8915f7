"""The state of a MuJoCo simulation, with what a task changes in its model.

``mujoco`` is imported when it is needed: `prepare_gl` comes before its first import.

Source: https://mujoco.readthedocs.io/en/stable/computation/index.html#the-state
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.types import EnvironmentSetupError

Arrays = dict[str, NDArray[Any]]

_HEAVY = ("tex_", "mesh_", "skin_", "bvh_", "oct_", "name", "text_", "paths")
"""Fields of a model that no task of a suite changes in an episode, and that take megabytes."""


def save_mujoco(model: Any, data: Any) -> dict[str, Any]:
    """Copy everything that the next step and the next picture depend on.

    The integration state (time, positions, velocities, activations, controls, applied forces,
    mocap bodies, user data, warm start) determines all steps that follow. Pictures, sensors and
    rewards also read what was computed from it, which may be older by a substep: so these arrays
    are copied too. Tasks write to their model: sizes and places of targets, gains, terrain.

    Args:
        model: An ``mjModel``.
        data: Its ``mjData``.

    Returns:
        Arrays and numbers, by name.
    """
    import mujoco

    signature = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(model, signature))
    mujoco.mj_getState(model, data, state, signature)
    fixed = _arrays(mujoco.MjData(model))  # those of contacts and constraints are empty there
    return {
        "state": state,
        "data": {k: v.copy() for k, v in _arrays(data).items() if k in fixed and fixed[k].size},
        "model": {k: v.copy() for k, v in _arrays(model).items() if not k.startswith(_HEAVY)},
        "options": _options(model),
    }


def restore_mujoco(model: Any, data: Any, saved: dict[str, Any]) -> None:
    """Go on from what `save_mujoco` returned, in the same simulation or another of the same task.

    Raises:
        EnvironmentSetupError: The models differ in size.
    """
    import mujoco

    signature = mujoco.mjtState.mjSTATE_INTEGRATION
    size = mujoco.mj_stateSize(model, signature)
    if len(saved["state"]) != size:
        raise EnvironmentSetupError(
            f"a MuJoCo state of {len(saved['state'])} numbers was given to a model that has "
            f"{size}: restore it in an environment of the same task"
        )
    _write(model, saved["model"])
    for name, value in saved["options"].items():
        setattr(model.opt, name, value)
    # What is left of another state in contacts and constraints must not reach the solver.
    mujoco.mj_resetData(model, data)
    mujoco.mj_setState(model, data, saved["state"], signature)
    mujoco.mj_forward(model, data)
    _write(data, saved["data"])


def memory_of(model: Any, data: Any) -> Arrays:
    """Arrays of a simulation that keep their place, by name: a task may hold views of them."""
    import mujoco

    fixed = _arrays(mujoco.MjData(model))  # those of contacts and constraints are empty there
    found = {f"data.{k}": v for k, v in _arrays(data).items() if k in fixed and fixed[k].size}
    return found | {f"model.{k}": v for k, v in _arrays(model).items() if v.size}


def _arrays(struct: Any) -> Arrays:
    names = (name for name in dir(struct) if not name.startswith("_"))
    found = ((name, getattr(struct, name)) for name in names)
    return {name: value for name, value in found if isinstance(value, np.ndarray)}


def _options(model: Any) -> dict[str, Any]:
    """Numbers and arrays of ``mjOption``: time step, gravity, solver, flags."""
    names = (name for name in dir(model.opt) if not name.startswith("_"))
    return {name: np.array(getattr(model.opt, name)).copy()[()] for name in names}


def _write(struct: Any, arrays: Arrays) -> None:
    for name, value in arrays.items():
        getattr(struct, name)[...] = value
