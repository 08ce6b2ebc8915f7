"""The published protocol: one variant per cell of the two tables and per curve of the figure.

At the published sizes every model is built on the ``meta`` device, which holds shapes and no
numbers. The updates are real, by Lightning's Trainer, on synthetic experience: at ``size=tiny``,
once per pair of method and suite, because experiments of such a pair differ in the names of
their videos and of their task only (the first test holds that).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from networks import TOKEN_METHODS, image
from torch.utils.data import DataLoader, IterableDataset

from callbacks.codebook import CodebookUpdate
from mapo_lightning.config.compose import compose
from mapo_lightning.run.build import build_finetune, build_pretrain
from mapo_lightning.run.config import RunConfig
from mapo_lightning.semantics.factory import semantic_dim
from mapo_lightning.types import Batch, ConfigError

pytestmark = pytest.mark.slow

CONF = Path(__file__).parents[2] / "conf"
FOLDER = CONF / "experiment"
VARIANTS = {
    table: yaml.safe_load((FOLDER / f"{table}.yaml").read_text())["variants"]
    for table in ("table1", "table2", "figure2")
}
NAMES = sorted(f"{table}/{cell}" for table, rows in VARIANTS.items() for cell in rows)
# What the hub's configuration of the model would tell; and LPIPS needs a file that is not here.
WIDTH = ["vlm.hidden_dim=3584", "token_world.lpips=false"]
TOKENS = [name for name in NAMES if name.endswith("ivideogpt")]
DMC = ["cheetah_run", "walker_run", "hopper_hop", "quadruped_run"]
METAWORLD = ["door_open", "drawer_close", "lever_pull", "dial_turn"]
FIGURE = ["mapo", "contextwm", "prelar", "apv", "dreamerv2", "ivideogpt"]
ACTIONS = {"cheetah_run": 6, "walker_run": 6, "hopper_hop": 4, "quadruped_run": 12}


def cells() -> Iterator[tuple[str, str, str, str]]:
    """(file, task, method, videos) of everything the paper shows."""
    for task in DMC:
        yield f"table1/{task}_with_cvq", task, "mapo", "human36m"
        yield f"table1/{task}_without_cvq", task, "mapo_no_cvq", "human36m"
    for task in ("cheetah_run", "quadruped_run", "dial_turn", "door_open"):
        for method in ("mapo", "contextwm"):
            for videos in ("ssv2", "human36m"):
                yield f"table2/{task}_{method}_{videos}", task, method, videos
    for task in DMC + METAWORLD:
        for method in FIGURE:
            videos = "human36m" if task in DMC else "ssv2"
            yield f"figure2/{task}_{method}", task, method, videos


def configured(*words: str) -> RunConfig:
    return compose([*words, *WIDTH], RunConfig, CONF).config


def test_there_is_one_variant_per_cell_and_curve_and_it_pins_what_it_should() -> None:
    assert sorted(name for name, *_ in cells()) == NAMES
    for name, task, method, videos in cells():
        suite, task = ("dmc", task) if task in DMC else ("metaworld", task.replace("_", "-"))
        groups = compose([f"experiment={name}", *WIDTH], RunConfig, CONF).groups
        wanted = {"protocol": "paper", "data": videos, "env": f"{suite}/{task}", "method": method}
        if method.startswith("mapo"):
            wanted["vlm"] = "qwen2_5_vl_7b"
        assert {group: groups[group] for group in wanted} == wanted


def test_published_numbers_beside_the_cells_are_those_of_the_tables() -> None:
    page = (CONF.parent / "docs" / "reproduce.md").read_text()
    for name in NAMES:
        table, _, cell = name.partition("/")
        if table == "figure2":
            assert f"`figure2/{cell.rpartition('_')[0]}_*`" in page
            continue
        found = re.search(r"(\d+\.\d) published", VARIANTS[table][cell]["doc"])
        assert found, name
        row = next(x for x in page.splitlines() if f"`{name}`" in x)
        assert f"| {found[1]} |" in row


@pytest.mark.parametrize("name", TOKENS)
def test_ivideogpt_has_its_own_protocol_and_the_budget_of_the_others(name: str) -> None:
    """Facts 7.5, 7.6: no settings for these tasks were ever published."""
    cfg = configured(f"experiment={name}", "data.root=videos")
    other = configured(f"experiment={name.replace('ivideogpt', 'mapo')}", "data.root=videos")
    tuned, agent, world = cfg.finetune, cfg.agent.mbpo, cfg.token_world
    assert (cfg.env, tuned.agent_steps, tuned.prefill, cfg.evaluate.episodes) == (
        other.env, other.finetune.agent_steps, other.finetune.prefill, other.evaluate.episodes,
    )  # fmt: skip
    phases = [cfg.phase(phase) for phase in cfg.pretraining]
    assert [(p.updates, p.batch_size, p.lr, p.warmup, p.schedule) for p in phases] == [
        (500_000, 16, 5e-4, 500, "constant"), (1_000_000, 16, 1e-4, 5000, "cosine"),
    ]  # fmt: skip
    assert [(p.optimizer.weight_decay, p.optimizer.max_grad_norm) for p in phases] == [
        (0.0, 1.0), (0.01, 0.0),
    ]  # fmt: skip
    assert (cfg.data.clip_length, world.pretrain_frames, world.error) == (16, 6, "absolute")
    assert (tuned.chunk_length, world.tokenizer_frames, world.tokenizer_every) == (12, 5, 4)
    assert (tuned.initial_updates, agent.hold, tuned.train_every) == (1000, 1000, 5)
    assert (world.clips, tuned.lr_model, tuned.lr_lower) == (16, 1e-4, 1e-4)
    assert (agent.updates, agent.batch, agent.n_step, agent.discount) == (10, 256, 3, 0.99)
    assert (agent.dreams, agent.horizon, agent.dream_every, agent.first_rounds) == (32, 10, 20, 20)
    assert (agent.noise_start, agent.noise_end, agent.noise_steps) == (1.0, 0.1, 100_000)


@pytest.mark.parametrize("name", sorted({*NAMES} - {*TOKENS}))
def test_every_experiment_has_the_published_protocol(name: str) -> None:
    """Facts 5, 6.1: budgets, batches, evaluation."""
    cfg = configured(f"experiment={name}", "data.root=videos")
    dmc = cfg.env.kind == "dmc"
    assert cfg.data.kind in ("ssv2", "human36m")
    assert (cfg.pretrain.updates, cfg.pretrain.batch_size, cfg.data.clip_length) == (
        600_000,
        16,
        25,
    )
    assert cfg.finetune.updates(1) == (100_300 if dmc else 50_300)
    assert (cfg.finetune.batch_size, cfg.finetune.chunk_length) == (16 if dmc else 50, 50)
    assert (cfg.evaluate.episodes, cfg.evaluate.every * cfg.finetune.train_every) == (10, 10_000)
    assert cfg.env.frames_per_step == (2 if dmc else 1)
    assert cfg.env.render_quality == "full"
    assert (cfg.data.official_split, cfg.data.holdout) == (False, 0.0)  # all 839, all 193,690
    tuned, agent = cfg.finetune, cfg.agent
    assert (tuned.prefill, tuned.initial_updates) == (1000 if dmc else 5000, 100)
    rates = (cfg.pretrain.lr, tuned.lr_model, tuned.lr_lower, tuned.lr_actor, tuned.lr_critic)
    assert rates == (3e-4, 3e-4, 3e-4, 8e-5, 8e-5)
    assert (agent.horizon, agent.discount, agent.lam) == (15, 0.99, 0.95)
    assert (agent.entropy, agent.target_every) == (1e-4, 100)
    assert tuned.objective.free_nats == (1.0 if dmc else 0.0)
    assert cfg.pretrain.objective.kl == tuned.objective.kl == 1.0
    assert cfg.replay.prioritize_ends != dmc
    erase = cfg.world_model.context.erase
    assert erase == (0.0 if dmc else 0.5)


def architectures() -> dict[str, str]:
    """One experiment of each model: all that it is built from decides, videos and names do not."""
    found: dict[str, str] = {}
    for name, task, *_ in cells():
        cfg = configured(f"experiment={name}", "data.root=videos")
        objectives = (cfg.pretrain.objective, cfg.finetune.objective)
        world = cfg.token_world if cfg.tokens else cfg.world_model
        parts = (world, cfg.agent, objectives, cfg.vlm.kind, ACTIONS.get(task, 4))
        found.setdefault(repr(parts), name)
    return {name: name.split("/")[1] for name in found.values()}


def test_every_architecture_of_the_experiments_builds_at_the_published_size() -> None:
    built = architectures()
    assert len(PAIRS) <= len(built) < len(NAMES)
    for name, cell in built.items():
        cfg = configured(f"experiment={name}", "data.root=videos")
        with torch.device("meta"):
            width = ACTIONS.get("_".join(cell.split("_")[:2]), 4)
            module, _ = build_finetune(cfg, width, None)
            for phase in cfg.pretraining:
                build_pretrain(cfg, phase)
        assert module.world_model.feat_dim == (3 * 3 * 64**2 if cfg.tokens else 2048), name


class Synthetic(IterableDataset[Batch]):
    """Random experience without end, with every key of ``mapo_lightning.types``."""

    def __init__(self, cfg: RunConfig, action_dim: int) -> None:
        self.width, self.action_dim = semantic_dim(cfg.vlm), action_dim
        self.side = cfg.env.size

    def __iter__(self) -> Iterator[Batch]:
        shape = (2, 6)
        first = torch.zeros(shape, dtype=torch.bool)
        first[:, 0] = True
        while True:
            yield {
                "obs": torch.randint(0, 256, (*shape, self.side, self.side, 3), dtype=torch.uint8),
                "semantic": torch.randn(*shape, self.width),
                "has_semantic": torch.rand(shape) < 0.7,
                "position": torch.arange(6).expand(shape),
                "is_first": first,
                "action": torch.rand(*shape, self.action_dim) * 2 - 1,
                "reward": torch.rand(shape),
                "is_terminal": torch.zeros(shape, dtype=torch.bool),
            }


def two_updates(module: L.LightningModule, cfg: RunConfig) -> None:
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    hooks: list[L.Callback] = [CodebookUpdate()] if cfg.callbacks.codebook else []
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=hooks,
    )
    trainer.fit(module, DataLoader(Synthetic(cfg, 4), batch_size=None))
    assert trainer.global_step == 2
    after = dict(module.named_parameters())
    assert all(bool(torch.isfinite(p).all()) for p in after.values())
    moved = {name.split(".")[1] for name, p in before.items() if not torch.equal(p, after[name])}
    assert moved & {"decoder", "tokenizer", "predictor"}


PAIRS = {(m, "dmc" if t in DMC else "metaworld"): n for n, t, m, _ in cells()}


@pytest.mark.parametrize(("method", "suite"), PAIRS)
def test_every_method_of_the_experiments_takes_two_updates(method: str, suite: str) -> None:
    torch.manual_seed(0)
    networks = "tiny" if method in TOKEN_METHODS else "published"
    words = ["data=folder", "size=tiny", "trainer=cpu", image(networks, method)]
    cfg = configured(f"experiment={PAIRS[method, suite]}", *words, "world_model.bonus.neighbours=4")
    module, _ = build_finetune(cfg, 4, None)
    two_updates(module, cfg)
    for phase in cfg.pretraining if suite == "dmc" else ():  # videos know no suite
        two_updates(build_pretrain(cfg, phase), cfg)


def test_variants_choose_files_and_an_overruled_choice_need_not_exist(tmp_path: Path) -> None:
    for name, text in {
        "config.yaml": "defaults: {data: mine, experiment: null}\n",
        "data/mine.yaml": "# mine\ndata: {kind: folder}\n",
        "experiment/cells.yaml": (
            "# cells\nvariants:\n  one: {doc: first, defaults: {data: elsewhere}, seed: 3}\n"
        ),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    run = compose(["experiment=cells/one", "data=mine"], RunConfig, tmp_path)
    assert (run.config.seed, run.groups["data"]) == (3, "mine")
    with pytest.raises(ConfigError, match="there is no 'data=elsewhere'"):
        compose(["experiment=cells/one"], RunConfig, tmp_path)
    with pytest.raises(ConfigError, match="cells/one"):
        compose(["experiment=cells/won"], RunConfig, tmp_path)
    assert "first" in (compose(["--help", "experiment"], RunConfig, tmp_path).text or "")
