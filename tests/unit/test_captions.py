"""Sentences about videos in files of people: read, refused by line, found for a window."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from scenes import moving_square

from mapo_lightning.data.captions import add_captions, caption_of
from mapo_lightning.data.clips import ClipDataset
from mapo_lightning.data.label_corpus import CorpusLabelling
from mapo_lightning.data.listing import Entry
from mapo_lightning.data.scan import scan_videos
from mapo_lightning.data.settings import VideoDataConfig
from mapo_lightning.data.video import write_mp4
from mapo_lightning.data.video_info import Caption, VideoInfo
from mapo_lightning.label_tools.check import check_labels
from mapo_lightning.label_tools.parquet import export_labels, import_labels
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.types import ConfigError, DescriberError

HEAD = "video,start,end,text\n"
NAMES = ("a.mp4", "b.mp4", "deep/b.mp4", "deep/c.webm")


def added(root: Path, content: str | bytes, name: str = "said.csv") -> dict[str, list[Caption]]:
    """Captions that a file gives the videos of NAMES."""
    file = root / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    entries = add_captions([Entry(root / video) for video in NAMES], root, str(file))
    return {str(e.path.relative_to(root)): list(e.captions) for e in entries if e.captions}


def told(captions: list[Caption]) -> list[tuple[str, float, float]]:
    return [(c.text, c.start, c.end) for c in captions]


ROWS = [
    {"video": "a.mp4", "start": 2.5, "end": 4, "text": "opens, slowly, a door"},
    {"video": "c", "start": 0, "end": 1, "text": "closes it"},
    {"video": "a.mp4", "start": 0, "end": 2.5, "text": "comes"},
]


@pytest.mark.parametrize("name", ["said.csv", "said.json", "said.jsonl", "excel.csv", "SAID.CSV"])
def test_every_kind_of_file_says_the_same(name: str, tmp_path: Path) -> None:
    lines = [f'{r["video"]},{r["start"]},{r["end"]},"{r["text"]}"' for r in ROWS]
    content = HEAD + "\n".join(lines) + "\n\n"
    if name.endswith(".json"):
        content = json.dumps(ROWS)
    if name.endswith(".jsonl"):
        content = "\n".join(json.dumps(row) for row in ROWS)
    if name == "excel.csv":
        content = "\ufeff" + content.replace("\n", "\r\n").replace("video,", "Video, ", 1)
        content = content.replace("Video, start", "Video,start")
    found = added(tmp_path, content, name)
    assert set(found) == {"a.mp4", "deep/c.webm"}
    assert told(found["a.mp4"]) == [("comes", 0.0, 2.5), ("opens, slowly, a door", 2.5, 4.0)]


def test_frames_and_whole_videos(tmp_path: Path) -> None:
    content = "text,video,first_frame,last_frame\nwaves,deep/b.mp4,3,7\n"
    (caption,) = added(tmp_path, content)["deep/b.mp4"]
    assert (caption.start, caption.end, caption.in_frames) == (3, 8, True)
    (caption,) = added(tmp_path, "video,text\nb.mp4,waves\n".replace("b.", "a."))["a.mp4"]
    assert (caption.start, caption.end) == (0.0, float("inf"))


BAD = {
    "an unknown video": ("video,text\na,x\nA.mp4,x\n", "line 3: there is no video .*mean 'a.mp4'"),
    "two of that name": (HEAD + "b.mp4,0,1,x\n", "line 2: 2 videos are called 'b.mp4'"),
    "end before start": (HEAD + "a.mp4,2,1,x\n", "line 2: it ends at 1, but begins at 2"),
    "no length": (HEAD + "a.mp4,2,2,x\n", "line 2: it ends at 2, but begins at 2"),
    "a negative time": (HEAD + "a.mp4,-1,2,x\n", "line 2: start must not be negative, got '-1'"),
    "not finite": (HEAD + "a.mp4,0,inf,x\n", "line 2: end must not be negative"),
    "minutes": (HEAD + "a.mp4,0,1:30,x\n", "line 2: end must be a number such as 12.5, got '1:30'"),
    "decimal commas": (HEAD + 'a.mp4,0,"1,5",x\n', "decimals have a point"),
    "overlap": (HEAD + "a.mp4,0,2,x\nc,0,1,x\na.mp4,1,3,y\n", r"line 4: .y. overlaps .*line 2\)"),
    "a duplicate": (HEAD + "a.mp4,0,2,x\na.mp4,0,2,x\n", "line 3: 'x' overlaps 'x'"),
    "other columns": ("file,start,end,text\na.mp4,0,1,x\n", "line 1 must name the columns video"),
    "half of the times": ("video,start,text\na.mp4,0,x\n", "line 1 must name the columns"),
    "both times": ("video,start,end,first_frame,last_frame,text\n", "line 1 must name"),
    "a comma too many": (HEAD + "a.mp4,0,1,opens, slowly\n", "line 2 has 5 columns.*double quotes"),
    "semicolons": ("video;start;end;text\na.mp4;0;1;x\n", "line 1 has semicolons between"),
    "tabs": ("video\tstart\tend\ttext\n", "line 1 has tabs"),
    "latin-1": ((HEAD + "a.mp4,0,1,T\xfcr\n").encode("latin-1"), "line 2 is not UTF-8: save"),
    "utf-16": ((HEAD + "a.mp4,0,1,x\n").encode("utf-16"), "line 1 is not UTF-8: save"),
    "an open quote": (HEAD + 'a.mp4,0,1,"x\n', "line 2 is not CSV"),
    "nothing": (HEAD, "holds no sentence"),
    "half a frame": ("video,first_frame,last_frame,text\na.mp4,0.5,3,x\n", "must be whole"),
    "a novel": (HEAD + f"a.mp4,0,1,{'x' * 1001}\n", "has 1001 characters"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_by_line(case: str, tmp_path: Path) -> None:
    content, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        added(tmp_path, content)


BAD_JSON = {
    "no list": ("said.json", '{"video": "a.mp4"}', "must hold a JSON list.*it holds dict"),
    "no JSON": ("said.json", "[{", "said.json' is not JSON"),
    "a broken line": ("said.jsonl", json.dumps(ROWS[0]) + "\n{", "line 2 is not JSON"),
    "no object": ("said.json", "[3]", "entry 1 must be an object"),
    "a number as text": ("said.json", json.dumps([ROWS[0] | {"text": 3}]), "must be texts"),
    "true as a time": ("said.json", json.dumps([ROWS[0] | {"end": True}]), "got True"),
    "half of the times": ("said.json", json.dumps([ROWS[0] | {"end": None}]), "entry 1 must name"),
    "seconds and frames": (
        "said.json",
        json.dumps([ROWS[0], {"video": "a.mp4", "first_frame": 9, "last_frame": 9, "text": "x"}]),
        "entry 2: 'a.mp4' has times in seconds and in frames",
    ),
    "another kind": ("said.xlsx", "x", "must be named .csv, .json or .jsonl"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_is_refused_too(case: str, tmp_path: Path) -> None:
    name, content, message = BAD_JSON[case]
    with pytest.raises(ConfigError, match=message):
        added(tmp_path, content, name)


def test_a_file_beside_the_videos_is_found_and_two_are_refused(tmp_path: Path) -> None:
    entries = [Entry(tmp_path / name) for name in NAMES]
    with pytest.raises(ConfigError, match=r"vlm=templates needs sentences.*captions.csv"):
        add_captions(entries, tmp_path, "")
    (tmp_path / "captions.csv").write_text("video,text\na,waves\n")
    assert add_captions(entries, tmp_path, "")[0].captions[0].text == "waves"
    (tmp_path / "captions.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"holds captions.csv and captions.json: remove one"):
        add_captions(entries, tmp_path, "")
    with pytest.raises(ConfigError, match=r"gone.csv' cannot be read: No such file"):
        add_captions(entries, tmp_path, str(tmp_path / "gone.csv"))
    own = [entries[0]._replace(captions=(Caption("own"),))]
    assert add_captions(own, tmp_path / "deep", "") == own


def test_runs_of_images_are_called_by_what_comes_before_their_numbers(tmp_path: Path) -> None:
    runs = [Entry(tmp_path / "S1_Walking_%06d.jpg"), Entry(tmp_path / "S5" / "Eating" / "%06d.png")]
    (tmp_path / "said.csv").write_text("video,text\nS1_Walking,x\nEating,y\n")
    found = add_captions(runs, tmp_path, str(tmp_path / "said.csv"))
    assert [entry.captions[0].text for entry in found] == ["x", "y"]


def info(fps: float = 10.0, **more: object) -> VideoInfo:
    return VideoInfo(Path("a.mp4"), "name", 40, 64, 64, fps, **more)  # type: ignore[arg-type]


SAID = (Caption("first", 0.0, 1.0), Caption("second", 1.0, 2.0), Caption("third", 2.5, 9.0))


@pytest.mark.parametrize(
    ("window", "sentence"),
    [
        (range(0, 4), "first"),
        (range(7, 11), "first"),  # three of its frames
        (range(8, 12), "second"),  # two each: the later one
        (range(18, 22), "second"),
        (range(20, 24), ""),
        (range(22, 26), "third"),
        (range(0, 37, 12), "third"),  # every twelfth frame
    ],
)
def test_a_window_has_the_sentence_of_most_of_its_frames(window: range, sentence: str) -> None:
    assert caption_of(info(captions=SAID), window) == sentence
    in_frames = tuple(c._replace(start=10 * c.start, end=10 * c.end, in_frames=True) for c in SAID)
    assert caption_of(info(captions=in_frames), window) == sentence


def test_times_are_those_of_the_file_where_frames_are_left_out_or_uneven() -> None:
    thinned = info(fps=2.5, captions=SAID, numbers=range(0, 160, 4))
    assert caption_of(thinned, range(2, 5)) == "second"  # 0.8, 1.2 and 1.6 seconds
    frames = (Caption("early", 0, 9, in_frames=True), Caption("late", 9, 99, in_frames=True))
    assert caption_of(thinned._replace(captions=frames), range(2, 5)) == "late"  # 8, 12 and 16
    uneven = info(captions=SAID, times=(0, 100, 200, *range(2500, 6200, 100)))
    assert caption_of(uneven, range(1, 5)) == "third"  # of two equals the later


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    for name, way in (("a", 0), ("b", 6)):
        film = moving_square(np.random.default_rng(way), way, 40.0, 40, size=(64, 64))
        write_mp4(folder / f"{name}.mp4", film, 10.0)
    return folder


def dataset(films: Path, root: Path, content: str, **vlm: object) -> ClipDataset:
    """Clips of both films, labelled by a file."""
    file = root / "said.csv"
    file.write_text(content)
    data = VideoDataConfig(kind="folder", root=str(films), clip_length=9, workers=0, holdout=0.0)
    cfg = VlmConfig(kind="templates", captions=str(file), **vlm)  # type: ignore[arg-type]
    videos = scan_videos(data, root / "c", cfg.caption_file).videos
    return ClipDataset(videos, data, cfg, root)


SENTENCES = HEAD + "a.mp4,0,2,A square slides to the right.\nb.mp4,1,4,[square][rises][][up][]\n"


def test_clips_are_labelled_by_their_sentences_and_read_no_frame_for_it(
    films: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        clips = dataset(films, tmp_path, SENTENCES)
    assert "2 sentences about 2 of 2 videos" in caplog.text
    clip = clips.clip_at(0, 12)  # frames 12 to 20: windows that end at 11, 15 and 19
    assert clip["has_semantic"].tolist() == [False] + [True] * 8
    assert clips.clip_at(0, 30)["has_semantic"].sum() == 0
    (example, *_) = clips.label_examples(1)
    assert example.phrase is not None
    assert (example.phrase.body, example.phrase.direction) == ("A square", "right")
    for request in clips.window_requests(1, clips.window_ends(1)):
        (label,) = clips.labeler.label(
            [request._replace(frames=lambda: pytest.fail("frames were read"))]
        )
        first = int(request.source.split(" frames ")[1].split("..")[0])
        assert label.known == (first >= 8)
        assert label.phrase is None or label.phrase.direction == "up"


def test_the_store_knows_them_until_a_sentence_is_edited(films: Path, tmp_path: Path) -> None:
    clips = dataset(films, tmp_path, SENTENCES)
    done = CorpusLabelling(clips).run(lambda _: None)
    assert (done.windows, done.stats.asked) == (20, 20)
    again = dataset(films, tmp_path, SENTENCES, cached_only=True)
    assert CorpusLabelling(again).missing() == 0
    edited = dataset(films, tmp_path, SENTENCES.replace("slides", "moves"), cached_only=True)
    assert CorpusLabelling(edited).missing() == 5  # the windows of that sentence
    with pytest.raises(DescriberError, match=r"there is no label of a.mp4 frames 0..3"):
        edited.clip_at(0, 0)
    # Without sentences, the same windows have the names that they always had.
    plain = ClipDataset(clips.videos, clips.data, VlmConfig(kind="flow"), tmp_path)
    assert "caption" not in plain.window_requests(0, [3])[0].identity


@pytest.mark.slow
def test_labels_travel_as_parquet(films: Path, tmp_path: Path) -> None:
    clips = dataset(films, tmp_path, SENTENCES)
    CorpusLabelling(clips).run(lambda _: None)
    clips.labeler.close()
    assert export_labels(tmp_path / "labels", tmp_path / "labels.parquet") == 20
    assert check_labels(tmp_path / "labels").faults == {}
    other = tmp_path / "other"
    other.mkdir()
    assert import_labels(tmp_path / "labels.parquet", other / "labels")[:3] == (20, 0, 0)
    known = dataset(films, other, SENTENCES, cached_only=True)
    assert known.clip_at(0, 12)["has_semantic"].sum() == 8


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "a.mp4,75,80,x",
            r"line 2: 'x' begins at second 75, but 'a.mp4' ends at second 3.9.*frame",
        ),
        ("a.mp4,3.95,80,x", "begins at second 3.95"),
    ],
)
def test_a_sentence_after_the_end_of_its_video_is_refused(
    films: Path, tmp_path: Path, row: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        dataset(films, tmp_path, f"{HEAD}{row}\n")


def test_captions_belong_to_templates_only() -> None:
    with pytest.raises(ConfigError, match=r"captions='said.csv' is read by vlm=templates only"):
        VlmConfig(kind="flow", captions="said.csv")
    assert VlmConfig().caption_file is None
    assert VlmConfig(kind="templates").caption_file == ""
