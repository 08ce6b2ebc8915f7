"""train.py with a vision-language model: behind a server, in the process, and without either."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from label_servers import running
from program import SMALL, train
from tiny_models import save_bert, save_qwen

from mapo_lightning.data.video import write_mp4
from mapo_lightning.run import quality
from mapo_lightning.semantics.store import LabelStore


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three short films of drifting noise."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(3):
        picture = np.random.default_rng(number).integers(0, 255, (12, 16, 3)).astype(np.uint8)
        picture = picture.repeat(8, 0).repeat(8, 1)
        film = np.stack([np.roll(picture, 2 * t, axis=1) for t in range(40)])
        write_mp4(folder / f"{number}.mp4", film, 10.0)
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen(tmp_path_factory.mktemp("qwen"))


def words(videos: Path, *more: str) -> list[str]:
    return [*SMALL, "data=folder", f"data.root={videos}", "stage=pretrain", *more]


@pytest.mark.slow
def test_real_model_behind_a_server(videos: Path, qwen: Path, tmp_path: Path) -> None:
    with running(model=str(qwen)) as server:
        server_words = [
            "vlm=openai_server",
            f"vlm.server.base_url={server.url}",
            "vlm.window.size=64",
        ]
        said = train(tmp_path, *words(videos, *server_words, "data.workers=2", "run_dir=one"))
        assert ": 0 queried," not in said
    labels = LabelStore(tmp_path / "runs/cache/labels", "r").items().values()
    assert {label.status for label in labels} == {"prose"}
    assert all("hand" in label.text for label in labels)
    # The server is gone: the run needs no more than the answers that it has given before.
    said = train(tmp_path, *words(videos, *server_words, "vlm.cached_only=true", "data.workers=2"))
    assert ": 0 queried," in said
    server_words[-1] = "vlm.window.size=72"  # other pictures, other questions
    said = train(tmp_path, *words(videos, *server_words, "vlm.cached_only=true"), code=2)
    assert "there is no label of" in said
    assert ".mp4 frames" in said


@pytest.mark.slow
def test_model_in_the_process(videos: Path, qwen: Path, tmp_path: Path) -> None:
    model = ["vlm=qwen2_5_vl_7b", f"vlm.model={qwen}", "vlm.max_new_tokens=8", "vlm.window.size=64"]
    said = train(tmp_path, *words(videos, *model, "data.workers=2", "work_dir=online"))
    assert ": 0 queried," not in said
    said = train(tmp_path, *words(videos, *model, "stage=label"))
    assert "30 of 30 windows: 30 queried, 0 known before" in said
    said = train(tmp_path, *words(videos, *model, "vlm.cached_only=true", "data.workers=2"))
    assert ": 0 queried," in said
    labels = LabelStore(tmp_path / "runs/cache/labels", "r").items().values()
    assert {label.hidden.shape for label in labels if label.hidden is not None} == {(64,)}


@pytest.mark.slow
def test_sentences_in_a_file_and_nulls_in_the_environment(videos: Path, tmp_path: Path) -> None:
    file = tmp_path / "said.csv"
    file.write_text("video,start,end,text\n0,0,9,The noise drifts to the right.\n")
    run = [*words(videos, "vlm=templates", f"vlm.captions={file}"), "data.workers=2"]
    said = train(tmp_path, *run, "stage=all")
    assert "1 sentences about 1 of 3 videos" in said
    assert said.count("vlm=templates has no sentences about an environment") == 1
    labels = LabelStore(tmp_path / "runs/cache/labels", "r").items().values()
    assert {label.source.split()[0] for label in labels} == {"0.mp4", "1.mp4", "2.mp4"}
    known = {label.phrase.direction for label in labels if label.phrase is not None}
    assert known == {"right"}
    file.write_text("video,start,end,text\n7,0,9,x\n")
    said = train(tmp_path, *run, "run_dir=refused", code=2)
    assert "line 2: there is no video '7'" in said
    assert not (tmp_path / "refused").exists()


def test_absent_model_is_one_sentence(videos: Path, tmp_path: Path) -> None:
    said = train(tmp_path, *words(videos, "vlm=qwen2_5_vl_7b"), code=2)
    assert "error: cannot load 'Qwen/Qwen2.5-VL-7B-Instruct'" in said
    assert "Traceback" not in said


def test_sentence_encoder(videos: Path, tmp_path: Path) -> None:
    bert = save_bert(tmp_path / "bert")
    train(tmp_path, *words(videos, f"vlm.embed.encoder={bert}", "data.workers=1"))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["wait", "skip"])
def test_server_dies_for_three_seconds(policy: str, videos: Path, tmp_path: Path) -> None:
    with running(seconds=0.1, at_once=2, schema="ignored") as server:
        said: list[str] = []
        run = words(
            videos, "vlm=openai_server", f"vlm.server.base_url={server.url}", "data.workers=1"
        )
        run += ["pretrain.updates=30", "pretrain.validate_every=30", "vlm.server.concurrency=2"]
        run += [
            "callbacks.rollout_every=100",
            f"vlm.server.on_outage={policy}",
            "vlm.window.size=64",
        ]
        training = threading.Thread(target=lambda: said.append(train(tmp_path, *run)))
        training.start()
        server.wait_for(3)
        server.kill()
        time.sleep(3.0)  # the outage
        server.start(server.port)
        training.join(120)
        calls = server.stats()["calls"]
    assert said, "training failed"
    assert said[0].count("no label server answers") == 1
    if policy == "wait":
        assert said[0].count("servers answer again after") == 1
        assert calls > 0
    labels = LabelStore(tmp_path / "runs/cache/labels", "r").items()
    assert len(labels) > 0
    assert (tmp_path / "runs").is_dir()
    assert not any((tmp_path / "runs/cache/labels/locks").glob("[0-9a-f]*"))


@pytest.mark.slow
def test_a_model_that_always_says_right_is_right_by_measurement(
    root: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (in_tmp / "conf").symlink_to(root / "conf")
    words = ["data=demo", "demo.scenes=[toy/disc_anywhere]", "demo.clips_per_scene=12"]
    words += ["data.root=films", "vlm=openai_server", "callbacks.quality=60", "work_dir=work"]
    words += ["vlm.window.stride=4"]  # the windows of docs/vlm.md
    found = {}
    with running(says="[arm][moves][object][right][5 cm]") as server:
        for direction in ("model", "flow"):
            more = [f"vlm.server.base_url={server.url}", f"vlm.direction={direction}"]
            assert quality.main([*words, *more, f"run_dir={direction}"]) == 0
            found[direction] = json.loads((in_tmp / direction / "openai.json").read_text())
    capsys.readouterr()
    before, after = found["model"]["truth"], found["flow"]["truth"]
    assert (before["clear"], before["told"]) == (54, 54)
    assert before["share"] == pytest.approx(before["chance"], abs=1e-9)  # 13 of 54
    assert before["share"] < 0.3
    assert after["share"] >= 0.95  # 54 of 54
    assert after["told"] >= 50
    assert after["chance"] < 0.4
    assert after["magnitude"] > 0.9  # and how far, which "5 cm" does not say


def check_words(root: Path) -> list[str]:
    """What ``make vlm-check`` types."""
    done = subprocess.run(
        ["make", "-n", "vlm-check", "GL=skip"], cwd=root, capture_output=True, text=True, check=True
    )
    line = done.stdout.replace("\\\n", " ").rpartition("-m mapo_lightning.quality")[2]
    return shlex.split(line.splitlines()[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformers", "openai", "flow"])
def test_vlm_check_measures_a_describer(
    root: Path,
    in_tmp: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    request: pytest.FixtureRequest,
) -> None:
    (in_tmp / "conf").symlink_to(root / "conf")
    words = check_words(root)
    assert "callbacks.quality=50" in words
    # Fewer films without a simulator; what comes later wins.
    words += ["demo.scenes=[toy/disc_anywhere]", "demo.clips_per_scene=3", "callbacks.quality=6"]
    with running(says="[arm][moves][object][right][5 cm]") as server:
        words += {
            "transformers": ["vlm=qwen2_5_vl_7b", f"vlm.model={request.getfixturevalue('qwen')}"],
            "openai": ["vlm=openai_server", f"vlm.server.base_url={server.url}"],
            "flow": ["vlm=flow"],
        }[kind]
        assert quality.main(words) == 0
        table = capsys.readouterr().out
        answered = server.stats()["answered"]
        assert quality.main(words) == 0  # all answers are known now
        assert "| windows queried now | 0 |" in capsys.readouterr().out
        assert server.stats()["answered"] == answered
    assert "| windows queried now | 29 |" in table  # 6 windows, 4 copies of each, less the first
    assert re.search(r"\| seconds per window \| \d", table)
    tokens = re.search(r"\| tokens per query \| (.*) \|", table)
    assert tokens is not None
    if kind == "flow":
        assert tokens[1] == "-"
    elif kind == "openai":
        assert tokens[1] == "9 in, 1,000,000 out"  # what that server claims
        assert answered == 30
    else:
        asked, said = (int(count.replace(",", "")) for count in re.findall(r"[\d,]*\d", tokens[1]))
        assert asked > 4 * 4  # the prompt and at least the frames
        assert said == 5  # four words and the end
