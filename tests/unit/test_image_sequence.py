"""Numbered images are read as what they were taken from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from miniatures import write_images
from scenes import numbered, texture

from mapo_lightning.data.image_sequence import find_run
from mapo_lightning.data.reader import locate, read, thin_out
from mapo_lightning.data.video import resize
from mapo_lightning.data.video_info import VideoFileError, VideoInfo


def brightness(frames: np.ndarray) -> list[int]:
    """Read the frame numbers back from the brightness of `numbered` frames."""
    return [round((float(frame.mean()) - 4) / 4) for frame in frames]


@pytest.mark.parametrize(
    ("name", "first", "step"),
    [("%06d.jpg", 1, 1), ("%d.png", 0, 1), ("100%%_%03d.JPG", 7, 5), ("a1_%04d.jpeg", 9995, 2)],
)
def test_frames_of_a_folder_come_in_their_order(
    tmp_path: Path, name: str, first: int, step: int
) -> None:
    write_images(tmp_path / "v" / name, numbered(12), first, step)
    footage = locate(tmp_path / "v")
    assert footage.numbers == range(first, first + 12 * step, step)
    info = footage.examine(0.0)
    assert (info.frames, info.width, info.height, info.fps) == (12, 64, 64, 0.0)
    assert brightness(read(info, range(12), (32, 32))) == list(range(12))
    assert brightness(read(info, [11, 0, 3, 3], 16)) == [11, 0, 3, 3]


def test_colours_and_averaging_are_those_of_a_video(tmp_path: Path) -> None:
    scene = texture(np.random.default_rng(0), 320, 480, 2.0).clip(0, 255).astype(np.uint8)
    scene[:, :200, 0] = 255
    for name in ("%06d.png", "%06d.jpg"):  # a JPEG of this size is reduced while it is decoded
        write_images(tmp_path / name[-3:] / name, scene[None])
        info = locate(tmp_path / name[-3:]).examine(0.0)
        small = read(info, [0], (40, 40))[0].astype(int)
        assert np.abs(small - resize(scene[None], (40, 40))[0]).mean() < 4.0


def test_the_square_in_the_middle(tmp_path: Path) -> None:
    wide = np.zeros((3, 48, 96, 3), np.uint8)
    wide[:, :, 24:72] = 200
    write_images(tmp_path / "v" / "%d.png", wide)
    whole = locate(tmp_path / "v").examine(0.0)
    square = thin_out(whole, None, square=True)
    assert square.fingerprint != whole.fingerprint
    assert read(square, [0], 24).shape == (1, 24, 24, 3)
    assert read(square, [0], 24).min() == 200
    assert read(whole, [0], (24, 24)).min() == 0


def refused(path: Path) -> str:
    with pytest.raises(VideoFileError) as caught:
        locate(path).examine(0.0)
    return f"{caught.value.reason}: {caught.value.detail}"


def test_a_hole_other_sizes_and_damage_are_named(tmp_path: Path) -> None:
    write_images(tmp_path / "v" / "%06d.jpg", numbered(9))
    (tmp_path / "v" / "000004.jpg").rename(tmp_path / "4.jpg")
    assert refused(tmp_path / "v") == (
        "damaged: image 5 follows 3, the others are 1 apart: some are missing"
    )
    write_images(tmp_path / "v" / "%06d.jpg", numbered(1, 32), first=4)
    expected = "damaged: image 4 has 32x32 pixels, the first has 64x64"
    assert refused(tmp_path / "v") == expected
    good = (tmp_path / "4.jpg").read_bytes()
    (tmp_path / "v" / "000004.jpg").write_bytes(good[: len(good) // 2])
    assert refused(tmp_path / "v") == "damaged: image '000004.jpg' cannot be decoded"
    for content in (b"", b"no picture", good[:20]):
        (tmp_path / "v" / "000004.jpg").write_bytes(content)
        assert refused(tmp_path / "v") == (
            "damaged: image '000004.jpg' is not the PNG or JPEG image that its name promises, or "
            "is cut off"
        )


def test_folders_that_hold_no_run(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    assert "no numbered images" in refused(tmp_path / "v")
    for run in ("a_%03d.jpg", "b_%03d.jpg"):
        write_images(tmp_path / "v" / run, numbered(2))
    assert "images of 2 runs, one is needed" in refused(tmp_path / "v")
    with pytest.raises(VideoFileError, match="No such file"):
        find_run(tmp_path / "gone")


def test_what_changes_while_in_use_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "v" / "%06d.jpg", numbered(6))
    info = locate(tmp_path / "v").examine(0.0)
    with pytest.raises(VideoFileError, match=r"frames 2\.\.6 were requested, it has 6"):
        read(info, [2, 6], 8)
    (tmp_path / "v" / "000003.jpg").unlink()
    with pytest.raises(VideoFileError, match=r"'000003\.jpg' cannot be read: No such file"):
        read(info, [0, 2], 8)
    write_images(tmp_path / "v" / "%06d.jpg", numbered(1, 32), first=3)
    with pytest.raises(VideoFileError, match="another size than those before"):
        read(info, [0, 2], 8)


def test_identity_follows_the_content(tmp_path: Path) -> None:
    def name(folder: str) -> str:
        return locate(tmp_path / folder).fingerprint()

    for folder in ("a", "b"):
        write_images(tmp_path / folder / "%06d.jpg", numbered(6))
    assert name("a") == name("b")
    write_images(tmp_path / "b" / "%06d.jpg", numbered(1, 32), first=6)
    assert name("a") != name("b")


@pytest.mark.parametrize(("rate", "step"), [(None, 1), (10.0, 5), (7.0, 7), (60.0, 1), (50.0, 1)])
def test_thinning_out_keeps_every_so_many_frames(rate: float | None, step: int) -> None:
    film = VideoInfo(Path("a.mp4"), "name", 101, 64, 64, 50.0)
    seen = thin_out(film, rate, square=False)
    assert seen.frames == len(range(0, 101, step))
    assert seen.fps == 50.0 / step
    assert (seen.fingerprint == film.fingerprint) == (step == 1)
    images = film._replace(numbers=range(1, 505, 5), fps=10.0)
    assert thin_out(images, 5.0, square=False).numbers == range(1, 511, 10)
