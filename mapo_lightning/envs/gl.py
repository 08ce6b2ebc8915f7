"""OpenGL without a display: finds a backend that works, and draws MuJoCo models with it.

MuJoCo reads ``MUJOCO_GL`` once, when it is first imported, and a bad choice shows only at the
first frame, sometimes as a crash. So the choice is made before that import, by drawing one frame
in a child process. Only this file and `mujoco_state.py` import ``mujoco``.
"""

from __future__ import annotations

import atexit
import functools
import json
import logging
import os
import subprocess
import sys
import weakref
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.files import atomic_write
from mapo_lightning.types import EnvironmentSetupError, Frames

log = logging.getLogger(__name__)

BACKENDS = ("egl", "osmesa")
"""Backends to try, best first: both give the same pixels, EGL is faster and can use a GPU."""

APT_LINE = (
    "apt-get install -y --no-install-recommends libegl1 libgl1 libgl1-mesa-dri"
    " (or, instead of these three: libosmesa6)"
)
"""Packages that give a bare Debian or Ubuntu machine a software renderer."""

_PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string(
    '<mujoco><worldbody><light pos="0 0 2"/><geom size="1" rgba="1 0 0 1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 16, 16) as renderer:
    renderer.update_scene(data)
    assert renderer.render().max() > 0, 'the frame is black'
"""
_PROBE_SECONDS = 120.0

SMALLEST = 64
"""Side of the smallest picture that is drawn, in pixels."""

_SCENERY = ("", "skybox", "grid", "T_floor", "T_table", "T_wallmetal")  # names of textures


@functools.cache
def prepare_gl() -> str:
    """Make MuJoCo draw off-screen in this process; call before its first import.

    Respects ``MUJOCO_GL`` if the user has set it, and tries EGL and OSMesa otherwise. What worked
    is remembered until the machine restarts, so that only the first program has to test.

    Returns:
        The backend, as ``MUJOCO_GL`` now says.

    Raises:
        EnvironmentSetupError: No backend can draw; the message names the packages to install.
    """
    wanted = os.environ.get("MUJOCO_GL", "").strip().lower()
    if not wanted and "mujoco" in sys.modules:
        raise EnvironmentSetupError(
            "mujoco was imported before an off-screen renderer was chosen, and now cannot change. "
            "Set MUJOCO_GL=egl in the environment, or build an environment before that import."
        )
    reasons = {}
    for backend in (wanted,) if wanted else BACKENDS:
        reason = _why_not(backend)
        if reason is None:
            os.environ["MUJOCO_GL"] = backend
            log.debug("drawing with MUJOCO_GL=%s", backend)
            return backend
        reasons[backend] = reason
    tried = "; ".join(f"MUJOCO_GL={name}: {reason}" for name, reason in reasons.items())
    hint = "Unset MUJOCO_GL to let a backend be found, or install one" if wanted else "Install one"
    raise EnvironmentSetupError(
        f"cannot draw MuJoCo scenes off-screen. Tried {tried}. {hint}, as root: {APT_LINE}"
    )


def _why_not(backend: str) -> str | None:
    """Draw one frame in a child process; None if that worked, else the reason."""
    memo = _memo_path()
    known = _read_memo(memo)
    key = f"{_boot_id()} {metadata.version('mujoco')} {sys.executable} {backend}"
    if key in known:
        return None
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env={**os.environ, "MUJOCO_GL": backend},
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"no frame in {_PROBE_SECONDS:.0f} s"
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return lines[-1][:300] if lines else f"the test ended with code {done.returncode}"
    # Failures are not remembered: the user fixes them and tries again.
    _write_memo(memo, [key, *(k for k in known if k.startswith(_boot_id()))])
    return None


def _memo_path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mapo_lightning" / "gl.json"


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown-boot"


def _read_memo(path: Path) -> list[str]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return [str(key) for key in known] if isinstance(known, list) else []


def _write_memo(path: Path, keys: list[str]) -> None:
    try:
        with atomic_write(path) as draft:
            draft.write_text(json.dumps(keys))
    except OSError as error:  # with a read-only home every program tests again
        log.debug("cannot remember the renderer in %s: %s", path, error)


class OffscreenCamera:
    """Draws one MuJoCo model from one of its cameras, at any size, always upright.

    Every instance has its own OpenGL context and makes it current before it draws, so that
    several environments in one process cannot show each other's scene (Metaworld #448).

    Args:
        model: An ``mjModel``; its visual quality settings are changed.
        camera: Id or name of a camera of the model.
        quality: ``full`` or ``fast``, as in `EnvConfig`.

    Raises:
        EnvironmentSetupError: The model has no such camera.
    """

    def __init__(self, model: Any, camera: int | str, quality: str) -> None:
        self._model, self._quality = model, quality
        self._camera = _camera_id(model, camera)
        self._renderers: dict[int, Any] = {}
        if quality == "fast":  # read once, when an OpenGL context is made
            model.vis.quality.shadowsize = 256
            model.vis.quality.offsamples = 0

    def frame(self, data: Any, size: int) -> Frames:
        """Draw the state ``data`` (``mjData``) as a new array (size, size, 3) uint8.

        Small pictures are the means of larger ones: a thin leg would fall between their pixels.
        """
        times = -(-SMALLEST // size)
        renderer = self._renderers.get(size * times) or self._new_renderer(size * times)
        renderer.update_scene(data, camera=self._camera)
        image: Frames = renderer.render()
        if times > 1:
            blocks = image.reshape(size, times, size, times, 3)
            image = blocks.mean(axis=(1, 3)).round().astype(np.uint8)
        return np.ascontiguousarray(image[::-1]) if self._is_upside_down(data) else image

    def project(self, data: Any, points: NDArray[np.float64], size: int) -> NDArray[np.float64]:
        """Where points in the world are seen.

        Args:
            data: The state, an ``mjData``.
            points: World coordinates (P, 3), metres.
            size: Height and width of the image, in pixels.

        Returns:
            Pixels (P, 2) as (right, down) from the upper left corner; NaN behind the camera.
        """
        seen = (points - data.cam_xpos[self._camera]) @ data.cam_xmat[self._camera].reshape(3, 3)
        depth = np.where(seen[:, 2] < 0.0, -seen[:, 2], np.nan)
        focal = 0.5 * size / np.tan(np.radians(self._model.cam_fovy[self._camera]) / 2.0)
        right, up = focal * seen[:, 0] / depth, focal * seen[:, 1] / depth
        return np.stack(
            [size / 2 + right, size / 2 + (up if self._is_upside_down(data) else -up)], axis=1
        )

    def renew_terrain(self) -> None:
        """Draw height fields as the model has them now; contexts keep those they were made with."""
        import mujoco

        for renderer in self._renderers.values() if self._model.nhfield else ():
            if renderer._gl_context:
                renderer._gl_context.make_current()
            for field in range(self._model.nhfield):
                mujoco.mjr_uploadHField(self._model, renderer._mjr_context, field)

    def _is_upside_down(self, data: Any) -> bool:
        """Whether the camera's up-vector points down, so that it sees the scene upside down.

        `frame` then reverses the rows, which mirrors the image. This matches the published
        Meta-World images, because mujoco-py gave rows bottom first; a half turn would not
        (facts 6.4).
        """
        return bool(data.cam_xmat[self._camera].reshape(3, 3)[2, 1] < 0.0)

    def close(self) -> None:
        """Free the OpenGL contexts; a later `frame` makes new ones."""
        while self._renderers:
            self._renderers.popitem()[1].close()

    def _new_renderer(self, size: int) -> Any:
        import mujoco

        for side in ("offwidth", "offheight"):  # room for images larger than the model allows
            setattr(
                self._model.vis.global_, side, max(size, getattr(self._model.vis.global_, side))
            )
        renderer = self._renderers[size] = mujoco.Renderer(self._model, size, size)
        _close_at_exit(self)
        if self._quality == "fast":
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        return renderer


_drawing: weakref.WeakSet[OffscreenCamera] = weakref.WeakSet()


def _close_at_exit(camera: OffscreenCamera) -> None:
    """Free contexts before MuJoCo closes the display; later, Python would print their errors.

    Called after the first context is made, because exit handlers run in reverse order.
    """
    if not _drawing:
        atexit.unregister(_close_all)
        atexit.register(_close_all)
    _drawing.add(camera)


def _close_all() -> None:
    for camera in list(_drawing):
        camera.close()


def _camera_id(model: Any, camera: int | str) -> int:
    names = [model.camera(i).name for i in range(model.ncam)]
    if isinstance(camera, str) and camera in names:
        return names.index(camera)
    if isinstance(camera, int) and 0 <= camera < model.ncam:
        return camera
    listed = ", ".join(f"{i} '{name}'" for i, name in enumerate(names))
    raise EnvironmentSetupError(f"there is no camera {camera!r}; this task has: {listed}")


def moving_parts(
    model: Any, data: Any, camera: OffscreenCamera, size: int
) -> dict[str, tuple[float, float]]:
    """Where the middles of all bodies are seen: name -> (right, down), in pixels."""
    pixels = camera.project(data, data.xipos[1:], size)  # body 0 is the world
    names = [model.body(i).name or f"body{i}" for i in range(1, model.nbody)]
    return {
        name: (float(right), float(down))
        for name, (right, down) in zip(names, pixels, strict=True)
        if np.isfinite(right)
    }


def tint_scenery(model: Any, rng: np.random.Generator) -> None:
    """Give sky, floor, walls and table of a model another hue; call before the first frame."""
    for i in range(model.ntex):
        if model.texture(i).name not in _SCENERY:
            continue
        start = int(model.tex_adr[i])
        channels = int(model.tex_nchannel[i])
        pixels = int(model.tex_width[i]) * int(model.tex_height[i])
        block = model.tex_data[start : start + pixels * channels].reshape(pixels, channels)
        for channel, gain in enumerate(rng.uniform(0.45, 1.5, 3)):
            # By table: a sky has millions of values, but only 256 different ones.
            table = np.clip(np.arange(256) * gain, 0, 255).astype(np.uint8)
            block[:, channel] = table[block[:, channel]]
