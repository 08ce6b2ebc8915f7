"""A trained agent outside the trainer: the evaluation's returns, and clear refusals."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import save_bert

import mapo_lightning
from mapo_lightning.config.compose import compose
from mapo_lightning.envs.factory import make_env
from mapo_lightning.ownership import sign
from mapo_lightning.run import build
from mapo_lightning.run.agent import ObservationError
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.episode_player import EpisodePlayer
from mapo_lightning.run.from_checkpoint import configure
from mapo_lightning.training.acting import ActingPolicy, greedy
from mapo_lightning.training.checkpoint import write_checkpoint
from mapo_lightning.types import CheckpointError, ConfigError

CONF = Path(__file__).parents[2] / "conf"
SMALL = ["env=toy", "world_model.image.channels=[4]", "evaluate.num_envs=1"]
SIDE = compose(SMALL, RunConfig, CONF).config.env.size
PLAN = ("agent.plan.kind=cem", "agent.plan.population=8", "agent.plan.elites=2")
PLAN += ("agent.plan.proposals=2", "agent.plan.horizon=3", "agent.plan.iterations=2")


def save(path: Path, *words: str) -> RunConfig:
    """A checkpoint as fine-tuning writes it, of an agent that has learned nothing."""
    composed = compose([*SMALL, f"work_dir={path.parent}/work", *words], RunConfig, CONF)
    torch.manual_seed(4)
    module, _ = build.build_finetune(composed.config, 2, None)
    card = {"stage": "finetune", "method": composed.config.method, "action_dim": 2}
    text = composed.redacted_yaml
    card |= {"env_frames": 120, "config": text, "config_signature": sign(text)}
    write_checkpoint({"state_dict": module.state_dict(), "mapo": card, "global_step": 7}, path)
    return composed.config


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("agent") / "last.ckpt"
    save(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [(), PLAN, ("vlm.collect.size=96",), ("method=apv",), ("method=dreamerv2",)], ids=str
)
def test_an_episode_goes_as_in_evaluation(words: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    cfg = save(path, *words, "evaluate.episodes=2")
    module, _ = build.load_finetuned(cfg, path)
    with EpisodePlayer(cfg) as play:
        episodes, _ = play(greedy(module), 0)
    env = make_env(build.labelled_env(cfg), seed=0)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    with mapo_lightning.load_agent(path) as agent:
        for seed, expected in zip(cfg.evaluate.seeds, episodes, strict=True):
            agent.reset(seed)
            obs, _ = env.reset(seed=seed)
            total, steps, ended = 0.0, 0, False
            while not ended:
                action = agent.act(obs["image"], obs.get("label_image"))
                assert action.shape == (2,)
                assert action.dtype == np.float32
                assert np.abs(action).max() <= 1.0
                obs, reward, terminated, truncated, _ = env.step(action)
                total, steps, ended = total + float(reward), steps + 1, terminated or truncated
            assert (total, steps) == (pytest.approx(expected.score), expected.agent_steps)
    assert torch.equal(before, torch.get_rng_state())  # the program's own numbers are untouched


@pytest.mark.slow
def test_phrases_change_what_it_does(saved: Path) -> None:
    frames = np.stack([np.full((SIDE, SIDE, 3), 20, np.uint8)] * 12)
    for time, frame in enumerate(frames):  # a disc that moves to the right
        left = time * SIDE // 16
        frame[SIDE // 4 : SIDE * 5 // 8, left : left + SIDE // 4] = 220

    def actions(describe: bool) -> list[list[float]]:
        agent = mapo_lightning.load_agent(saved, describe=describe)
        return [agent.act(frame).tolist() for frame in frames]

    told, untold = actions(True), actions(False)
    assert told[:3] == untold[:3]  # the first window ends with the fourth frame
    assert told[3:] != untold[3:]
    assert told == actions(True)


def test_words_make_a_kept_agent_plan(saved: Path) -> None:
    frame = np.zeros((SIDE, SIDE, 3), np.uint8)
    acts = {}
    for words in ((), PLAN, (*PLAN, "agent.plan.where=acting")):
        with mapo_lightning.load_agent(saved, words=words) as agent:
            acts[words] = [agent.act(frame).tolist() for _ in range(2)]
    assert acts[()] == acts[*PLAN, "agent.plan.where=acting"]  # it plans while collecting only
    assert acts[()][0] != acts[PLAN][0]
    words = [f"checkpoint={saved}", "stage=evaluate", *PLAN, "env=toy"]
    cfg = configure(words, CONF).config
    module, _ = build.load_finetuned(cfg, saved)
    policy = greedy(module)(1000)
    assert isinstance(policy, ActingPolicy)
    assert policy.planner is not None
    assert policy.planner.cfg.population == 8
    assert policy.planner.discount == cfg.agent.discount
    assert cfg.about["plan"] == "cem"


def test_environments_side_by_side_begin_when_they_say_so(saved: Path) -> None:
    agent = mapo_lightning.load_agent(saved)
    frames = np.random.default_rng(0).integers(0, 255, (3, SIDE, SIDE, 3), np.uint8)
    assert agent.act(frames).shape == (3, 2)
    assert agent.act(frames, is_first=np.array([False, True, False])).shape == (3, 2)
    with pytest.raises(ObservationError, match=r"2 environments after 3; call reset\(\)"):
        agent.act(frames[:2])
    with pytest.raises(ObservationError, match=r"is_first must be \(3,\)"):
        agent.act(frames, is_first=np.array([True]))
    agent.reset()
    assert agent.act(frames[:2]).shape == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("obs", "sentence"),
    [
        (np.zeros((SIDE, SIDE, 3), np.float32), "uint8 in .0, 255., got float32"),
        ([[0]], "a numpy array of uint8"),
        (
            np.zeros((3, SIDE, SIDE), np.uint8),
            rf"\({SIDE}, {SIDE}, 3\) or \(N, {SIDE}, {SIDE}, 3\), got \(3, {SIDE}, {SIDE}\)",
        ),
        (np.zeros((84, 84, 3), np.uint8), r"got \(84, 84, 3\)"),
        (np.zeros((SIDE, SIDE), np.uint8), rf"got \({SIDE}, {SIDE}\)"),
        (np.zeros((0, SIDE, SIDE, 3), np.uint8), rf"got \(0, {SIDE}, {SIDE}, 3\)"),
    ],
)
def test_other_observations_are_refused(obs: object, sentence: str, saved: Path) -> None:
    agent = mapo_lightning.load_agent(saved)
    with pytest.raises(ObservationError, match=sentence):
        agent.act(obs)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_describers_frames_are_asked_for(tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt", "vlm.collect.size=96")
    agent = mapo_lightning.load_agent(tmp_path / "a.ckpt")
    frame = np.zeros((SIDE, SIDE, 3), np.uint8)
    with pytest.raises(ObservationError, match="shown frames of 96 pixels: give them as label_obs"):
        agent.act(frame)
    silent = mapo_lightning.load_agent(tmp_path / "a.ckpt", describe=False)
    assert silent.act(frame).shape == (2,)


@pytest.mark.slow
def test_without_a_describer_its_encoder_is_not_needed(tmp_path: Path) -> None:
    encoder = save_bert(tmp_path / "bert")
    save(tmp_path / "a.ckpt", f"vlm.embed.encoder={encoder}")
    shutil.rmtree(encoder)
    for off in ({"describe": False}, {"words": ["vlm=none"]}):
        with mapo_lightning.load_agent(tmp_path / "a.ckpt", **off) as agent:
            assert agent.act(np.zeros((SIDE, SIDE, 3), np.uint8)).shape == (2,)


def test_what_holds_no_agent_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        mapo_lightning.load_agent(tmp_path / "nothing.ckpt")
    text = tmp_path / "notes.txt"
    text.write_text("these are no weights")
    with pytest.raises(CheckpointError, match=r"notes.txt' is (damaged|refused)"):
        mapo_lightning.load_agent(text)
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(saved.read_bytes()[: saved.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"cut.ckpt' is damaged"):
        mapo_lightning.load_agent(cut)
    card = {"stage": "pretrain", "method": "mapo", "config": "seed: 1\n"}
    write_checkpoint({"state_dict": {}, "mapo": card}, tmp_path / "pre.ckpt")
    with pytest.raises(CheckpointError, match="is a pre-training checkpoint and holds no agent"):
        mapo_lightning.load_agent(tmp_path / "pre.ckpt")
    write_checkpoint({"state_dict": {}, "mapo": card | {"config": ""}}, tmp_path / "bare.ckpt")
    with pytest.raises(CheckpointError, match="does not hold the settings it was made with"):
        mapo_lightning.load_agent(tmp_path / "bare.ckpt")
    with pytest.raises(ConfigError, match="device='cuda:7' cannot be used"):
        mapo_lightning.load_agent(saved, device="cuda:7")


def test_importing_the_package_stays_light() -> None:
    code = "import mapo_lightning, sys; assert 'torch' not in sys.modules; mapo_lightning.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "AttributeError: module 'mapo_lightning' has no attribute 'nothing'" in done.stderr
