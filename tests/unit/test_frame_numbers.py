"""Frame i is the i-th frame that is shown, as it is shown, in files of every kind."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from numbered_films import (
    Film,
    corners_of,
    cover_first,
    hide_first,
    hide_pictures,
    in_order,
    number_of,
    write,
)

from mapo_lightning.data.reader import FrameSource, read, thin_out
from mapo_lightning.data.scan import scan_videos
from mapo_lightning.data.settings import VideoDataConfig
from mapo_lightning.data.video import read_frames, resize
from mapo_lightning.data.video_info import VideoFileError, VideoInfo
from mapo_lightning.data.window_labels import WindowFrames, WindowGrid

X264 = (("preset", "veryfast"), ("bf", "2"), ("sc_threshold", "0"))
OPEN = (*X264, ("x264-params", "open-gop=1:keyint={gop}:min-keyint={gop}"))
X265 = (
    ("preset", "ultrafast"),
    ("x265-params", "keyint={gop}:min-keyint={gop}:bframes=3:log-level=none"),
)
B_FRAMES = (("bf", "2"),)
QUICK = (("deadline", "realtime"), ("cpu-used", "8"))
QUARTER, HALF, MIRRORED = (0, 1, -1, 0), (-1, 0, 0, -1), (-1, 0, 0, 1)
BACK, FLOPPED = (0, -1, 1, 0), (0, 1, 1, 0)

KINDS = {
    "plain": Film(options=X264),
    "open GOP": Film(options=OPEN),
    "x265, 10 bit": Film("libx265", options=X265, pixels="yuv420p10le"),
    "H.264 in AVI": Film(options=X264, suffix=".avi"),
    "MPEG-4 in AVI": Film("mpeg4", ".avi", B_FRAMES),
    "MPEG-4 in mp4": Film("mpeg4", ".mp4", B_FRAMES),
    "MPEG-1 in AVI": Film("mpeg1video", ".avi", B_FRAMES),
    "a transport stream called mp4": Film(options=X264, container="mpegts"),
    "sound outlasts the picture, mkv": Film(options=X264, suffix=".mkv", sound="libopus"),
    "sound outlasts the picture, webm": Film("libvpx-vp9", ".webm", QUICK, sound="libopus"),
    "begins at five seconds": Film(options=X264, suffix=".mkv", start=150),
    "no duration": Film("libvpx", ".webm", QUICK, settings=(("live", "1"),)),
    "turned left": Film(options=X264, matrix=BACK),
    "mirrored": Film(options=X264, matrix=MIRRORED),
    "motion JPEG": Film("mjpeg", ".avi", pixels="yuvj420p", frames=24),
}
# Two axes of the generator run through all their values, the third is spread over them.
CODECS = {
    "H.264": ("libx264", X264, (".mp4", ".mkv", ".mov")),
    "open H.264": ("libx264", OPEN, (".mov", ".mp4", ".mkv")),
    "H.265": ("libx265", X265, (".mkv", ".mp4", ".mov")),
    "MPEG-4": ("mpeg4", B_FRAMES, (".avi", ".mov", ".mp4")),
}
TURNS = (None, QUARTER, HALF, FLOPPED)
COMBINATIONS = {
    f"{name} {containers[n]} GOP {gop} {turn}": Film(
        codec, containers[n], options, gop=gop, matrix=turn
    )
    for row, (name, (codec, options, containers)) in enumerate(CODECS.items())
    for n, gop in enumerate((5, 12, 40))
    for turn in [TURNS[(row + n) % 4] if containers[n] in (".mp4", ".mov") else None]
}


def examined(path: Path) -> VideoInfo:
    return FrameSource(path).examine(0.0)


def nearest(frames: np.ndarray, truth: np.ndarray) -> list[int]:
    """Which of the true frames each frame is, by its pixels."""
    off = [np.abs(truth - frame.astype(int)).mean(axis=(1, 2, 3)) for frame in frames]
    assert max(o.min() for o in off) < 12.0, "a frame that is none of the file's"
    return [int(o.argmin()) for o in off]


def check_every_frame(path: Path, truth: np.ndarray) -> VideoInfo:
    """Every single frame, every label window and every start of a clip, in any order."""
    info = examined(path)
    assert info.frames == len(truth)
    assert (info.height, info.width) == truth.shape[1:3]
    side = (48, 48)
    small = resize(truth, side).astype(int)
    order = random.Random(0).sample(range(info.frames), info.frames)
    assert nearest(np.concatenate([read(info, [n], side) for n in order]), small) == order
    grid = WindowGrid(frames=4, stride=4)
    ends = list(grid.ends(info.frames))
    for end in ends:
        (request,) = WindowFrames(info, grid, [end], 48).requests()
        assert nearest(resize(request.frames(), side), small) == list(grid.window(end))
    for start in range(0, info.frames - 9, 5):
        clip = list(range(start, start + 9, 2))
        assert nearest(read(info, clip, side), small) == clip
    mixed = random.Random(1).choices(range(info.frames), k=12)  # what no scan has examined
    assert nearest(read_frames(path, mixed, side), small) == mixed
    return info


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_frames_of_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    film = KINDS[kind]
    path = write(tmp_path / "film", film)
    truth = in_order(path, film.matrix)
    assert [number_of(f) for f in in_order(path)] == list(range(film.frames))
    info = check_every_frame(path, truth)
    if kind == "plain" or kind.startswith("sound"):
        assert info.access is not None
        assert info.access.decoder == "decord"
    assert round(info.fps) == 30


@pytest.mark.slow
@pytest.mark.parametrize("name", COMBINATIONS)
def test_frames_of_combinations_of_codec_container_gop_and_rotation(
    tmp_path: Path, name: str
) -> None:
    path = write(tmp_path / "film", COMBINATIONS[name])
    check_every_frame(path, in_order(path, COMBINATIONS[name].matrix))


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [3, 14])
def test_an_edit_list_hides_frames(tmp_path: Path, hidden: int) -> None:
    path = hide_first(write(tmp_path / "film", Film(options=X264)), hidden)
    truth = in_order(path)
    assert number_of(truth[0]) == hidden
    info = check_every_frame(path, truth)
    assert info.access is not None
    assert (info.frames, info.access.decoder) == (48 - hidden, "pyav")


@pytest.mark.parametrize(
    ("matrix", "corners"),
    [(None, "RGBW"), (BACK, "GWRB"), (QUARTER, "BRWG"), (HALF, "WBGR"), (MIRRORED, "GRWB")],
)
def test_pictures_are_turned_as_players_turn_them(
    tmp_path: Path, matrix: tuple[int, int, int, int] | None, corners: str
) -> None:
    info = examined(write(tmp_path / "film", Film(options=X264, matrix=matrix, frames=4)))
    portrait = matrix in (BACK, QUARTER)
    assert (info.width, info.height) == ((120, 160) if portrait else (160, 120))
    assert corners_of(read(info, [1], (48, 48))[0]) == corners
    assert corners_of(read(info, [1], 60)[0]) == corners
    assert read(info, [1], 60).shape == ((1, 80, 60, 3) if portrait else (1, 60, 80, 3))


def test_the_square_is_the_middle_of_what_is_shown(tmp_path: Path) -> None:
    """Stored 160x120, shown 60 high after stretching to 320: a third of the columns is kept."""
    info = examined(write(tmp_path / "film", Film(options=X264, aspect=2, frames=4)))
    assert (info.width, info.height) == (320, 120)
    square = read(thin_out(info, None, square=True), [0], (48, 48))[0]
    whole = read(info, [0], (48, 128))[0].astype(int)
    assert np.abs(whole[:, 40:88] - square).mean() < 12
    turned = Film(options=X264, aspect=2, matrix=QUARTER, frames=4)
    info = examined(write(tmp_path / "turned", turned))
    assert (info.width, info.height) == (120, 320)


SMALL = Film(options=X264, size=(60, 80), frames=24)
COVER = Film("mjpeg", pixels="yuvj420p", frames=1, size=(60, 60), disposition="attached_pic")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
@pytest.mark.parametrize("marked", [None, 0, 1])
@pytest.mark.parametrize("small_first", [False, True])
def test_of_two_tracks_the_one_that_is_decoded_is_described(
    tmp_path: Path, suffix: str, marked: int | None, small_first: bool
) -> None:
    films = [SMALL, KINDS["plain"]] if small_first else [KINDS["plain"], SMALL]
    if marked is not None:
        films[marked] = films[marked]._replace(disposition="default")
    path = write(tmp_path / "film", films[0]._replace(suffix=suffix), films[1])
    # Without marks FFmpeg takes the first of equal quality; AVI has no marks.
    shown = marked or 0 if suffix != ".avi" else int(small_first)
    info = check_every_frame(path, in_order(path, track=shown))
    assert (info.frames, info.height, info.width) == (films[shown].frames, *films[shown].size)
    assert info.fps == pytest.approx(30, abs=0.1)
    assert [number_of(f) for f in read(info, [0, 9, 23], info.height)] == [0, 9, 23]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["after", "before"])
def test_a_cover_is_not_the_video(tmp_path: Path, place: str) -> None:
    path = write(tmp_path / "film", KINDS["plain"], COVER)
    if place == "before":
        cover_first(path)
    info = check_every_frame(path, in_order(path, track=int(place == "before")))
    assert (info.frames, info.height, info.width) == (48, 120, 160)
    assert [number_of(f) for f in read(info, [0, 20, 47], 120)] == [0, 20, 47]


def test_a_song_with_a_cover_holds_no_video(tmp_path: Path) -> None:
    path = write(tmp_path / "song", COVER._replace(sound="aac"))
    with pytest.raises(VideoFileError, match="it holds no pictures") as caught:
        examined(path)
    assert caught.value.reason == "no_video"


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [[5, 6, 13, 20, 40], [12, 24], [1, 47]])
def test_pictures_that_vp8_only_refers_to_are_not_counted(
    tmp_path: Path, hidden: list[int]
) -> None:
    path = write(tmp_path / "film", Film("libvpx", ".webm", QUICK))
    info = check_every_frame(hide_pictures(path, hidden), in_order(path))
    shown = [number for number in range(48) if number not in hidden]
    assert [number_of(f) for f in read(info, range(info.frames), 120)] == shown


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".avi"])
def test_metadata_may_have_any_encoding(tmp_path: Path, suffix: str) -> None:
    codec, options = ("libvpx", QUICK) if suffix == ".webm" else ("libx264", X264)
    (tmp_path / "v").mkdir()
    title = "cafe de flore"
    path = write(tmp_path / "v" / "film", Film(codec, suffix, options, title=title))
    data = path.read_bytes()
    assert data.count(title.encode()) == 2  # of the file and of the track
    path.write_bytes(data.replace(title.encode(), b"caf\xe9 de flore"))
    cfg = VideoDataConfig(kind="folder", root=str(tmp_path / "v"))
    (video,) = scan_videos(cfg, tmp_path / "cache").videos
    assert [number_of(f) for f in read(video, [0, 30, 47], 120)] == [0, 30, 47]
    check_every_frame(path, in_order(path))


def slower(number: int) -> int:
    """Time stamps of 30 Hz, from frame 24 on of 10 Hz."""
    return number if number < 24 else 24 + 3 * (number - 24)


@pytest.mark.slow
def test_a_rate_goes_by_time_stamps(tmp_path: Path) -> None:
    for suffix in (".mp4", ".mkv"):
        path = write(tmp_path / "film", Film(options=X264, suffix=suffix, ticks=slower))
        info = check_every_frame(path, in_order(path))
        thin = thin_out(info, 10.0, square=False)
        wanted = [*range(0, 24, 3), *range(24, 48)]
        assert [number_of(f) for f in read(thin, range(thin.frames), (60, 80))] == wanted
        assert thin.fps == 10.0
        grid = WindowGrid(frames=4, stride=4)
        requests = WindowFrames(thin, grid, [7, 11, 31], 60).requests()
        assert [r.source for r in requests] == [
            f"{path.name} frames {where}"
            for where in ("12..21 step 3", "24..27 step 1", "44..47 step 1")
        ]
        (across,) = WindowFrames(thin, WindowGrid(4, 4, step=1), [9], 60).requests()
        assert across.source == f"{path.name} frames 18, 21, 24, 25"


def test_a_frame_that_is_shown_for_long_is_repeated(tmp_path: Path) -> None:
    for suffix in (".mp4", ".mkv"):
        path = write(tmp_path / "film", Film(options=X264, suffix=suffix, ticks=slower))
        info = examined(path)
        thin = thin_out(info, 20.0, square=False)
        assert thin.numbers is not None
        assert thin.numbers[:4] == (0, 1, 3, 4)  # shown at 0, 50, 100 and 150 ms
        assert thin.numbers[16:] == (*sorted([*range(24, 47)] * 2), 47)
        assert [number_of(f) for f in read(thin, range(thin.frames), 60)] == list(thin.numbers)
        requests = WindowFrames(thin, WindowGrid(4, 4), [19, 23], 60).requests()
        assert [r.source for r in requests] == [
            f"{path.name} frames 24, 24, 25, 25",
            f"{path.name} frames 26, 26, 27, 27",
        ]
        assert [number_of(f) for f in requests[0].frames()] == [24, 24, 25, 25]
        names = {info.fingerprint, *(thin_out(info, rate, False).fingerprint for rate in (10, 20))}
        assert len(names) == 3


@pytest.mark.parametrize(
    ("times", "rate", "numbers"),
    [
        ((0, 100, 200, 1000), 10.0, (0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3)),  # a pause
        ((0, 97, 204, 299, 402), 10.0, (0, 1, 2, 3, 4)),  # jitter
        ((0, 33, 67, 100, 133, 500), 30.0, (0, 1, 2, 3, 4, *[4] * 10, 5)),  # rounded
        ((0, 33, 67, 100, 950), 10.0, (0, *[3] * 9, 4)),  # the last lies between two ticks
        ((0, 400, 410, 420, 430), 10.0, (0, 0, 0, 0, 1, 4)),  # faster than the rate
        ((0, 400, 410, 420, 430), 2.5, (0, 1, 4)),  # all within one tick
        ((0, 100, 300, 300, 400), 10.0, (0, 1, 1, 3, 4)),  # two at one time: the later is seen
        ((0, 20, 40, 300), 10.0, (0, 2, 2, 3)),  # as many repeats as dropped frames
    ],
)
def test_each_tick_takes_the_frame_that_is_shown(
    times: tuple[int, ...], rate: float, numbers: tuple[int, ...]
) -> None:
    info = VideoInfo(Path("a.mp4"), "name", len(times), 64, 64, 12.0, times=times)
    thin = thin_out(info, rate, square=False)
    if numbers == tuple(range(len(times))):
        assert thin == info
        return
    assert (thin.numbers, thin.frames, thin.fps) == (numbers, len(numbers), rate)
    assert (thin.times, thin.fingerprint == "name") == (None, False)


def test_time_stamps_that_jump_by_years_are_refused() -> None:
    info = VideoInfo(Path("a.mp4"), "name", 3, 64, 64, 10.0, times=(0, 33, 10**12))
    with pytest.raises(VideoFileError, match="its time stamps span 1000000000 s") as caught:
        thin_out(info, 10.0, square=False)
    assert caught.value.reason == "too_large"


def test_frames_that_an_avi_leaves_out_are_no_damage(tmp_path: Path) -> None:
    """Captured at 15 of 30 frames per second at first: every second place is empty."""

    def ticks(number: int) -> int:
        return 2 * number if number < 24 else 48 + number - 24

    path = write(tmp_path / "film", Film("mpeg4", ".avi", (("bf", "0"),), ticks=ticks))
    info = check_every_frame(path, in_order(path))
    assert info.frames == 48
    thin = thin_out(info, 15.0, square=False)
    assert thin.numbers == (*range(24), *range(24, 48, 2), 47)
    assert [number_of(f) for f in read(thin, range(thin.frames), 60)] == list(thin.numbers)


def test_a_file_without_its_end_is_damaged_whatever_its_sound(tmp_path: Path) -> None:
    path = write(tmp_path / "film", Film(options=X264, suffix=".mkv", sound="libopus"))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoFileError, match=r"it ends after .* of 3\.2 s: cut off\?"):
        examined(path)


@pytest.mark.slow
def test_a_scan_says_how_files_are_read_and_remembers_it(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    for name in ("plain", "open GOP", "MPEG-4 in AVI"):
        write(tmp_path / "v" / name, KINDS[name])
    cfg = VideoDataConfig(kind="folder", root=str(tmp_path / "v"))
    first = scan_videos(cfg, tmp_path / "cache")
    again = scan_videos(cfg, tmp_path / "cache")
    assert again == first
    ways = {v.path.stem: v.access.decoder for v in again.videos if v.access}
    assert ways == {"plain": "decord", "open GOP": "pyav", "MPEG-4 in AVI": "pyav"}
    found = json.loads((tmp_path / "cache" / "report.json").read_text())["reading"]
    assert (found["decord"], found["pyav"], len(found["why"])) == (1, 2, 2)
    assert found["pyav_ms_per_clip"] > 0
