"""A stranger's checkpoint is played, loaded, resumed and started from: nothing gets out.

A real server listens, a secret is in the environment, and folders outside are named. Nobody calls,
the secret turns up in no file and on no screen, and nothing is written outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import program
import pytest
from program import SMALL, train
from strangers import CANARY, Sink, greedy_words, listening, stranger_card, write_agent

import mapo_lightning
from mapo_lightning.run.main import main
from mapo_lightning.run.told import main as told
from mapo_lightning.training.checkpoint import read_checkpoint, write_checkpoint
from mapo_lightning.types import ConfigError


class Attack:
    """A server that listens, a folder where nothing may be written, and the user's own folder."""

    def __init__(self, sink: Sink, place: Path) -> None:
        self.sink, self.outside, self.here = sink, place / "outside", place / "here"
        self.here.mkdir()
        self.words = greedy_words(sink.url, self.outside)

    def failed(self, *said: str) -> None:
        """Assert that nothing has got out."""
        assert (self.sink.connections, self.sink.seen) == (0, [])
        assert not self.outside.exists()
        assert not any(CANARY in text for text in said)
        for path in self.here.rglob("*"):
            assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path


@pytest.fixture
def attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Attack]:
    for name in ("MAPO_CANARY", "MAPO_VLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, CANARY)
        monkeypatch.setitem(program.ENVIRONMENT, name, CANARY)
    monkeypatch.delenv("MAPO_RUN_DIR", raising=False)
    with listening() as sink:
        attack = Attack(sink, tmp_path)
        monkeypatch.chdir(attack.here)
        yield attack


def test_a_strangers_agent_is_loaded(
    attack: Attack, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_agent(tmp_path / "theirs/finetune/last.ckpt", *attack.words)
    with pytest.raises(ConfigError, match="may not choose whom your frames are sent to"):
        mapo_lightning.load_agent(path)
    for silent in ({"describe": False}, {"words": ["vlm=none"]}):
        with mapo_lightning.load_agent(path, **silent) as agent:
            side = agent.cfg.env.size
            watch_six(agent, side)
    assert told([f"checkpoint={path}"]) == 2
    assert main([f"init_from={path}", *SMALL, "stage=finetune"]) == 2
    attack.failed(*capfd.readouterr())
    # With the user's own word the server is asked, and only the one that was typed.
    with listening() as mine:
        words = [f"vlm.server.base_url={mine.url}/v1", "vlm.server.on_outage=skip"]
        words += ["vlm.window.frames=2", "vlm.collect.size=null", "vlm.collect.every=1"]
        with (
            mapo_lightning.load_agent(path, words=[*words, "vlm.server.retries=0"]) as agent,
            pytest.raises(mapo_lightning.types.DescriberError),
        ):
            watch_six(agent, side)
        assert mine.seen
    attack.failed(*capfd.readouterr())


def watch_six(agent: mapo_lightning.Agent, side: int) -> None:
    """Show an agent six black frames."""
    for _ in range(6):
        agent.act(np.zeros((side, side, 3), np.uint8))


@pytest.mark.slow
def test_a_strangers_agent_is_played(attack: Attack, tmp_path: Path) -> None:
    path = write_agent(tmp_path / "theirs/finetune/last.ckpt", *attack.words)
    words = ["stage=evaluate", f"checkpoint={path}", "evaluate.episodes=2", "evaluate.videos=1"]
    words += ["trainer.threads=1", "trainer.accelerator=cpu"]
    said = train(attack.here, *words, "vlm=none")
    assert "was not saved by you on this machine" in said
    assert "2 episodes from reset seeds" in said
    runs = [p for p in (attack.here / "runs").iterdir() if p.name.endswith("-mapo-disc")]
    assert len(runs) == 1
    assert (attack.here / "runs/mlflow.db").exists()
    attack.failed(said)


@pytest.mark.slow
def test_a_strangers_run_is_resumed(attack: Attack, tmp_path: Path) -> None:
    tiny = [*SMALL, "data=toy", "demo.clips_per_scene=3", "callbacks.told=0", "callbacks.quality=0"]
    tiny += ["callbacks.gallery=0", "stage=pretrain", "trainer.threads=1"]
    (tmp_path / "theirs").mkdir()
    train(tmp_path / "theirs", *tiny, "run_dir=run", "pretrain.updates=2")
    path = tmp_path / "theirs/run/pretrain/last.ckpt"
    content = read_checkpoint(path)
    honest = (tmp_path / "theirs/run/config.yaml").read_text()
    stolen = honest.replace("runs/cache", str(attack.outside / "work"))
    stolen = stolen.replace(
        "sqlite:///runs/mlflow.db", f"{attack.sink.url}/${{oc.env:MAPO_CANARY}}"
    )
    assert stolen != honest
    content["mapo"] = stranger_card("pretrain", stolen)
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    for state in content["callbacks"].values():
        if "best_model_path" in state:
            state["best_model_path"] = f"{attack.here}/mine/pretrain/../../../victim.txt"
    write_checkpoint(content, path)
    (tmp_path / "theirs/run/config.yaml").write_text(stolen)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "theirs").rglob("*")}
    asked = train(attack.here, f"resume={tmp_path}/theirs/run", code=2)
    assert "may not choose which folder is read: add data.root=DIR" in asked
    words = [f"resume={tmp_path}/theirs/run", "run_dir=mine", "data=toy", "pretrain.updates=3"]
    words += ["callbacks.told=0", "callbacks.quality=0", "callbacks.gallery=0"]
    words += ["demo.clips_per_scene=3", "trainer.threads=1", "trainer.accelerator=cpu"]
    said = train(attack.here, *words, "tracking.enabled=true")
    assert read_checkpoint(attack.here / "mine/pretrain/last.ckpt")["global_step"] == 3
    assert victim.read_text() == "mine"
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "theirs").rglob("*")}
    assert (attack.here / "runs/mlflow.db").exists()
    attack.failed(asked, said)
