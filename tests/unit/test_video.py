from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import av
import numpy as np
import pytest
from scenes import damage, numbered, texture, write_sound

from mapo_lightning.data.video import (
    VideoFileError,
    check_video,
    probe_video,
    read_frames,
    resize,
    write_mp4,
)
from mapo_lightning.types import VideoError


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "numbered.mp4"
    write_mp4(path, numbered(50), 25)
    return path


def test_written_video_plays_in_browsers(tmp_path: Path) -> None:
    data = write_mp4(tmp_path / "sub" / "a.mp4", numbered(5, 33), 12.5)
    assert (
        (tmp_path / "sub" / "a.mp4").read_bytes() == data == write_mp4(None, numbered(5, 33), 12.5)
    )
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["a.mp4"]
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, float(stream.average_rate)) == (34, 34, 12.5)
    assert data.index(b"moov") < data.index(b"mdat")  # plays before it is loaded


def test_wrong_frames_are_not_written() -> None:
    with pytest.raises(VideoError, match=r"needs \(T, H, W, 3\) uint8"):
        write_mp4(None, np.zeros((2, 8, 8), np.uint8), 10)


def test_probe(film: Path) -> None:
    info = probe_video(film)
    assert info[2:6] == (50, 64, 64, 25.0)
    copy = film.with_name("copy.mp4")
    copy.write_bytes(film.read_bytes())
    assert probe_video(copy).fingerprint == info.fingerprint
    check_video(info, 0.0)


@pytest.mark.parametrize("indices", [range(50), range(7, 40, 3), [49, 0, 20, 20, 3]])
def test_frames_are_the_right_ones(film: Path, indices: list[int]) -> None:
    frames = read_frames(film, indices, (32, 48))
    assert frames.shape == (len(indices), 32, 48, 3)
    assert frames.dtype == np.uint8
    wanted = [4 * i + 4 for i in indices]
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), wanted, atol=1.5)


def test_short_side_keeps_the_shape(tmp_path: Path) -> None:
    write_mp4(tmp_path / "wide.mp4", np.zeros((2, 120, 160, 3), np.uint8), 10)
    assert read_frames(tmp_path / "wide.mp4", [0], 60).shape == (1, 60, 80, 3)


def test_shrinking_averages() -> None:
    stripes = np.zeros((1, 256, 256, 3), np.uint8)
    stripes[:, :, ::2] = 255
    assert np.ptp(resize(stripes, (64, 64))) <= 1


@pytest.mark.parametrize("side", [200, 640])
def test_shrinking_a_file_averages(tmp_path: Path, side: int) -> None:
    """Both below and above the size from which the decoder shrinks first."""
    scene = texture(np.random.default_rng(0), side, side, 2.0).clip(0, 255).astype(np.uint8)
    write_mp4(tmp_path / "a.mp4", np.stack([scene] * 3), 10)
    small = read_frames(tmp_path / "a.mp4", [1], (40, 40))[0].astype(int)
    wanted = resize(scene[None], (40, 40))[0].astype(int)
    assert np.abs(small - wanted).mean() < 4.0


def make_bad(kind: str, path: Path, good: bytes) -> None:
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is not a video\n" * 100)
    elif kind == "cut":
        path.write_bytes(good[: len(good) // 2])
    elif kind == "folder":
        path.mkdir()
    elif kind == "sound":
        write_sound(path)
    elif kind == "noise":
        damage(path, good, 0.4, 0.8)


@pytest.fixture(scope="module")
def rich() -> bytes:
    """A film that compresses badly, so that damage hits pictures."""
    rng = np.random.default_rng(0)
    return write_mp4(None, rng.integers(0, 255, (40, 64, 64, 3)).astype(np.uint8), 20)


@pytest.mark.parametrize(
    ("kind", "reasons"),
    [
        ("missing", {"missing"}),
        ("folder", {"missing"}),
        ("empty", {"empty"}),
        ("text", {"unreadable"}),
        ("sound", {"no_video"}),
        ("cut", {"unreadable", "codec", "damaged"}),
        ("noise", {"damaged"}),
    ],
)
def test_bad_files_are_told_apart(
    tmp_path: Path, rich: bytes, kind: str, reasons: set[str]
) -> None:
    path = tmp_path / "bad.mp4"
    make_bad(kind, path, rich)
    with pytest.raises(VideoFileError, match=r"bad\.mp4") as caught:
        check_video(probe_video(path), 0.1)
    assert caught.value.reason in reasons


def test_still_picture_is_no_damage(tmp_path: Path) -> None:
    write_mp4(tmp_path / "still.mp4", np.full((30, 64, 64, 3), 90, np.uint8), 10)
    check_video(probe_video(tmp_path / "still.mp4"), 0.0)


@pytest.mark.parametrize("indices", [[0, 50], [-1]])
def test_frames_beyond_the_end(film: Path, indices: list[int]) -> None:
    with pytest.raises(VideoFileError, match="it has 50") as caught:
        read_frames(film, indices, (8, 8))
    assert caught.value.reason == "too_short"


def test_missing_file_when_reading(tmp_path: Path) -> None:
    with pytest.raises(VideoFileError, match="there is no such file"):
        read_frames(tmp_path / "gone.mp4", [0], (8, 8))


def test_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(VideoFileError(Path("a.mp4"), "codec", "why")))
    assert (error.reason, str(error)) == ("codec", "cannot use video 'a.mp4': why")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["arm_wrestling.mp4", "flipping_a_pancake.mkv", "testsrc2_vp9.webm"]
)
def test_real_footage_is_frame_accurate(root: Path, name: str) -> None:
    folder = Path(os.environ.get("MAPO_TEST_VIDEOS", root.parent / "shared" / "videos"))
    if not (folder / name).is_file():
        pytest.skip(f"no real footage: {folder / name} is missing (set MAPO_TEST_VIDEOS)")
    info = probe_video(folder / name)
    check_video(info, 0.1)
    wanted = [info.frames - 1, info.frames // 2, 3]
    frames = read_frames(folder / name, wanted, (info.height, info.width))
    with av.open(str(folder / name)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                truth = frame.to_ndarray(format="rgb24", width=info.width).astype(int)
                assert np.abs(truth - frames[wanted.index(number)]).mean() < 2.0


def test_a_pixel_of_an_enlarged_film_is_a_square(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(30, 220, (3, 16, 16, 1), np.uint8)
    film = grey.repeat(3, axis=-1)  # without colours, which yuv420p halves
    write_mp4(tmp_path / "film.mp4", film, 10, 256)
    shown = read_frames(tmp_path / "film.mp4", range(3), (256, 256)).astype(int)
    squares = shown.reshape(3, 16, 16, 16, 16, 3)[:, :, 4:12, :, 4:12]
    assert np.abs(squares - film[:, :, None, :, None].astype(int)).max() < 12
