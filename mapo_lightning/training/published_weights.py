"""Reads weights that others have published, from files of the user; nothing is downloaded."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchmetrics
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mapo_lightning.models.token_world.perceptual import PerceptualDistance
from mapo_lightning.models.token_world.published import load_published
from mapo_lightning.models.token_world.tokenizer import Tokenizer
from mapo_lightning.models.token_world.transformer import TokenTransformer
from mapo_lightning.models.token_world.world_model import TokenWorldModel
from mapo_lightning.types import CheckpointError, ConfigError

FILES = {
    "tokenizer": "diffusion_pytorch_model.safetensors",
    "transformer": "model.safetensors",
}
"""Part of iVideoGPT, which is also the folder of its weights -> name of the file there."""


def is_published(path: Path) -> bool:
    """Whether a path is a folder of iVideoGPT's published weights, laid out as on the hub."""
    return all((path / folder / file).is_file() for folder, file in FILES.items())


def load_folder(world_model: TokenWorldModel, path: Path) -> tuple[str, ...]:
    """Fill tokenizer and transformer from a folder of published weights; returns their names.

    Raises:
        CheckpointError: A file is damaged, or holds another model.
    """
    parts = world_model.parts()
    loaded = tuple(name for name in FILES if name in parts)
    for name in loaded:
        part, file = parts[name], path / name / FILES[name]
        assert isinstance(part, Tokenizer | TokenTransformer)
        try:
            stored = load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"'{file}' cannot be read ({reason}): copy it again") from error
        load_published(part, stored, str(file))
    return loaded


def comparison() -> list[Tensor]:
    """LPIPS's published weights of the channels of VGG16's stages, which torchmetrics brings."""
    folder = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models"
    stored = torch.load(folder / "vgg.pth", map_location="cpu", weights_only=True)
    return [stored[f"lin{stage}.model.1.weight"] for stage in range(5)]


def perceptual_distance(vgg: Path) -> PerceptualDistance:
    """LPIPS with the weights of a file.

    Raises:
        ConfigError: The file cannot be read, or is not that of VGG16.
    """
    try:
        found: Any = torch.load(vgg, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"token_world.vgg='{vgg}' cannot be read ({reason}): give torchvision's "
            "vgg16-397923af.pth, or set token_world.lpips=false"
        ) from error
    if not isinstance(found, Mapping):
        raise ConfigError(f"token_world.vgg='{vgg}' holds no named weights")
    return PerceptualDistance(found, comparison(), f"token_world.vgg='{vgg}'")
