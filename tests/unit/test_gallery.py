"""The page of labels: made from a real store and real videos, read as a browser would read it."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from numbered_films import Film, number_of, write
from PIL import Image
from scenes import moving_square, still

from mapo_lightning.data.clips import ClipDataset
from mapo_lightning.data.ground_truth import FILE
from mapo_lightning.data.scan import scan_videos
from mapo_lightning.data.settings import VideoDataConfig
from mapo_lightning.data.video import fingerprint, probe_video, write_mp4
from mapo_lightning.label_tools.gallery import draw, find_videos, main
from mapo_lightning.label_tools.page import Sample, page
from mapo_lightning.ownership import signed
from mapo_lightning.semantics.phrase import Phrase
from mapo_lightning.semantics.reviews import FORMAT, Reviews, read_reviews
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.semantics.store import LabelStore, StoredLabel

SAFE = "<i>&'\" {{ x }}.mp4"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three labelled videos: a square to the right, one upwards, and a still scene."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    films = {
        SAFE: moving_square(rng, 0, 20.0, frames=9),
        "up.mp4": moving_square(rng, 6, 20.0, frames=9),
        "still.mp4": still(rng, 1.0, frames=9),
    }
    for name, film in films.items():
        write_mp4(root / "videos" / name, film, 25.0)
    paths = {"square": [[20 * t / 8, 0] for t in range(9)]}
    row = {"video": SAFE, "size": 100, "paths": paths}
    (root / "videos" / FILE).write_text(json.dumps(row))
    videos = [probe_video(path) for path in find_videos([root / "videos"])]
    clips = ClipDataset(videos, VideoDataConfig(clip_length=9), VlmConfig(), root)
    for number in range(len(videos)):
        clips.clip_at(number, 0)
    clips.labeler.label_frames([films["up.mp4"][:4]], "toy/disc")  # an environment's window
    clips.labeler.close()
    return root


class Card(dict[str, str]):
    """Attributes of an article, and what stands in it."""

    text = ""
    picture = ""


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.cards: list[Card] = []
        self.policy = ""
        self.inside: str | None = None
        self.inline: dict[str, str] = {"style": "", "script": ""}
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "article":
            self.cards.append(Card(given))
        elif tag == "meta" and given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        elif tag == "img":
            self.cards[-1].picture = given["src"]
        self.inside = tag if tag in self.inline else None
        assert not {"href", "style", "srcset", "action"} & set(given)

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside is not None:
            self.inline[self.inside] += data
        elif self.cards:
            self.cards[-1].text += data
        else:
            self.words += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    return reader


@pytest.fixture(scope="module")
def shown(corpus: Path) -> Reader:
    out = corpus / "out" / "gallery.html"
    words = ["--store", str(corpus / "labels"), "--videos", str(corpus / "videos")]
    assert main([*words, "--out", str(out)]) == 0
    return read(out.read_text())


def test_every_window_is_a_card_with_its_frames_and_words(shown: Reader) -> None:
    assert len(shown.cards) == 6  # two windows of each video
    for card in shown.cards:
        head, _, body = card.picture.partition(",")
        assert head == "data:image/webp;base64"
        with Image.open(io.BytesIO(base64.b64decode(body))) as picture:
            assert picture.height == 112
            assert picture.width == 4 * (149 + 3)
        assert len(body) < 60_000
        assert card["data-key"]
        assert card["data-video"] in (SAFE, "up.mp4", "still.mp4")
        assert "flow-v1" in card.text
    by_video = {(card["data-video"], card["data-frames"]): card for card in shown.cards}
    right = by_video[SAFE, "4..7"]
    assert right["data-status"] == "slots"
    assert right["data-way"] == "right"
    assert right["data-verdict"] == "agrees"
    assert "simulator: right 7.5 %" in right.text
    assert "percent of the frame width" in right.text
    assert by_video["up.mp4", "0..3"]["data-way"] == "up"
    nothing = by_video["still.mp4", "0..3"]
    assert (nothing["data-status"], nothing["data-verdict"]) == ("null", "unclear")
    assert "no significant action" in nothing.text
    assert "7 labels stored" in " ".join(shown.words.split())
    assert "1 others are of environments" in " ".join(shown.words.split())


def test_the_page_may_load_nothing_and_runs_its_own_script_alone(shown: Reader) -> None:
    rules = dict(rule.strip().split(" ", 1) for rule in shown.policy.split(";"))
    for tag in ("style", "script"):
        digest = hashlib.sha256(shown.inline[tag].encode()).digest()
        assert rules.pop(f"{tag}-src") == f"'sha256-{base64.b64encode(digest).decode()}'"
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    for word in ("http:", "https:", "innerHTML", "eval(", "document.write", "insertAdjacentHTML"):
        assert word not in shown.inline["script"] + shown.inline["style"]


def test_the_script_writes_what_training_reads(shown: Reader, tmp_path: Path) -> None:
    script = shown.inline["script"]
    assert set(re.findall(r'"(mapo-label-marks-\d+)"', script)) == {FORMAT}
    # The fields that its export names, filled as its code fills them.
    fields = re.search(r"return \{ (key, mark, \.\.\.changed,.+?) \};", script)
    assert fields is not None
    assert "{ slots: words(card), was: JSON.parse(was) }" in script
    row = {"key": shown.cards[0]["data-key"], "mark": "reject", "video": "v", "frames": "0..3"}
    path = tmp_path / "reviews.json"
    path.write_text(json.dumps({"format": FORMAT, "marks": [row]}))
    assert read_reviews(str(path)).rejected == {shown.cards[0]["data-key"]}


def test_reviews_come_back_and_those_not_shown_are_kept(corpus: Path) -> None:
    store, videos = LabelStore(corpus / "labels", "r"), find_videos([corpus / "videos"])
    everything = draw(store, videos, 10)
    key = everything.labels[0][0]
    reviews = Reviews(accepted=frozenset(["0" * 32]), rejected=frozenset([key]))
    text = page(everything, "t", reviews)
    cards = {card["data-key"]: card for card in read(text).cards}
    assert cards[key]["data-mark"] == "reject"
    assert sum(bool(card["data-mark"]) for card in cards.values()) == 1
    others = re.search(r'data-others="([^"]*)"', text)
    assert others is not None
    assert json.loads(others[1].replace("&#34;", '"')) == [{"key": "0" * 32, "mark": "accept"}]


def test_corrected_words_come_back_escaped(corpus: Path) -> None:
    store, videos = LabelStore(corpus / "labels", "r"), find_videos([corpus / "videos"])
    everything = draw(store, videos, 10)
    shown, hidden = everything.labels[0][0], "1" * 32
    words = Phrase("<b>", "lifts", '"cup"', "up", "")
    notes = {shown: {"by": "Ada & Bo", "at": "now"}}
    text = page(everything, "t", Reviews(corrected={shown: words, hidden: words}, notes=notes))
    assert "<b>" not in text
    card = next(card for card in read(text).cards if card["data-key"] == shown)
    assert (card["data-mark"], card["data-by"], card["data-at"]) == ("correct", "Ada & Bo", "now")
    assert json.loads(card["data-slots"]) == [*words]
    assert len(json.loads(card["data-was"])) == 5
    others = re.search(r'data-others="([^"]*)"', text)
    assert others is not None
    row = {"key": hidden, "mark": "correct", "slots": [*words]}
    assert json.loads(html.unescape(others[1])) == [row]


def test_the_draw_is_bounded_seeded_and_can_be_narrowed(corpus: Path) -> None:
    store, videos = LabelStore(corpus / "labels", "r"), find_videos([corpus / "videos"])

    def keys(**how: object) -> list[str]:
        return [key for key, *_ in draw(store, videos, 3, **how).labels]  # type: ignore[arg-type]

    assert len(keys()) == 3
    assert keys(seed=1) == keys(seed=1)
    assert len({tuple(keys(seed=seed)) for seed in range(6)}) > 1
    assert len(keys(status="null")) == 2
    assert keys(describer="flow-v9") == []
    sample = draw(store, videos[:1], 10)
    assert sample.counts.total() == 7
    assert sample.elsewhere == 5


def test_of_two_files_with_one_name_the_right_one_is_shown(corpus: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    shutil.copy(corpus / "videos/still.mp4", tmp_path / "a/up.mp4")
    shutil.copy(corpus / "videos/up.mp4", tmp_path / "b/up.mp4")
    store = LabelStore(corpus / "labels", "r")
    sample = draw(store, find_videos([tmp_path]), 10)
    both = read(page(sample, "t")).cards
    alone = draw(store, [corpus / "videos/up.mp4"], 10)
    assert [c.picture for c in both] == [c.picture for c in read(page(alone, "t")).cards]
    (tmp_path / "b/up.mp4").write_bytes((tmp_path / "a/up.mp4").read_bytes())
    assert fingerprint(tmp_path / "a/up.mp4") == fingerprint(tmp_path / "b/up.mp4")
    for card in read(page(draw(store, find_videos([tmp_path]), 10), "t")).cards:
        assert not card.picture
        assert "2 files have this name" in card.text


@pytest.mark.parametrize(
    "source",
    [
        "up.mp4 frames 0..99999 step 1",
        "up.mp4 frames 5..2 step 1",
        "up.mp4 frames 0..3 step 0",
        "up.mp4 frames 0, 1,",
        f"up.mp4 frames {', '.join(['5'] * 257)}",
    ],
)
def test_a_source_that_is_no_window_is_left_out(source: str, corpus: Path, tmp_path: Path) -> None:
    store = LabelStore(tmp_path, "w")
    phrase = Phrase("<b>" * 5000, "moves\x1b[31m", "", "left", "")
    good = StoredLabel("x" * 10**5, "slots", phrase, None, "d" * 10**5, "up.mp4 frames 0..3 step 1")
    store.put({"1" * 32: good, "2" * 32: good._replace(source=source)})
    sample = draw(store, [corpus / "videos/up.mp4"], 10)
    assert [key for key, *_ in sample.labels] == ["1" * 32]
    (card,) = read(page(sample, "t")).cards
    assert card.picture
    assert len(card.text) < 2000
    assert "\x1b" not in card.text
    store.close()


@pytest.mark.slow
def test_windows_of_an_uneven_rate_are_shown_with_their_own_frames(tmp_path: Path) -> None:
    """30 frames a second, later 10: stamps in the file alone tell which frames a window has."""
    name = f"{'long name ' * 24}.mkv"  # with its frames longer than the name of a label was
    film = Film(
        options=(("preset", "veryfast"),),
        suffix=".mkv",
        ticks=lambda number: number if number < 24 else 24 + 3 * (number - 24),
    )
    path = write(tmp_path / "videos" / "film", film).rename(tmp_path / "videos" / name)
    data = VideoDataConfig(kind="folder", root=str(path.parent), rate=15.0, clip_length=9)
    videos = scan_videos(data, tmp_path / "cache").videos
    clips = ClipDataset(videos, data, VlmConfig(), tmp_path)
    own = videos[0].numbers
    assert own is not None
    wanted = {tuple(own[end - 3 : end + 1]) for end in clips.window_ends(0)}
    assert {(0, 2, 4, 6), (24, 24, 25, 26), (45, 46, 46, 47)} < wanted
    for example in clips.label_examples(100):  # also what judges labels by a simulator's truth
        assert any((example.start, example.last) == (own[0], own[-1]) for own in wanted)
        assert number_of(example.frames[0]) == example.start
    clips.labeler.close()
    sample = draw(LabelStore(tmp_path / "labels", "r"), find_videos([path.parent]), 100)
    assert sample.elsewhere == 0
    assert {tuple(place.frames) for _, _, place, _ in sample.labels} == wanted
    cards = read(page(sample, "t")).cards
    assert len(cards) == len(wanted)
    for card, (_, _, place, _) in zip(cards, sample.labels, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(card.picture.partition(",")[2]))) as strip:
            cells = np.array_split(np.asarray(strip.convert("RGB")), 4, axis=1)
        assert [number_of(cell[:, :-3]) for cell in cells] == list(place.frames)
        assert ("unevenly spaced" in card.text) == bool(place.listed)


def test_a_source_that_an_earlier_version_may_have_cut_is_left_out(
    corpus: Path, tmp_path: Path
) -> None:
    videos = [corpus / "videos/up.mp4"]
    store = LabelStore(tmp_path, "w")
    whole = f"up.mp4 frames {', '.join(map(str, range(70)))}"
    good = StoredLabel("x", "null", None, None, "d", "up.mp4 frames 0, 1, 1, 3")
    store.put({"1" * 32: good, "2" * 32: good._replace(source=whole[:256])})
    (label,) = draw(store, videos, 10).labels
    assert (label[0], tuple(label[2].frames)) == ("1" * 32, (0, 1, 1, 3))
    store.close()


def test_a_video_whose_name_is_not_utf8_is_found(corpus: Path, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4"))
    odd.write_bytes((corpus / "videos/up.mp4").read_bytes())
    clips = ClipDataset([probe_video(odd)], VideoDataConfig(clip_length=9), VlmConfig(), tmp_path)
    clips.clip_at(0, 0)
    clips.labeler.close()
    sample = draw(LabelStore(tmp_path / "labels", "r"), find_videos([tmp_path]), 10)
    assert [bool(card.picture) for card in read(page(sample, "t")).cards] == [True, True]


def test_a_video_that_is_gone_leaves_its_words(corpus: Path) -> None:
    sample = draw(LabelStore(corpus / "labels", "r"), [corpus / "videos/up.mp4"], 1)
    key, label, place, _ = sample.labels[0]
    gone = Sample([(key, label, place, [corpus / "gone/up.mp4"])], sample.counts, 0)
    (card,) = read(page(gone, "t")).cards
    assert not card.picture
    assert "there is no such file" in card.text
    assert "percent of the frame width" in card.text


def test_without_arguments_it_takes_the_newest_run(
    corpus: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = in_tmp / "runs/one"
    run.mkdir(parents=True)
    where = f"data: {{root: {corpus}/videos}}\nwork_dir: {corpus}\nvlm: {{store: labels}}\n"
    (run / "config.yaml").write_text(signed(where))
    assert main([]) == 0
    assert "6 of 7 labels: runs/gallery.html" in capsys.readouterr().out
    assert len(read((in_tmp / "runs/gallery.html").read_text()).cards) == 6


def test_the_settings_of_a_strangers_run_choose_no_folders(
    corpus: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = in_tmp / "runs/theirs"
    run.mkdir(parents=True)
    where = f"data: {{root: {corpus}/videos}}\nwork_dir: {corpus}\nvlm: {{store: labels}}\n"
    (run / "config.yaml").write_text(where)
    assert main([]) == 2
    assert "was not saved by you on this machine" in capsys.readouterr().err
    assert not (in_tmp / "runs/gallery.html").exists()
    words = ["--store", f"{corpus}/labels", "--videos", f"{corpus}/videos"]
    assert main(words) == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "there is no run in 'runs': give --run, or --store and --videos"),
        (["--store", "nowhere", "--videos", "."], "there is no folder 'nowhere'"),
        (
            ["--store", ".", "--videos", ".", "--max-items", "0"],
            "--max-items must lie in [1, 2000]",
        ),
        (["--store", ".", "--videos", "."], "none of the 0 labels in '.'"),
        (["--store", ".", "--videos", ".", "--reviews", "x"], "vlm.reviews='x'"),
    ],
)
def test_wrong_words_get_one_sentence(
    words: list[str], sentence: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert sentence in said
    assert len(said.splitlines()) == 1
