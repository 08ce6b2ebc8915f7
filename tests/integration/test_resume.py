"""Fine-tuning is killed and goes on, on one process and on two; its checkpoints are played."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sqlite3
import time
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import yaml
from killing import differences, experience, state_of
from program import SMALL, TRAIN, end, start, train

from mapo_lightning.run.episode_player import EpisodePlayer
from mapo_lightning.run.main import main
from mapo_lightning.training.checkpoint import read_checkpoint

FINETUNE = [*SMALL, "stage=finetune", "callbacks.rollout_every=1000"]


def kill_after_checkpoints(folder: Path, words: list[str], count: int) -> dict[str, Any]:
    """Start train.py, kill it in the middle of its work, return the newest checkpoint's content."""
    with (folder / "said.txt").open("w") as said:
        process = start(folder, TRAIN, *words, said=said)
        last = folder / "run/finetune/last.ckpt"
        seen: set[int] = set()
        deadline = time.monotonic() + 120
        while len(seen) < count and process.poll() is None and time.monotonic() < deadline:
            if last.exists():
                seen.add(last.stat().st_mtime_ns)
            time.sleep(0.005)
        end(process)
    assert process.returncode == -signal.SIGKILL, (folder / "said.txt").read_text()
    return read_checkpoint(last)


def steps_held(replay: Path) -> int:
    index = json.loads((replay / "index.json").read_text())
    return sum(entries - 1 for _, entries, *_ in [*index["episodes"], *index["open"]])


@pytest.mark.slow
def test_a_killed_run_goes_on_where_its_checkpoint_was(tmp_path: Path) -> None:
    words = [*FINETUNE, "run_dir=run", "tracking.enabled=true"]
    words += ["finetune.agent_steps=400", "callbacks.checkpoint_every=5"]
    before = kill_after_checkpoints(tmp_path, words, 3)
    made = before["global_step"]
    assert 10 < made < 60
    assert before["mapo"]["env_frames"] == 2 * steps_held(tmp_path / "run/replay/rank0")
    torch.save(before, tmp_path / "before.ckpt")
    # One more update only: everything that an update changes a little is still near.
    one_more = ["resume=run", f"finetune.agent_steps={110 + 5 * (made - 2) + 5}"]
    train(tmp_path, *one_more)
    after = read_checkpoint(tmp_path / "run/finetune/last.ckpt")
    assert after["global_step"] == made + 1
    for key, tensor in after["state_dict"].items():
        if tensor.is_floating_point() and not key.endswith(("queue", "candidates")):
            moved = (tensor - before["state_dict"][key]).abs().max()
            assert float(moved) < 0.2 * float(tensor.abs().max()) + 0.01, key
    moments = after["optimizer_states"][0]["state"]
    assert {int(entry["step"]) for entry in moments.values()} == {made + 1}
    assert after["lr_schedulers"][0]["last_epoch"] == made + 1
    filled = "world_model.bonus.filled"
    assert filled not in after["state_dict"] or int(after["state_dict"][filled])
    added = after["mapo"]["env_frames"] - before["mapo"]["env_frames"]
    assert 2 * 4 <= added <= 2 * 7  # five agent steps, two environments, what was owed
    # Nothing of the replay is lost, and the episodes under way went on.
    assert after["mapo"]["env_frames"] == 2 * steps_held(tmp_path / "run/replay/rank0")
    assert f"has all of its {made + 1} updates" in train(tmp_path, "resume=run/finetune/last.ckpt")
    check_one_mlflow_run(tmp_path / "runs/mlflow.db")


def check_one_mlflow_run(path: Path) -> None:
    db = sqlite3.connect(path)
    assert sorted(db.execute("select name, status from runs")) == [
        ("run", "FINISHED"),
        ("run/finetune", "FINISHED"),
    ]
    for name in ("train/actor", "initial/train/actor"):  # no point of a curve twice
        what = f"from metrics where key='{name}' group by step"
        assert {count for _, count in db.execute(f"select step, count(*) {what}")} == {1}
    # The same in the file beside MLflow.
    with (path.parents[1] / "run/finetune/curves.csv").open(newline="") as file:
        rows = [(row["name"], row["step"]) for row in csv.DictReader(file)]
    assert len(set(rows)) == len(rows)
    stored = db.execute("select count(*) from metrics where key='train/actor'").fetchone()[0]
    assert stored == sum(name == "train/actor" for name, _ in rows) > 0
    tags = dict(db.execute("select key, value from tags where key like 'resume.%'"))
    assert any("finetune.agent_steps: 400 -> " in text for text in tags.values())


def first_by_return(folder: Path) -> Any:
    """The model of MLflow with the best evaluation."""
    mlflow.set_tracking_uri(f"sqlite:///{folder}/runs/mlflow.db")
    experiment = mlflow.get_experiment_by_name("mapo")
    order = [{"field_name": "metrics.eval/return", "ascending": False}]
    found = mlflow.search_logged_models([experiment.experiment_id], order_by=order)
    assert sorted(found["name"]) == ["run-finetune-best", "run-finetune-last"]
    assert set(found["status"].map(str)) == {"READY"}
    return found.iloc[0]


def test_the_best_agent_is_kept_and_plays_episodes_that_chose_nobody(tmp_path: Path) -> None:
    words = [*FINETUNE, "tracking.enabled=true", "run_dir=run", "evaluate.keep_best=true"]
    few = ["evaluate.every=2", "evaluate.episodes=3", "evaluate.videos=1"]
    said = train(tmp_path, *words, *few)
    assert "means of evaluate.episodes=3 are mostly luck; take 6 or more" in said
    db = sqlite3.connect(tmp_path / "runs/mlflow.db")

    def evaluations() -> dict[int, float]:
        tuned = "select run_uuid from runs where name = 'run/finetune'"
        what = f"where key = 'eval/return' and run_uuid in ({tuned})"
        return dict(db.execute(f"select step, value from metrics {what}"))

    def kept() -> int:
        frames: int = read_checkpoint(tmp_path / "run/finetune/best.ckpt")["mapo"]["env_frames"]
        played = json.loads((tmp_path / "run/evaluation.json").read_text())
        assert Path(played["checkpoint"]) == tmp_path / "run/finetune/best.ckpt"
        assert played["env_frames"] == frames
        assert [e["seed"] for e in played["policies"]["random"]["episodes"]] == [1003, 1004, 1005]
        return frames

    before = evaluations()
    assert len(before) == 3
    model, best = first_by_return(tmp_path), tmp_path / "run/finetune/best.ckpt"
    assert Path(model["tags"]["checkpoint"]) == best
    size = yaml.safe_load(read_checkpoint(best)["mapo"]["config"])["env"]["size"]
    agent = mlflow.pyfunc.load_model(f"models:/{model['model_id']}")
    assert agent.predict(np.zeros((size, size, 3), np.uint8)).shape == (2,)
    assert list((tmp_path / "runs/artifacts").rglob("checkpoints/best.ckpt"))
    assert before[kept()] == max(before.values())
    assert [film.name for film in (tmp_path / "run/videos").iterdir()] == ["seed_1003.mp4"]
    # A run that was killed in its last episodes plays them when it is resumed.
    (tmp_path / "run/evaluation.json").unlink()
    train(tmp_path, "resume=run")
    assert before[kept()] == max(before.values())
    # The seeds that chose an agent are not those that judge it.
    said = train(tmp_path, "stage=evaluate", "checkpoint=run/finetune/best.ckpt", "run_dir=again")
    assert "3 episodes from reset seeds 1003..1005" in said
    # A resumed run knows what it has to beat.
    train(tmp_path, "resume=run", "finetune.agent_steps=150")
    after = evaluations()
    assert len(after) > 3
    assert after[kept()] == max(after.values())
    again = first_by_return(tmp_path)
    (newest,) = (one for one in again["metrics"] if one.key == "eval/return")
    assert (newest.step, newest.value) == (kept(), after[kept()])
    (tmp_path / "run/finetune/best.ckpt").unlink()
    train(tmp_path, "resume=run", "finetune.agent_steps=170")
    last = {frames: score for frames, score in evaluations().items() if frames not in after}
    assert last[kept()] == max(last.values())


DIGEST = """
import hashlib
import sys
from pathlib import Path
import lightning as L
from mapo_lightning.run import phase
from mapo_lightning.run.main import main

class Digest(L.Callback):
    def on_train_end(self, trainer, module):
        weights = {k: p.detach().numpy().tobytes() for k, p in module.named_parameters()}
        digests = {k: hashlib.sha256(data).hexdigest() for k, data in weights.items()}
        Path(f"rank{trainer.global_rank}.txt").write_text(repr(digests))

make = phase.build_trainer
phase.build_trainer = lambda cfg, n, at, calls, *rest: make(cfg, n, at, [*calls, Digest()], *rest)

if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.mark.slow
def test_two_processes_fine_tune_together_and_resume_together(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(DIGEST)
    run = partial(train, tmp_path, script=str(script))
    two = ["trainer.devices=2", "trainer.strategy=ddp", "tracking.enabled=true"]
    two += ["evaluate.keep_best=true", "evaluate.every=2"]
    two += ["finetune.agent_updates=2", "agent.normalise=percentile"]  # both speak to each other
    said = run(*FINETUNE, *two, "run_dir=run", "finetune.agent_steps=170")
    assert said.count("episodes from reset seeds") == 1  # one process speaks
    weights = [(tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1)]
    assert weights[0] == weights[1]
    assert run("resume=run", "finetune.agent_steps=190")
    again = [(tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1)]
    assert again[0] == again[1] != weights[0]
    content = read_checkpoint(tmp_path / "run/finetune/last.ckpt")
    assert content["global_step"] == 2 + (190 - 110) // 10
    held = [steps_held(tmp_path / f"run/replay/rank{rank}") for rank in (0, 1)]
    assert content["mapo"]["env_frames"] == 2 * sum(held)
    db = sqlite3.connect(tmp_path / "runs/mlflow.db")
    assert sorted(db.execute("select name, status from runs")) == [
        ("run", "FINISHED"),
        ("run/evaluate", "FINISHED"),
        ("run/evaluate", "FINISHED"),
        ("run/finetune", "FINISHED"),
    ]
    # It equals a run that made all updates at once.
    assert run(*FINETUNE, *two, "run_dir=whole", "finetune.agent_steps=190")
    whole, extended = (
        state_of(tmp_path / f"{name}/finetune/last.ckpt") for name in ("whole", "run")
    )
    assert (whole.pop("epoch"), extended.pop("epoch")) == (1, 2)  # Lightning counts its ends
    assert list(differences(whole, extended)) == []
    for rank in ("rank0", "rank1"):
        expected = experience(tmp_path / "whole/replay" / rank)
        assert experience(tmp_path / "run/replay" / rank) == expected
    one = ["resume=run", "finetune.agent_steps=300", "trainer.devices=1", "trainer.strategy=auto"]
    assert "experience of 2 processes" in train(tmp_path, *one, code=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(folder, *FINETUNE, "run_dir=run", "callbacks.checkpoint_every=4")
    # The last of six updates is saved too, whatever the rhythm of the checkpoints.
    assert read_checkpoint(folder / "run/finetune/last.ckpt")["global_step"] == 6
    return folder


def test_a_checkpoint_is_played_without_its_settings_at_hand(trained: Path, tmp_path: Path) -> None:
    checkpoint = f"checkpoint={trained}/run/finetune/last.ckpt"
    words = ["stage=evaluate", checkpoint, "evaluate.episodes=4", "evaluate.videos=2"]
    said = train(tmp_path, *words, "tracking.enabled=true", "run_dir=played")
    assert "toy/disc after 260 frames, 4 episodes from reset seeds 1000..1003" in said
    tree = json.loads((tmp_path / "played/evaluation.json").read_text())
    assert (tree["method"], tree["env_frames"]) == ("mapo", 260)
    assert [e["seed"] for e in tree["policies"]["agent"]["episodes"]] == [1000, 1001, 1002, 1003]
    films = sorted(path.name for path in (tmp_path / "played/videos").iterdir())
    assert films == ["seed_1000.mp4", "seed_1001.mp4"]
    db = sqlite3.connect(tmp_path / "runs/mlflow.db")
    metrics = dict(db.execute("select key, value from metrics"))
    figures = tree["policies"]["agent"]
    for name in ("return", "return_se", "return_iqm", "return_iqm_low", "success"):
        assert metrics[f"eval/{name}"] == pytest.approx(figures[name])
    assert metrics["eval/return_random"] == pytest.approx(tree["policies"]["random"]["return"])
    artifacts = [p.as_posix() for p in (tmp_path / "runs/artifacts").rglob("*.mp4")]
    assert any("videos/seed_1001" in path for path in artifacts)


def test_resuming_twice_from_one_checkpoint_gives_the_same_weights(
    trained: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):  # a run may be moved as a whole
        shutil.copytree(trained / "run", tmp_path / name)
        train(tmp_path, f"resume={name}", "finetune.agent_steps=150")
    first, second = (
        read_checkpoint(tmp_path / name / "finetune/last.ckpt") for name in ("one", "two")
    )
    assert first["global_step"] == second["global_step"] == 10
    for key, tensor in first["state_dict"].items():
        assert torch.equal(tensor, second["state_dict"][key]), key


@pytest.mark.slow
@pytest.mark.parametrize("earlier", [False, True], ids=["none kept", "one kept"])
def test_the_last_evaluation_is_made_up_for(
    earlier: bool, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal breaks it off, when no update is left that a resumed run would begin with."""
    words = [*FINETUNE, "evaluate.keep_best=true", "evaluate.episodes=2", "evaluate.num_envs=1"]
    words += [f"evaluate.every={5 if earlier else 500}", "finetune.initial_updates=2"]
    words += ["finetune.train_every=10", "finetune.prefill=60", "finetune.agent_steps=120"]
    play, calls = EpisodePlayer.__call__, [3 + earlier]  # the baselines, and an agent before it

    def broken_off(self: EpisodePlayer, *args: Any) -> Any:
        calls[0] -= 1
        if calls[0] == -1:
            os.kill(os.getpid(), signal.SIGTERM)  # a background job may ignore SIGINT
        return play(self, *args)

    def kept(run: str) -> tuple[int, float]:
        found = read_checkpoint(in_tmp / run / "finetune/best.ckpt")
        return found["global_step"], found["callbacks"]["EvaluatePolicy"]["best_return"]

    assert main([*words, "run_dir=whole"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(EpisodePlayer, "__call__", broken_off)
        assert main([*words, "run_dir=run"]) == 143
    assert (in_tmp / "run/finetune/best.ckpt").is_file() == earlier
    assert main(["resume=run"]) == 0
    assert kept("run") == kept("whole")
    files = [in_tmp / run / "evaluation.json" for run in ("run", "whole")]
    mended, whole = (json.loads(file.read_text()) for file in files)
    assert mended["policies"] == whole["policies"]
    assert mended["env_frames"] == whole["env_frames"]
