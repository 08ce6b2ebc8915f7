"""Exact states of simulators, restored in the environment that saved them or in another like it.

A simulator that can do it is `Restorable`. What follows a restored state equals, bit for bit, what
follows it without any saving: pictures, rewards, ends and successes, whatever was played between.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.types import EnvironmentSetupError


@dataclass(frozen=True)
class Snapshot:
    """The state of one simulator; opaque, but it can be pickled.

    Like every pickle it may run code when it is read: take snapshots only from your own programs.
    """

    task: str
    """What was saved; only a simulator of the same task takes it back."""
    content: bytes


@runtime_checkable
class Restorable(Protocol):
    """A simulator whose state can be saved, in the middle of an episode."""

    def save(self) -> Snapshot:
        """The whole state: physics, clock, random stream, and what the task remembers.

        Raises:
            EnvironmentSetupError: The simulator holds something that cannot be saved.
        """
        ...

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a state that this simulator, or another of the same task, has saved.

        Raises:
            EnvironmentSetupError: The snapshot is of another task.
        """
        ...


class Freezer:
    """Turns Python objects into bytes and back; what is alive is named, not copied.

    Args:
        task: Name of the task, for messages.
        live: Objects that every simulator of this task has one of, by name, such as its model. A
            reference to one becomes, in another simulator, a reference to that one's own.
        memory: Arrays of the simulation, by name. Tasks keep views of them, some without meaning
            to, and what they read there changes with every step: a view stays one.
    """

    def __init__(
        self,
        task: str,
        live: Mapping[str, object],
        memory: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        self.task, self._live, self._memory = task, dict(live), dict(memory or {})

    def freeze(self, content: object) -> Snapshot:
        """Copy a tree of objects.

        Raises:
            EnvironmentSetupError: Something in it cannot be copied.
        """
        try:
            return Snapshot(self.task, self._dump(content))
        except Exception as error:  # pickling runs the methods of other people's classes
            where = self._culprit(content)
            raise EnvironmentSetupError(
                f"the state of {self.task} cannot be saved, because {where} cannot be copied "
                f"({type(error).__name__}: {error}): give the simulator methods save and restore"
            ) from error

    def thaw(self, snapshot: Snapshot) -> Any:
        """Return what was copied, as new objects.

        Raises:
            EnvironmentSetupError: The snapshot is of another task.
        """
        if snapshot.task != self.task:
            raise EnvironmentSetupError(
                f"a state of {snapshot.task} was given to {self.task}: restore it in an "
                "environment of the same task"
            )
        reader = pickle.Unpickler(io.BytesIO(snapshot.content))
        reader.persistent_load = self._found  # type: ignore[method-assign]
        return reader.load()

    def _found(self, name: Any) -> Any:
        """What a name stands for in this simulator."""
        if isinstance(name, str):
            return self._live[name]
        field, *form = name
        return _view(self._memory[field], *form)

    def _dump(self, content: object) -> bytes:
        stream = io.BytesIO()
        _Writer(stream, self._live, self._memory).dump(content)
        return stream.getvalue()

    def _culprit(self, content: object) -> str:
        """The first entry of nested dicts that cannot be copied, in words."""
        if isinstance(content, dict):
            for name, part in content.items():
                try:
                    self._dump(part)
                except Exception:
                    inner = self._culprit(part)
                    own = f"'{name}' of type {type(part).__module__}.{type(part).__qualname__}"
                    return inner if isinstance(part, dict) and part else own
        return f"a {type(content).__qualname__}"


class _Writer(pickle.Pickler):
    """Writes names in place of what is alive, and views as views of what they look at."""

    def __init__(
        self, stream: io.BytesIO, live: Mapping[str, object], memory: Mapping[str, NDArray[Any]]
    ) -> None:
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self._names = {id(thing): name for name, thing in live.items()}
        bounds = ((name, *np.lib.array_utils.byte_bounds(x)) for name, x in memory.items())
        self._bounds = [(name, low, high) for name, low, high in bounds if high > low]

    def persistent_id(self, thing: Any) -> Any:
        if isinstance(thing, np.ndarray) and thing.size and not thing.flags.owndata:
            low, high = np.lib.array_utils.byte_bounds(thing)
            for name, first, end in self._bounds:
                if first <= low and high <= end:
                    start = thing.__array_interface__["data"][0] - first
                    return name, start, thing.shape, thing.strides, thing.dtype.str
        return self._names.get(id(thing))

    def reducer_override(self, thing: Any) -> Any:
        base = thing.base if type(thing) is np.ndarray else None
        if type(base) is not np.ndarray or not base.flags.owndata or not base.flags.c_contiguous:
            return NotImplemented
        start = thing.__array_interface__["data"][0] - base.__array_interface__["data"][0]
        form = start, thing.shape, thing.strides, thing.dtype.str
        return (_view, (base, *form)) if thing.dtype == base.dtype else NotImplemented


def _view(
    array: NDArray[Any], start: int, shape: tuple[int, ...], strides: tuple[int, ...], kind: str
) -> NDArray[Any]:
    """Part of an array, as a view."""
    found: NDArray[Any] = np.ndarray(shape, kind, array.data, start, strides)
    return found


def attributes(thing: object, without: Collection[str] = ()) -> dict[str, Any]:
    """Attributes of an object, but for some."""
    return {name: value for name, value in vars(thing).items() if name not in without}


def set_attributes(thing: object, found: Mapping[str, Any], without: Collection[str] = ()) -> None:
    """Give an object exactly these attributes; those of ``without`` stay as they are."""
    for name in [name for name in vars(thing) if name not in found and name not in without]:
        del vars(thing)[name]
    vars(thing).update(found)
