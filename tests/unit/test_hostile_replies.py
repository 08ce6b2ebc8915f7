"""What a describer says reaches eyes and files as plain, bounded text, and nothing else."""

from __future__ import annotations

import ast
import csv
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import mlflow
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from label_servers import ORDERS, print_order, running
from PIL import Image
from replies import HOSTILE, replies

from mapo_lightning.label_tools.page import Place, Sample, page
from mapo_lightning.semantics.answers import read_answer
from mapo_lightning.semantics.describer import Reply
from mapo_lightning.semantics.embed import HashedSlots
from mapo_lightning.semantics.labeler import Label, Labeler, WindowRequest
from mapo_lightning.semantics.openai_server import OpenAIDescriber
from mapo_lightning.semantics.phrase import MAX_READ, MAX_SLOT, MAX_TEXT, parse_reply
from mapo_lightning.semantics.settings import ServerConfig, VlmConfig
from mapo_lightning.semantics.store import LabelStore, StoredLabel
from mapo_lightning.tracking import artifacts
from mapo_lightning.tracking.logger import RunLogger, make_logger, open_store, store_uri
from mapo_lightning.tracking.settings import TrackingConfig
from mapo_lightning.types import Frames

VIDEO = "\x1b[31m<b onclick='x'>\"=cup.mp4"


class Says:
    """Gives the replies it was made with, one after the other."""

    name, in_worker = "says <i>\x1b[1m", True

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)

    def describe(self, clips: Sequence[Frames]) -> list[Reply]:
        return [Reply(self.words[int(clip.flat[0])]) for clip in clips]


def labelled(words: Sequence[str], folder: Path) -> tuple[list[Label], dict[str, StoredLabel]]:
    """Take replies through parser, store and encoder; returns labels, and the store read anew."""
    store = LabelStore(folder, "w", durable=False)
    asking = Labeler(Says(words), store, HashedSlots())
    requests = [
        WindowRequest(str(i), f"{VIDEO} frames {i}..{i + 3} step 1", lambda i=i: np.full(1, i))  # type: ignore[misc]
        for i in range(len(words))
    ]
    labels = asking.label(requests)
    asking.close()
    return labels, LabelStore(folder, "r").items()


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StoredLabel]:
    labels, found = labelled(replies(), tmp_path_factory.mktemp("store"))
    assert len(labels) == 500
    # Those that say nothing or break off are no answers; all others are kept.
    assert len(found) == sum(isinstance(read_answer(text), str) for text in replies())
    assert 400 < len(found) < 500
    for label in labels:
        assert np.isfinite(label.vector).all()
        assert np.linalg.norm(label.vector) <= 5**0.5 + 1e-5
    return found


def test_the_corpus_is_the_same_every_time_and_covers_what_it_says() -> None:
    words = replies()
    assert words == replies()
    assert len(words) == 500
    assert set(HOSTILE) <= set(words)
    assert max(map(len, words)) >= 10_000


@pytest.mark.slow
def test_what_is_stored_is_bounded_printable_and_readable(
    stored: dict[str, StoredLabel],
) -> None:
    counts = Counter(label.status for label in stored.values())
    assert {"slots", "null", "unreadable"} <= set(counts)
    for label in stored.values():
        check_plain(label)


def check_plain(label: StoredLabel) -> None:
    """What is stored of an answer is short, and all of it can be printed."""
    assert len(label.text) <= MAX_TEXT
    assert len(label.source) <= MAX_TEXT
    for text in (label.text, label.source, *(label.phrase or ())):
        assert text.isprintable()
        text.encode()  # no half surrogate
    assert all(len(slot) <= MAX_SLOT for slot in label.phrase or ())


@pytest.mark.slow
def test_orders_printed_in_pictures_become_bounded_words_at_most(tmp_path: Path) -> None:
    """A describer that does all that a picture tells it to: what it says is a label like any."""
    rng = np.random.default_rng(0)
    films = []
    for number in range(200):
        paper, ink = rng.choice(["navy", "olive", "white", "gray"], 2, replace=False)
        at = (int(rng.integers(40)), int(rng.integers(45, 120)))
        image = Image.new("RGB", (224, 224), str(paper))
        films.append(np.stack([print_order(image, number % len(ORDERS), at, str(ink))] * 4))
    store = LabelStore(tmp_path, "w", durable=False)
    with running(obeys=True) as server:
        cfg = VlmConfig(kind="openai", server=ServerConfig(server.url))
        asking = Labeler(OpenAIDescriber(cfg), store, HashedSlots())
        requests = [
            WindowRequest(str(i), f"film{i}.mp4 frames 0..3 step 1", lambda film=film: film)  # type: ignore[misc]
            for i, film in enumerate(films)
        ]
        labels = asking.label(requests)
        asking.close()
        assert server.stats()["answered"] == 200
    found = LabelStore(tmp_path, "r").items()
    assert len(found) == len(labels) == 200
    for label in found.values():
        check_plain(label)
        # Five slots, a sentence as the action of five slots, or null: nothing else goes on.
        assert label.phrase is None or len(label.phrase) == 5
    for answer in labels:
        assert answer.vector.shape == (asking.semantic_dim,)
        assert np.isfinite(answer.vector).all()
    counts = Counter((label.status, label.phrase is None) for label in found.values())
    readable = {("slots", False), ("prose", False)}
    assert readable & set(counts), "every order was refused: the test shows nothing"
    assert set(counts) <= {*readable, ("null", True), ("unreadable", True)}


@pytest.mark.slow
@settings(max_examples=60)
@given(st.lists(st.text(max_size=300) | st.sampled_from(HOSTILE), min_size=1, max_size=4))
def test_no_text_at_all_raises(words: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        labels, found = labelled(words, Path(folder))
    assert len(labels) == len(words)
    assert len(found) == sum(label.answered for label in labels)
    assert page(sample(found), "t").count("<article") == len(found)


@pytest.mark.parametrize("piece", HOSTILE)
def test_no_more_of_a_reply_is_read_than_its_beginning(piece: str) -> None:
    """Reading takes bounded time, however long a reply is."""
    long = (piece or " ") * (MAX_READ // max(len(piece), 1) + 1)
    assert parse_reply(long[:MAX_READ] + "[foot][kicks][ball][up][2 m]\n" * 10**4) == parse_reply(
        long[:MAX_READ]
    )


def test_log_lines_stay_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        labelled(replies(120), tmp_path)
    assert caplog.records
    for record in caplog.records:
        line = record.getMessage()
        assert line.isprintable()
        assert len(line) < 500


def sample(found: dict[str, StoredLabel]) -> Sample:
    labels = [
        (key, label, Place(VIDEO, i, i + 3, 1), [Path(VIDEO)])
        for i, (key, label) in enumerate(found.items())
    ]
    return Sample(labels, Counter(label.status for label in found.values()), 0)


class Tags(HTMLParser):
    """Every tag and attribute that a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.slow
def test_nothing_in_the_gallery_becomes_markup(stored: dict[str, StoredLabel]) -> None:
    plain = {key: label._replace(text="x", phrase=None) for key, label in stored.items()}
    seen, expected = Tags(), Tags()
    shown = page(sample(stored), "<b>title</b>")
    seen.feed(shown)
    expected.feed(page(sample(plain), "t"))
    slots = {"dl", "dt", "dd", "div", "p"}  # a phrase has five slots, none has a sentence
    assert seen.tags["article"] == len(stored)
    assert seen.tags["script"] == seen.tags["style"] == 1
    assert {t: n for t, n in seen.tags.items() if t not in slots} == {
        t: n for t, n in expected.tags.items() if t not in slots
    }
    assert seen.attributes == expected.attributes
    assert not {name for name in seen.attributes if name.startswith("on") or name == "style"}
    assert "<b>title" not in shown
    assert "49" not in {text.strip() for text in seen.texts}  # {{ 7*7 }} is words
    assert all(c.isprintable() or c == "\n" for c in shown)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrackingConfig, RunLogger]:
    place = tmp_path_factory.mktemp("mlflow")
    cfg = TrackingConfig(uri=f"sqlite:///{place}/mlflow.db", artifacts=str(place / "artifacts"))
    open_store(cfg)
    logger = make_logger(cfg, "fit")
    assert isinstance(logger, RunLogger)
    return cfg, logger


@pytest.mark.slow
def test_tables_hold_no_formula_and_no_line_too_many(
    stored: dict[str, StoredLabel], run: tuple[TrackingConfig, RunLogger]
) -> None:
    cfg, logger = run
    rows = [{"video": x.source, "status": x.status, "text": x.text} for x in stored.values()]
    assert artifacts.log_table(logger, rows, "phrases/all")
    logger.finalize("success")
    client = mlflow.MlflowClient(store_uri(cfg))
    folder = Path(client.download_artifacts(logger.active_run, "phrases"))
    with (folder / "all.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.reader(file))
    assert len(read) == 1 + len(stored)
    for row in read:
        assert len(row) == 3
        assert all(cell.lstrip()[:1] not in set("=+-@") for cell in row)
        assert all(cell.isprintable() for cell in row)
    assert len(json.loads((folder / "all.json").read_text())) == len(stored)
    assert "sk-aaaa" not in (folder / "all.csv").read_text()


def test_no_code_on_the_way_could_run_a_word(root: Path) -> None:
    rooms = [root / "mapo_lightning" / room for room in ("semantics", "label_tools")]
    files = [path for room in rooms for path in room.glob("*.py")]
    assert len(files) > 15
    for path in [*files, root / "mapo_lightning/run/quality.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                assert not names & {"subprocess", "pickle", "shlex", "pty"}, path.name
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "os.system", "os.popen"), path.name
                assert not called.endswith(".format"), f"{path.name}: texts are no templates"
