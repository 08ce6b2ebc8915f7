"""A checkpoint brings its settings along, words win over them, and what does not fit is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from test_agent import CONF, save

from mapo_lightning.config.compose import from_base
from mapo_lightning.config.schema import flatten, walk
from mapo_lightning.ownership import sign, signed
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.from_checkpoint import Resumed, agent_settings, configure, resumed
from mapo_lightning.run.main import main
from mapo_lightning.run.renamed import RENAMED
from mapo_lightning.training.checkpoint import newest_checkpoint, read_checkpoint, write_checkpoint
from mapo_lightning.training.metadata import signed_part
from mapo_lightning.types import CheckpointError, ConfigError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Folder of a run with a fine-tuning checkpoint, and the secret that only its file holds."""
    folder = tmp_path / "runs/one"
    save(
        folder / "finetune/last.ckpt", "method=contextwm", "stage=finetune", "seed=5",
        "trainer.devices=4", "trainer.threads=3", "trainer.capture=true",
        "run_dir=elsewhere", "init_from=gone.ckpt", "tracking.uri=http://me:secret@host:1",
    )  # fmt: skip
    return folder


def test_evaluation_takes_the_agent_from_the_checkpoint_and_the_rest_from_here(run: Path) -> None:
    words = ["stage=evaluate", f"checkpoint={run}/finetune/last.ckpt"]
    cfg = configure(words, CONF).config
    assert (cfg.stage, cfg.method, cfg.seed) == ("evaluate", "contextwm", 5)
    assert cfg.world_model.context.kind == "features"
    assert cfg.world_model.image.channels == [4]
    assert (cfg.env.kind, cfg.env.num_envs, cfg.finetune.chunk_length) == ("toy", 2, 16)
    assert (cfg.trainer.devices, cfg.trainer.capture, cfg.trainer.threads) == (1, False, 3)
    assert (cfg.run_dir, cfg.init_from, cfg.resume) == ("", None, None)
    assert cfg.tracking.uri == "sqlite:///runs/mlflow.db"  # the real one is hidden
    more = ["env.name=disc_anywhere", "evaluate.episodes=3", "trainer=debug"]
    other = configure([*words, *more], CONF).config
    assert (other.env.name, other.evaluate.episodes) == ("disc_anywhere", 3)
    assert not other.tracking.enabled
    assert configure(["env=toy"], CONF).config.method == "mapo"


@pytest.mark.slow
def test_resuming_takes_everything_from_the_runs_own_file(run: Path) -> None:
    checkpoint = run / "finetune/last.ckpt"
    card = read_checkpoint(checkpoint)["mapo"]
    (run / "config.yaml").write_text(signed(card["config"].replace("***", "me:secret")))
    for given in (run, checkpoint):
        cfg = configure([f"resume={given}", "finetune.agent_steps=9000"], CONF).config
        assert cfg.resume == str(checkpoint)
        assert (cfg.stage, cfg.method, cfg.trainer.devices) == ("finetune", "contextwm", 4)
        assert cfg.tracking.uri == "http://me:secret@host:1"
        assert (cfg.run_dir, cfg.finetune.agent_steps) == (str(run), 9000)
    found = resumed(cfg)
    assert (found.path, found.phase, found.updates) == (checkpoint, "finetune", 7)
    assert found.finished("finetune", 7)
    assert not found.finished("finetune", 8)
    assert not found.finished("pretrain", 1)


def test_a_lone_checkpoint_resumes_into_a_new_folder(run: Path) -> None:
    cfg = configure([f"resume={run}/finetune/last.ckpt"], CONF).config
    assert cfg.run_dir == ""
    assert cfg.trainer.devices == 4


OLD = Path(__file__).with_name(
    "settings_0_1_0.yaml"
)  # what 0.1.0 wrote: no default in a renamed key


def test_every_renamed_key_was_one_and_leads_to_one() -> None:
    old = dict(flatten(yaml.safe_load(OLD.read_text())))
    assert set(RENAMED.keys) <= set(old)
    assert {*RENAMED.keys.values(), *RENAMED.values} <= {leaf.key for leaf in walk(RunConfig)}


@pytest.mark.slow
@pytest.mark.parametrize("saved", ["in the checkpoint", "beside it"])
def test_settings_of_version_0_1_0_are_translated(run: Path, saved: str) -> None:
    checkpoint, old = run / "finetune/last.ckpt", dict(flatten(yaml.safe_load(OLD.read_text())))
    if saved == "beside it":
        (run / "config.yaml").write_text(signed(OLD.read_text()))
    content = read_checkpoint(checkpoint)
    content["mapo"] |= {"config": OLD.read_text(), "config_signature": sign(OLD.read_text())}
    write_checkpoint(content, checkpoint)
    for words in (["stage=evaluate", f"checkpoint={checkpoint}"], [f"resume={run}"]):
        flat = configure(words, CONF).flat
        assert {key: flat[new] for key, new in RENAMED.keys.items()} == {
            key: old[key] for key in RENAMED.keys
        }
        kept = {
            key for key in old if key.startswith(("world_model.", "agent.", "env.", "finetune."))
        }
        now = {key: successors[old[key]] for key, successors in RENAMED.values.items()}
        assert {key: flat[key] for key in kept} == {key: old[key] for key in kept} | now
    cfg = from_base(agent_settings(checkpoint), RunConfig)
    assert (cfg.vlm.window.frames, cfg.vlm.server.retries, cfg.vlm.collect.size) == (5, 2, 80)


def test_settings_of_version_0_1_0_are_refused_as_a_file_of_their_own() -> None:
    with pytest.raises(ConfigError) as caught:
        configure([f"config={OLD}"], CONF)
    for old, new in RENAMED.keys.items():
        assert f"{old} is now {new}" in str(caught.value)
    assert "world_model.image.recompute: false is now none" in str(caught.value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("vlm.marks=m.json", "vlm.marks is now vlm.reviews: write vlm.reviews=m.json"),
        (
            "world_model.image.recompute=true",
            "world_model.image.recompute=true is now world_model.image.recompute=all",
        ),
        ("vlm.window=4", "vlm.window is now vlm.window.frames: write vlm.window.frames=4"),
        ("env=dmc_walker_run", "'env=dmc_walker_run' is now 'env=dmc/walker_run'"),
        ("env=dmc/finger_spin", "Any other task is env=dmc env.name=finger_spin."),
        ("env=metaworld/door-opne", "Did you mean 'env=metaworld/door-open'?"),
    ],
)
def test_words_of_version_0_1_0_and_unknown_tasks_name_what_to_write(
    word: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        configure([word], CONF)
    assert message in str(caught.value)


def test_mlflow_runs_are_those_of_the_same_phase() -> None:
    found = Resumed(Path("x"), "pretrain", 3, {"mlflow_parent": "p", "mlflow_run": "c"})
    assert (found.tracked("parent"), found.tracked("pretrain")) == ("p", "c")
    assert found.tracked("finetune") is None
    assert Resumed().tracked("parent") is None
    untracked = Resumed(Path("x"), "pretrain", 3, {"mlflow_parent": "", "mlflow_run": ""})
    assert untracked.tracked("parent") is untracked.tracked("pretrain") is None


@pytest.mark.slow
def test_a_checkpoint_that_names_other_mlflow_runs_goes_on_with_none(run: Path) -> None:
    checkpoint = run / "finetune/last.ckpt"
    content = read_checkpoint(checkpoint)
    card = content["mapo"]
    card |= {"mlflow_parent": "a" * 32, "mlflow_run": "b" * 32}
    card["config_signature"] = sign(signed_part(card))
    write_checkpoint(content, checkpoint)
    cfg = configure([f"resume={run}"], CONF).config
    assert resumed(cfg).tracked("finetune") == "b" * 32
    card["mlflow_run"] = "c" * 32
    write_checkpoint(content, checkpoint)
    assert resumed(cfg).tracked("parent") is resumed(cfg).tracked("finetune") is None


@pytest.mark.slow
def test_another_stage_than_the_checkpoints_is_refused(run: Path) -> None:
    words = [f"resume={run}/finetune/last.ckpt", "stage=pretrain"]
    with pytest.raises(ConfigError, match="checkpoint of stage=finetune, which stage=pretrain"):
        resumed(configure(words, CONF).config)
    content = read_checkpoint(run / "finetune/last.ckpt")
    content["mapo"]["stage"] = "pretrain"
    write_checkpoint(content, run / "pretrain/last.ckpt")
    words = [f"resume={run}/pretrain/last.ckpt", "stage=finetune"]
    with pytest.raises(ConfigError, match="init_from= starts fine-tuning from it"):
        resumed(configure(words, CONF).config)
    assert resumed(configure([words[0], "stage=all"], CONF).config).phase == "pretrain"


def test_the_newest_whole_checkpoint_is_taken(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run / "finetune/last.ckpt"
    cut = run / "finetune/step=9.ckpt"
    cut.write_bytes(whole.read_bytes()[:5000])
    os.utime(cut, (2e9, 2e9))
    assert newest_checkpoint(run) == whole
    assert "step=9.ckpt' is damaged" in caplog.text
    with pytest.raises(CheckpointError, match="holds no checkpoint that can be read"):
        newest_checkpoint(tmp_path)


def test_a_failed_write_leaves_the_checkpoint_before_it(run: Path) -> None:
    path = run / "finetune/last.ckpt"
    before = path.read_bytes()
    path.with_name("last.ckpt.part").symlink_to("/dev/full")  # a disk without room
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*last.ckpt'"):
        write_checkpoint(read_checkpoint(path), path)
    assert path.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["stage=evaluate", "checkpoint=notes.ckpt"], "notes.ckpt' is"),
        (["stage=evaluate", "checkpoint=cut.ckpt"], "cut.ckpt' is damaged"),
        (["stage=evaluate", "checkpoint=pre.ckpt"], "a pre-training checkpoint"),
        (["stage=evaluate", "checkpoint=RUN/last.ckpt", "method=mapo"], "method=contextwm and"),
        (["stage=evaluate", "checkpoint=RUN/last.ckpt", "size=paper"], "leave out size= too"),
        (
            ["stage=evaluate", "checkpoint=RUN/last.ckpt", "world_model.upper.deter=8"],
            "leave out method=, size=",
        ),
        (["stage=evaluate", "checkpoint=RUN/last.ckpt", "trainer.accelerator=gpu"], "no GPU"),
        (["resume=nothing.ckpt"], "no checkpoint at 'nothing.ckpt'"),
        (["resume=empty"], "the folder 'empty' holds no checkpoint"),
        (["resume=RUN/last.ckpt", "stage=pretrain"], "is a checkpoint of stage=finetune"),
        (["resume=RUN/last.ckpt", "method=mapo"], "method=contextwm and"),
    ],
)
def test_what_cannot_be_played_or_resumed_gets_one_sentence(
    words: list[str],
    sentence: str,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = run / "finetune/last.ckpt"
    (run / "notes.ckpt").write_text("no weights in here")
    (run / "cut.ckpt").write_bytes(whole.read_bytes()[:9999])
    content = read_checkpoint(whole)
    del content["mapo"]["action_dim"]
    write_checkpoint(content, run / "pre.ckpt")
    (run / "empty").mkdir()
    monkeypatch.chdir(run)
    monkeypatch.setenv("MAPO_RUN_DIR", str(run / "new"))  # the program sets it
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    here = ["trainer.keep_memory=false", "trainer.devices=1", "tracking.enabled=false"]
    here += ["callbacks.progress=false", "evaluate.episodes=1", "trainer.threads=1"]
    here += ["trainer.capture=false"]
    said = [word.replace("RUN", str(run / "finetune")) for word in words]
    assert main([*said, *here]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if line.startswith("error: ")] == errors[-1:]
    assert sentence in errors[-1]
