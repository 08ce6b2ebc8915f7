"""First losses of every method at a fixed seed: a refactoring must not move them.

A change that is meant to move them regenerates the file and says so in the CHANGELOG:
``python tests/golden/test_golden.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mapo_lightning.config.compose import compose
from mapo_lightning.run.build import build_finetune
from mapo_lightning.run.config import RunConfig
from mapo_lightning.semantics.factory import semantic_dim

CONF = Path(__file__).parents[2] / "conf"
FILE = Path(__file__).with_name("losses.json")
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))


def losses(method: str) -> dict[str, float]:
    """Loss terms of the first two updates on the same synthetic experience."""
    torch.set_num_threads(1)  # sums in another order may draw another one-hot
    cfg = compose([f"method={method}", "env=dmc/walker_run"], RunConfig, CONF).config
    torch.manual_seed(0)
    module, _ = build_finetune(cfg, 3, None)
    shape = (2, 8)
    first = torch.zeros(shape, dtype=torch.bool)
    first[:, 0] = True
    batch = {
        "obs": torch.randint(0, 256, (*shape, 64, 64, 3), dtype=torch.uint8),
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
@pytest.mark.parametrize("method", METHODS)
def test_first_losses_are_those_on_file(method: str) -> None:
    expected = json.loads(FILE.read_text())[method]
    # Not bit for bit: other processors round convolutions differently, and one-hot samples jump.
    assert losses(method) == pytest.approx(expected, rel=2e-2, abs=2e-2)


if __name__ == "__main__":
    FILE.write_text(json.dumps({m: losses(m) for m in METHODS}, indent=1) + "\n")
