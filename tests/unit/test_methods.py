"""The method table: every method as a configuration of the same parts (docs/methods.md)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from networks import NETWORKS, RSSM_METHODS, TOKEN_METHODS, backbone, image

from mapo_lightning.config.compose import compose, load_yaml
from mapo_lightning.config.groups import Groups
from mapo_lightning.models.token_world.world_model import TokenWorldModel
from mapo_lightning.run.build import build_finetune, build_pretrain
from mapo_lightning.run.config import RunConfig
from mapo_lightning.semantics.factory import semantic_dim
from mapo_lightning.types import Batch, ConfigError

CONF = Path(__file__).parents[2] / "conf"
ENVS = ["toy", "dmc/walker_run", "metaworld/door-open"]
SMALL = ["world_model.bonus.neighbours=4"]


def configured(*words: str) -> RunConfig:
    return compose(words, RunConfig, CONF).config


def small(method: str, networks: str, *words: str) -> RunConfig:
    """A method with few channels; ``networks`` as in `networks.image`."""
    return configured(f"method={method}", image(networks, method), *SMALL, *words)


def synthetic(cfg: RunConfig, action_dim: int, batch: int = 2, steps: int = 7) -> Batch:
    """Random experience with every key of ``mapo_lightning.types``."""
    shape, side = (batch, steps), cfg.env.size
    first = torch.zeros(shape, dtype=torch.bool)
    first[:, 0] = True
    return {
        "obs": torch.randint(0, 256, (*shape, side, side, 3), dtype=torch.uint8),
        "semantic": torch.randn(*shape, semantic_dim(cfg.vlm)),
        "has_semantic": torch.rand(shape) < 0.7,
        "position": torch.arange(steps).expand(shape),
        "is_first": first,
        "action": torch.rand(*shape, action_dim) * 2 - 1,
        "reward": torch.rand(shape),
        "is_terminal": torch.zeros(shape, dtype=torch.bool),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("networks", "kind"), [*((name, "gru") for name in NETWORKS), ("tiny", "transformer")]
)
@pytest.mark.parametrize("method", RSSM_METHODS)
@pytest.mark.parametrize("env", ENVS)
def test_fine_tuning_loss_reaches_every_part_it_should(
    method: str, env: str, networks: str, kind: str
) -> None:
    torch.manual_seed(0)
    cfg = small(method, networks, *backbone(kind, method), f"env={env}")
    module, _ = build_finetune(cfg, 4, None)
    total, _ = module.losses(synthetic(cfg, 4))
    assert torch.isfinite(total)
    total.backward()
    silent = [
        name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    assert silent == []
    moved = {
        name.split(".")[1]
        for name, p in module.named_parameters()
        if p.grad is not None and float(p.grad.abs().max()) > 0
    }
    parts = {n for n, part in module.world_model.parts().items() if list(part.parameters())}
    assert parts | {"actor", "critic"} == moved


@pytest.mark.slow
@pytest.mark.parametrize(
    ("networks", "kind"), [*((name, "gru") for name in NETWORKS), ("tiny", "transformer")]
)
@pytest.mark.parametrize("method", [m for m in RSSM_METHODS if m != "dreamerv2"])
def test_pre_training_loss_reaches_every_part(method: str, networks: str, kind: str) -> None:
    torch.manual_seed(0)
    cfg = small(method, networks, *backbone(kind, method))
    module = build_pretrain(cfg)
    batch = synthetic(cfg, 4)
    for key in ("action", "reward", "is_terminal"):
        del batch[key]
    fit = module.world_model.loss(batch)
    fit.total.backward()
    assert torch.isfinite(fit.total)
    assert [n for n, p in module.named_parameters() if p.grad is None] == []
    assert "reward" not in fit.log


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_every_phase_of_a_token_method_reaches_its_parts(method: str) -> None:
    torch.manual_seed(0)
    cfg = configured(f"method={method}", "env=toy")
    batch = synthetic(cfg, 2, steps=9)
    for key in ("action", "reward", "is_terminal"):
        del batch[key]
    for phase, expected in (("tokenizer", {"tokenizer"}), ("pretrain", {"predictor"})):
        module = build_pretrain(cfg, phase)
        module.losses(batch)[0].backward()
        moved = {n.split(".")[1] for n, p in module.named_parameters() if p.grad is not None}
        assert moved == expected
        assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
    module, _ = build_finetune(cfg, 2, None)
    assert isinstance(module.world_model, TokenWorldModel)
    said = module.world_model.cfg
    published = [said.late_reward, said.blind_policy, said.dream_dropout, said.codes_in_clip]
    assert published == [method == "ivideogpt"] * 4
    assert said.phrases == ("semantic" in method)
    module.losses(synthetic(cfg, 2, steps=12))[0].backward()
    found = {n for n, part in module.world_model.parts().items() if _moved(part)}
    assert found == {"tokenizer", "transformer", "control", *["phrases"] * said.phrases}


@pytest.mark.parametrize("method", ["mapo", "ivideogpt_semantic"])
def test_swapped_phrases_are_those_of_another_clip(method: str) -> None:
    cfg = small(method, "tiny")
    torch.manual_seed(0)
    module, batch = build_pretrain(cfg), synthetic(cfg, 0)
    told = batch | {key: batch[key].flip(0) for key in ("semantic", "has_semantic")}
    assert not torch.equal(told["semantic"], batch["semantic"])

    def loss(given: Batch, swap: bool) -> float:
        module.cfg.swap_phrases = swap
        torch.manual_seed(1)
        return float(module.losses(given)[0].detach())

    assert loss(batch, swap=True) == loss(told, swap=False) != loss(batch, swap=False)
    section = cfg.section("pretrain")
    words = [f"method={method}", f"{section}.swap_phrases=true", f"{section}.batch_size=1"]
    with pytest.raises(ConfigError, match="swap_phrases needs a batch_size of two clips"):
        configured(*words)


def _moved(part: torch.nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in part.parameters())


def test_the_published_sizes_of_ivideogpt() -> None:
    with torch.device("meta"):
        cfg = configured("method=ivideogpt_fixed", "size=paper", "env=dmc/walker_run",
                         "token_world.lpips=false")  # fmt: skip
        module, _ = build_finetune(cfg, 4, None)
    parts = module.world_model.parts()
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert counts == {"tokenizer": 114_159_174, "transformer": 138_434_304, "control": 3840 + 769}
    assert module.world_model.predictor.layout.length(10) == 683
    groups = {g["name"]: g["lr"] for g in module.configure_optimizers().param_groups}
    assert groups == {"lower": 1e-4, "model": 1e-4}
    assert (module.agent.cfg.updates, cfg.finetune.train_every) == (10, 5)


def test_the_actor_loss_leaves_world_model_and_critics_alone() -> None:
    torch.manual_seed(0)
    cfg = small("mapo", "tiny", "env=toy")
    module, _ = build_finetune(cfg, 2, None)
    batch = synthetic(cfg, 2)
    fit = module.world_model.loss(batch)
    module.agent.losses(module.world_model, fit, batch).losses["actor"].backward()
    touched = {n.split(".")[1] for n, p in module.named_parameters() if p.grad is not None}
    assert touched == {"actor"}


@pytest.mark.slow
@pytest.mark.parametrize("networks", NETWORKS)
@pytest.mark.parametrize("method", RSSM_METHODS)
def test_dreams_have_the_shape_of_the_truth(method: str, networks: str) -> None:
    cfg = small(method, networks, "env=toy")
    module, _ = build_finetune(cfg, 2, None)
    frames = module.world_model.eval().open_loop(synthetic(cfg, 2), seen=3)
    assert frames.shape == (2, 7, cfg.env.size, cfg.env.size, 3)
    assert 0.0 <= float(frames.min()) <= float(frames.max()) <= 1.0


@pytest.mark.slow
def test_the_published_sizes_in_both_stages() -> None:
    """Every part has as many parameters as the published one (facts 2.1 and 3)."""
    cfg = configured("method=mapo", "size=paper", "env=dmc/walker_run")
    module, _ = build_finetune(cfg, 6, None)
    counts = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in module.world_model.parts().items()
    }
    assert counts["encoder"] == counts["context"] == 1_562_112
    assert counts["lower"] == 14_759_936
    assert counts["upper"] == 16_842_752
    assert counts["decoder"] == 7_779_003
    assert counts["heads"] == 2 * 1_301_201


SHIPPED = Groups(CONF, load_yaml)
CHOICES = [(g, n) for g in SHIPPED.files if g != "experiment" for n in SHIPPED.names(g)]


@pytest.mark.slow
@pytest.mark.parametrize(("group", "name"), CHOICES, ids=[f"{g}={n}" for g, n in CHOICES])
def test_every_choice_composes_and_says_what_it_is(group: str, name: str) -> None:
    words = [f"{group}={name}"]
    if words == ["vlm=openai_server"]:
        words.append("vlm.server.base_url=http://127.0.0.1:8000/v1")
    if words == ["agent=mbpo"]:
        words.append("method=ivideogpt")
    cfg = configured(*words)
    assert cfg.finetune.updates(1) > 0
    file, _, variant = name.partition("/")
    assert SHIPPED.file(group, file).doc
    if variant:
        assert SHIPPED.file(group, file).variants[variant].doc


@pytest.mark.slow
def test_the_ablations_of_the_method_page_compose() -> None:
    page = (CONF.parent / "docs" / "methods.md").read_text()
    spans = [span for span in re.findall(r"`([^`\n]+)`", page) if re.match(r"\S+=\S", span)]
    lines = [span.split() for span in spans if not span.endswith(("=", "*"))]
    assert len(lines) >= 15
    for words in lines:
        configured(*(word for word in words if not word.startswith("init_from=")))
