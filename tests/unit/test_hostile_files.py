"""Files from strangers: damaged cards, claims of huge tensors, paths that lead elsewhere."""

from __future__ import annotations

import json
import os
import re
import resource
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from miniatures import write_ssv2
from strangers import stranger_card, write_agent

import mapo_lightning
from mapo_lightning.data.replay import Replay, ReplaySpec
from mapo_lightning.data.settings import ReplayConfig, VideoDataConfig
from mapo_lightning.data.ssv2 import list_ssv2
from mapo_lightning.label_tools.parquet import import_labels
from mapo_lightning.run.trainer import _Saving
from mapo_lightning.training.checkpoint import read_checkpoint, write_checkpoint
from mapo_lightning.types import CheckpointError, MapoError

GB = 2**30
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_agent(tmp_path_factory.mktemp("theirs") / "run/finetune/last.ckpt")


def changed(agent: Path, path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = read_checkpoint(agent)
    change(content)
    write_checkpoint(content, path)
    return path


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_an_honest_checkpoint_is_read_either_way(agent: Path) -> None:
    mapped, loaded = read_checkpoint(agent, mapped=True), read_checkpoint(agent)
    assert mapped["mapo"] == loaded["mapo"]
    assert all(torch.equal(x, loaded["state_dict"][k]) for k, x in mapped["state_dict"].items())


CARDS: dict[str, tuple[str, object]] = {
    "no card": ("", None),
    "a list": ("", [1]),
    "numbers as names": ("", {1: 2}),
    "huge width": ("action_dim", 10**12),
    "width zero": ("action_dim", 0),
    "text as width": ("action_dim", "2"),
    "truth as width": ("action_dim", True),
    "negative frames": ("env_frames", -1),
    "another stage": ("stage", "label"),
    "no stage": ("stage", None),
    "a list as stage": ("stage", ["finetune"]),
    "escape in the method": ("method", "\x1b[2J"),
    "number as settings": ("config", 5),
    "list as signature": ("config_signature", [1]),
    "long text": ("note", "x" * 1_000_001),
    "a tensor": ("note", torch.ones(1)),
    "not finite": ("note", float("nan")),
    "another id": ("mlflow_run", "../x"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
def test_a_damaged_card_is_one_sentence(name: str, agent: Path, tmp_path: Path) -> None:
    key, value = CARDS[name]

    def change(content: dict[str, Any]) -> None:
        if key:
            content["mapo"][key] = value
        else:
            content["mapo"] = value

    path = changed(agent, tmp_path / "x.ckpt", change)
    with pytest.raises(CheckpointError, match="is damaged: its entry") as caught:
        read_checkpoint(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.update(state_dict=[1]), "must hold named tensors"),
        (lambda c: c["state_dict"].update({"a\x1b": torch.ones(1)}), "has the entry"),
        (lambda c: c["state_dict"].update(a="text"), "which is no tensor"),
        (lambda c: c.update(global_step=-1), "'global_step' must be a whole number"),
        (lambda c: c["state_dict"].update(a=torch.zeros(1).expand(2**37)), "claim"),
        (lambda c: c.update(more=[{"a": torch.zeros(1).expand(2**37)}]), "claim"),
        (lambda c: c.update(views=[torch.zeros(64), torch.zeros(64).as_strided((64,), (0,))]),
         ""),
        (lambda c: c.update(a=torch.ones(2, 2).to_sparse()), "unusual kind"),
        (lambda c: c.update(a=torch.ones(2, device="meta")), "unusual kind"),
    ],
)  # fmt: skip
def test_weights_that_are_none_are_one_sentence(
    change: Callable[[dict[str, Any]], object], sentence: str, agent: Path, tmp_path: Path
) -> None:
    path = changed(agent, tmp_path / "x.ckpt", change)
    if not sentence:
        assert "views" in read_checkpoint(path)
        return
    with pytest.raises(CheckpointError, match=sentence):
        read_checkpoint(path)


def test_many_tensors_over_the_same_numbers_are_refused(agent: Path, tmp_path: Path) -> None:
    numbers = torch.zeros(1000)
    path = changed(
        agent, tmp_path / "x.ckpt", lambda c: c.update(a=[numbers.view(1000) for _ in range(500)])
    )
    with pytest.raises(CheckpointError, match="claim"):
        read_checkpoint(path)


def test_a_card_that_claims_512_gigabytes_costs_nothing(agent: Path, tmp_path: Path) -> None:
    """Networks of these sizes would have 512 GB of weights; the file has a few MB."""
    wide = 65_536  # a layer of 65,536 x 65,536 numbers takes 17 GB

    def widened(content: dict[str, Any]) -> None:
        settings = yaml.safe_load(content["mapo"]["config"])
        settings["world_model"] |= {"head_units": wide, "head_layers": 32}
        content["mapo"]["config"] = yaml.safe_dump(settings)

    path = changed(agent, tmp_path / "x.ckpt", widened)
    before = peak()
    with pytest.raises(CheckpointError, match="in the model"):
        mapo_lightning.load_agent(path)
    # 2^37 numbers of 4 bytes each that repeat one number: the weight that would fit.
    huge = torch.zeros(1).expand(2**37)
    path = changed(agent, tmp_path / "y.ckpt", lambda c: c["state_dict"].update(huge=huge))
    assert path.stat().st_size < GB // 10
    with pytest.raises(CheckpointError, match="claim"):
        mapo_lightning.load_agent(path)
    assert peak() - before < GB // 2


@pytest.mark.parametrize("kind", ["compressed", "larger than the file"])
def test_an_archive_that_grows_is_refused(kind: str, agent: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    method = zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(agent) as source, zipfile.ZipFile(path, "w", method) as target:
        for part in source.infolist():
            target.writestr(part.filename, source.read(part.filename), method)
    if kind != "compressed":
        data = path.read_bytes()
        place = data.rindex(b"PK\x01\x02")
        size = (2**31).to_bytes(4, "little")  # both sizes in the list of parts
        path.write_bytes(data[: place + 20] + size + size + data[place + 28 :])
    with pytest.raises(CheckpointError, match=kind):
        read_checkpoint(path)


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.fixture
def bomb(tmp_path: Path) -> Iterator[Bomb]:
    bomb = Bomb(tmp_path / "went_off")
    yield bomb
    assert not bomb.target.exists()


def test_no_checkpoint_runs_code(bomb: Bomb, tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": bomb}, "mapo": {}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is refused"):
        read_checkpoint(tmp_path / "x.pt")


def test_no_file_of_labels_runs_code(bomb: Bomb, tmp_path: Path) -> None:
    torch.save(bomb, tmp_path / "x.parquet")
    with pytest.raises((MapoError, ValueError)):
        import_labels(tmp_path / "x.parquet", tmp_path / "store")


@pytest.mark.parametrize("kind", ["episode", "zipped episode"])
def test_no_episode_runs_code(
    kind: str, bomb: Bomb, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "replay/episode-000000000.npy"
    file.parent.mkdir()
    if kind == "episode":
        np.save(file, np.array([bomb], object), allow_pickle=True)
    else:
        torch.save(bomb, file)
    replay = Replay(file.parent, ReplayConfig(), ReplaySpec((8, 8, 3), 2, 4))
    state = {"version": 1, "next_episode": 1, "episodes": [[0, 5]], "open": []}
    assert replay.restore(state) == 4  # agent steps that are lost
    assert replay.episodes == 0
    refused = {"episode": "Python objects in dtype", "zipped episode": "other entries than"}
    assert refused[kind] in caplog.text


ELSEWHERE = (
    "../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "C:\\secret", "a\x00b", "x" * 5000,
    "http://169.254.169.254/latest", "http://localhost/",
)  # fmt: skip


def test_a_list_of_videos_names_no_file_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_ssv2(tmp_path / "ssv2", train=2, validation=1)
    (tmp_path / "outside.webm").write_bytes(b"x")
    rows = json.loads((root / "labels/train.json").read_text())
    names = (*ELSEWHERE, "../../outside", str(tmp_path / "outside"))
    rows += [rows[0] | {"id": name} for name in names]
    (root / "labels/train.json").write_text(json.dumps(rows))

    def no_network(*_: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("socket.socket.connect", no_network)
    listing = list_ssv2(root)
    assert sorted(listing.missing) == sorted(names)
    assert {entry.path.stem for entry in listing.entries} == {"101", "102", "103"}
    assert all(entry.path.is_relative_to(root) for entry in listing.entries)
    assert VideoDataConfig(kind="ssv2", root=str(root)).root


def test_lightning_deletes_no_file_that_a_checkpoint_names(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "victim").write_text("mine")
    for path in (f"{folder}/../victim", "memory://x/y", str(tmp_path / "victim"), 5):
        saving = _Saving(folder, 1)
        names = ("best_model_path", "kth_best_model_path", "last_model_path")
        state = dict.fromkeys(names, path) | {"best_model_score": None, "dirpath": str(folder)}
        saving.load_state_dict(state | {"best_k_models": {str(path): torch.ones(())}})
        assert [getattr(saving, name) for name in names] == ["", "", ""]
        assert saving.best_k_models == {}
    own = str(folder / "step=3.ckpt")
    saving.load_state_dict(state | dict.fromkeys(names, own))
    assert saving.best_model_path == own


def test_a_strangers_card_is_made_of_what_is_checked() -> None:
    assert set(stranger_card("finetune", "")) >= {"stage", "method", "config", "mlflow_run"}


def test_no_code_from_a_hub_is_ever_trusted() -> None:
    found = 0
    for path in (ROOT / "mapo_lightning").rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if re.search(r"trust_remote_code\W+(=|:)|\"trust_remote_code\":", line):
                assert re.search(r"trust_remote_code\"?(=|: )False", line), (path, line)
                found += 1
    assert found
