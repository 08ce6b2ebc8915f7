"""LPIPS from a file of VGG16's weights (facts 7.5); the file here has random ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mapo_lightning.config.compose import compose
from mapo_lightning.run.build import build_finetune, build_pretrain
from mapo_lightning.run.config import RunConfig
from mapo_lightning.training.published_weights import comparison, perceptual_distance
from mapo_lightning.types import ConfigError
from tests.unit.test_methods import synthetic

CONF = Path(__file__).parents[2] / "conf"
PLAN = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]


def torchvision_features() -> nn.Sequential:
    """The ``features`` of torchvision's vgg16, layer by layer."""
    layers: list[nn.Module] = []
    below = 3
    for step in PLAN:
        if isinstance(step, int):
            layers += [nn.Conv2d(below, step, 3, padding=1), nn.ReLU()]
            below = step
        else:
            layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16-397923af.pth"
    state = {f"features.{k}": v for k, v in torchvision_features().state_dict().items()}
    torch.save(state | {"classifier.0.bias": torch.zeros(3)}, path)
    return path


@torch.no_grad()
def test_the_distance_is_that_of_its_definition(vgg: Path) -> None:
    """After the ReLUs 1_2, 2_2, 3_3, 4_3 and 5_3: features 3, 8, 15, 22 and 29."""
    layers = torchvision_features()
    stored = torch.load(vgg, weights_only=True)
    layers.load_state_dict({k.removeprefix("features."): v for k, v in stored.items()
                            if k.startswith("features.")})  # fmt: skip
    torch.manual_seed(1)
    one, two = torch.rand(2, 3, 3, 32, 32)
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)

    def seen(pictures: Tensor) -> list[Tensor]:
        x, found = (pictures * 2 - 1 - shift) / scale, []
        for number, layer in enumerate(layers):
            x = layer(x)
            if number in (3, 8, 15, 22, 29):
                found.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return found

    apart = [
        (weight.flatten()[:, None, None] * (x - y) ** 2).sum(1).mean(dim=(1, 2))
        for x, y, weight in zip(seen(one), seen(two), comparison(), strict=True)
    ]
    distance = perceptual_distance(vgg)
    expected = torch.stack(apart).sum(0)
    torch.testing.assert_close(distance(one, two), expected.mean())
    assert float(distance(one, one)) == 0.0
    assert float(distance(one, (one + 0.01).clamp(0, 1))) < float(distance(one, two))
    assert not any(p.requires_grad for p in distance.parameters())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"no weights", "cannot be read"),
        (["a list"], "holds no named weights"),
        ({"features.0.weight": torch.zeros(64, 3, 3, 3)}, "is not VGG16: it has no 'features.0.b"),
    ],
    ids=["damaged", "list", "another network"],
)
def test_another_file_is_one_sentence(content: object, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ConfigError, match=sentence) as caught:
        perceptual_distance(path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_method_learns_with_it_and_its_checkpoint_is_without(vgg: Path) -> None:
    words = ["method=ivideogpt_fixed", "env=toy", "token_world.lpips=true"]
    with pytest.raises(ConfigError, match="needs VGG16, and nothing is downloaded"):
        compose(words, RunConfig, CONF)
    cfg = compose([*words, f"token_world.vgg={vgg}"], RunConfig, CONF).config
    module = build_pretrain(cfg, "tokenizer")
    batch = synthetic(cfg, 2, steps=6)
    total, log = module.losses(batch)
    total.backward()
    assert float(log["lpips"]) > 0.0
    assert not any("looks" in name or "stages" in name for name in module.state_dict())
    assert "lpips" not in build_pretrain(cfg, "pretrain").losses(batch)[1]
    assert "lpips" in build_finetune(cfg, 2, None)[0].losses(synthetic(cfg, 2, steps=6))[1]
    with pytest.raises(ConfigError, match=r"token_world\.vgg=FILE, or leave LPIPS out"):
        compose(["method=ivideogpt", "size=paper", "data=folder"], RunConfig, CONF)
