"""First losses of every method with an RSSM at a fixed seed: a refactoring must not move them.

A change that is meant to move them regenerates the file and says so in the CHANGELOG:
``python tests/golden/test_golden.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from networks import RSSM_METHODS

from mapo_lightning.config.compose import compose
from mapo_lightning.run.build import build_finetune
from mapo_lightning.run.config import RunConfig
from mapo_lightning.semantics.factory import semantic_dim

CONF = Path(__file__).parents[2] / "conf"
FILE = Path(__file__).with_name("losses.json")
# The published networks at a size that a test can afford, and those of size=tiny.
NETWORKS = {
    "published": ["world_model.image={size: 64, channels: [12, 24, 48], layers: 1}"],
    "tiny": [],
}


def losses(method: str, networks: str) -> dict[str, float]:
    """Loss terms of the first two updates on the same synthetic experience."""
    torch.set_num_threads(1)  # sums in another order may draw another one-hot
    words = [f"method={method}", "env=dmc/walker_run", *NETWORKS[networks]]
    if networks == "published" and method != "dreamerv2":
        words.append("world_model.image.kind=resnet")
    cfg = compose(words, RunConfig, CONF).config
    side = cfg.env.size
    torch.manual_seed(0)
    module, _ = build_finetune(cfg, 3, None)
    shape = (2, 8)
    first = torch.zeros(shape, dtype=torch.bool)
    first[:, 0] = True
    batch = {
        "obs": torch.randint(0, 256, (*shape, side, side, 3), dtype=torch.uint8),
        "semantic": torch.randn(*shape, semantic_dim(cfg.vlm)),
        "has_semantic": torch.rand(shape) < 0.7,
        "position": torch.arange(8).expand(shape),
        "is_first": first,
        "action": torch.rand(*shape, 3) * 2 - 1,
        "reward": torch.rand(shape),
        "is_terminal": torch.zeros(shape, dtype=torch.bool),
    }
    optimizer = module.configure_optimizers()
    optimizer = optimizer["optimizer"] if isinstance(optimizer, dict) else optimizer
    found: dict[str, float] = {}
    for update in range(2):
        torch.manual_seed(update)
        fit = module.world_model.loss(batch)
        behaviour = module.agent.losses(module.world_model, fit, batch)
        optimizer.zero_grad()
        (fit.total + sum(behaviour.losses.values())).backward()
        optimizer.step()
        log = fit.log | {name: behaviour.log[name] for name in ("actor", "critic", "entropy")}
        found |= {f"{name}.{update}": float(value) for name, value in log.items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("networks", NETWORKS)
@pytest.mark.parametrize("method", RSSM_METHODS)
def test_first_losses_are_those_on_file(method: str, networks: str) -> None:
    expected = json.loads(FILE.read_text())[networks][method]
    # Not bit for bit: other processors round convolutions differently, and one-hot samples jump.
    assert losses(method, networks) == pytest.approx(expected, rel=2e-2, abs=2e-2)


if __name__ == "__main__":
    found = {n: {m: losses(m, n) for m in RSSM_METHODS} for n in NETWORKS}
    FILE.write_text(json.dumps(found, indent=1) + "\n")
