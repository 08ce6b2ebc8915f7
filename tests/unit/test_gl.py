"""Finding a renderer, saying how to get one, and looking through a camera."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mapo_lightning.envs.gl import OffscreenCamera, prepare_gl
from mapo_lightning.types import EnvironmentSetupError

SCENE = """
<mujoco>
  <worldbody>
    <light pos="0 0 4"/>
    <camera name="upright" pos="0 -4 1" xyaxes="1 0 0 0 0 1"/>
    <camera name="hanging" pos="0 -4 1" xyaxes="-1 0 0 0 0 -1"/>
    <geom type="plane" size="5 5 .1" rgba="0 0 1 1"/>
    <body name="ball" pos=".7 0 1.5"><geom size=".2" rgba="1 0 0 1"/></body>
  </worldbody>
</mujoco>
"""


def ask(code: str, cache: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process: the choice of a renderer is made once in each."""
    environment = {k: v for k, v in os.environ.items() if k != "MUJOCO_GL"}
    environment |= {"XDG_CACHE_HOME": str(cache), **variables}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_a_nonsense_backend_is_named_with_the_packages_to_install(
    tmp_path: Path,
) -> None:
    code = (
        "from mapo_lightning.envs.factory import make_env\n"
        "from mapo_lightning.envs.settings import EnvConfig\n"
        "from mapo_lightning.types import EnvironmentSetupError\n"
        "try:\n"
        "    make_env(EnvConfig(kind='dmc', name='walker_run'), 0)\n"
        "except EnvironmentSetupError as error:\n"
        "    print(error)\n"
    )
    done = ask(code, tmp_path, MUJOCO_GL="nonsense")
    assert "MUJOCO_GL=nonsense: RuntimeError: invalid value" in done.stdout, done.stderr
    assert "Unset MUJOCO_GL" in done.stdout
    assert (
        "apt-get install -y --no-install-recommends libegl1 libgl1 libgl1-mesa-dri" in done.stdout
    )
    assert "libosmesa6" in done.stdout
    assert not list(tmp_path.rglob("gl.json")), "a failure must not be remembered"


@pytest.mark.slow
def test_what_worked_is_remembered_until_the_next_start(tmp_path: Path) -> None:
    code = "from mapo_lightning.envs.gl import prepare_gl; print(prepare_gl())"
    first = ask(code, tmp_path)
    assert first.stdout.strip() in ("egl", "osmesa"), first.stderr
    # Whoever starts a child process now would fail: nothing but the memory can answer.
    unable = "import subprocess; subprocess.run = None\n" + code
    assert ask(unable, tmp_path).stdout == first.stdout
    (memory,) = tmp_path.rglob("gl.json")
    memory.write_text("{damaged")
    assert ask(unable, tmp_path).returncode != 0


def test_a_mujoco_that_chose_already_is_reported(tmp_path: Path) -> None:
    code = (
        "import sys, types\n"
        "sys.modules['mujoco'] = types.ModuleType('mujoco')\n"
        "from mapo_lightning.envs.gl import prepare_gl\n"
        "prepare_gl()\n"
    )
    done = ask(code, tmp_path)
    assert "mujoco was imported before an off-screen renderer was chosen" in done.stderr


def test_suites_without_opengl_never_import_mujoco(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from mapo_lightning.envs.factory import make_vector_env\n"
        "from mapo_lightning.envs.settings import EnvConfig\n"
        "make_vector_env(EnvConfig(), 0, 2).reset()\n"
        "print([m for m in ('mujoco', 'dm_control', 'metaworld', 'OpenGL') if m in sys.modules])\n"
    )
    assert ask(code, tmp_path, MUJOCO_GL="nonsense").stdout.strip() == "[]"


@pytest.mark.slow
def test_a_program_that_forgets_to_close_ends_in_silence(tmp_path: Path) -> None:
    code = (
        "from mapo_lightning.envs.factory import make_env\n"
        "from mapo_lightning.envs.settings import EnvConfig\n"
        "envs = [make_env(EnvConfig(kind='dmc', name='cartpole_balance'), i) for i in (0, 1)]\n"
        "for env in envs: env.reset()\n"
    )
    done = ask(code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_environments_in_processes_import_neither_the_program_nor_torch(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "print('imported')\n"  # no guard: whoever imports this again would build environments too
        "import sys\n"
        "from mapo_lightning.envs.factory import make_vector_env\n"
        "from mapo_lightning.envs.settings import EnvConfig\n"
        "assert 'torch' not in sys.modules\n"
        "envs = make_vector_env(EnvConfig(kind='dmc', name='cartpole_balance'), 0, 2)\n"
        "envs.reset()\n"
        "envs.close()\n"
        "print(__file__, __spec__)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["imported", f"{script} None"], done.stderr


@pytest.mark.parametrize(("size", "drawn"), [(20, 80), (33, 66), (48, 96), (63, 126), (64, 64)])
def test_pictures_under_64_pixels_are_means_of_larger_ones(size: int, drawn: int) -> None:
    prepare_gl()
    import mujoco

    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    view = OffscreenCamera(model, "upright", "fast")
    image, whole, times = view.frame(data, size), view.frame(data, drawn), drawn // size
    view.close()
    blocks = whole.reshape(size, times, size, times, 3).mean(axis=(1, 3))
    np.testing.assert_array_equal(image, blocks.round().astype(np.uint8))


@pytest.mark.parametrize("camera", ["upright", "hanging"])
def test_a_ball_is_drawn_upright_where_project_says(camera: str) -> None:
    prepare_gl()
    import mujoco

    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    view = OffscreenCamera(model, camera, "fast")
    image = view.frame(data, 96).astype(int)
    red = (image[..., 0] > 60) & (image[..., 2] < 40)
    (seen,) = view.project(data, data.xipos[1:], 96)
    view.close()
    down, right = np.argwhere(red).mean(axis=0) + 0.5
    np.testing.assert_allclose([right, down], seen, atol=1.0)
    assert down < 48, "the ball is above the horizon"
    assert image[90, 48, 2] > image[5, 48, 2], "the floor is below"


@pytest.mark.parametrize("camera", ["upright", "hanging"])
@pytest.mark.parametrize(("size", "times"), [(32, 2), (16, 4)])
def test_a_small_picture_is_the_mean_of_one_of_64_pixels(
    camera: str, size: int, times: int
) -> None:
    prepare_gl()
    import mujoco

    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    view = OffscreenCamera(model, camera, "fast")
    small, large = view.frame(data, size), view.frame(data, 64)
    (at,) = view.project(data, data.xipos[1:], size)
    view.close()
    assert (small.shape, small.dtype) == ((size, size, 3), np.uint8)
    assert large.shape == (64, 64, 3)
    means = large.reshape(size, times, size, times, 3).mean(axis=(1, 3))
    np.testing.assert_array_equal(small, means.round())
    red = (small[..., 0] > 60) & (small[..., 2] < 40)
    down, right = np.argwhere(red).mean(axis=0) + 0.5
    np.testing.assert_allclose([right, down], at, atol=1.0)


def test_an_unknown_camera_names_the_known_ones() -> None:
    prepare_gl()
    import mujoco

    model = mujoco.MjModel.from_xml_string(SCENE)
    for camera in ("back", 2, -1):
        with pytest.raises(EnvironmentSetupError, match="0 'upright', 1 'hanging'"):
            OffscreenCamera(model, camera, "fast")
