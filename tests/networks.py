"""The image networks of both kinds, small: what a test says of models holds with either."""

from __future__ import annotations

from pathlib import Path

from mapo_lightning.models.settings import ObjectiveConfig
from mapo_lightning.models.token_world.settings import (
    TokenizerConfig,
    TokenWorldConfig,
    TransformerConfig,
)
from mapo_lightning.models.token_world.world_model import Taught, TokenWorldModel

NETWORKS = ("published", "tiny")
METHODS = sorted(path.stem for path in (Path(__file__).parents[1] / "conf/method").glob("*.yaml"))
TOKEN_METHODS = [method for method in METHODS if method.startswith("ivideogpt")]
"""Methods whose world model is of tokens; it has networks of its own, for one size of pictures."""
RSSM_METHODS = [method for method in METHODS if method not in TOKEN_METHODS]


def image(networks: str, method: str = "mapo") -> str:
    """The word that chooses image networks.

    Args:
        networks: ``published``: those of the method's paper at 64 pixels, with few channels;
            ``tiny``: the plain CNN at 32 pixels, as size=tiny has it.
        method: A name of conf/method.
    """
    if networks == "tiny":
        return "world_model.image={kind: cnn, size: 32, channels: [4]}"
    kind = "cnn" if method == "dreamerv2" else "resnet"
    return f"world_model.image={{kind: {kind}, size: 64, channels: [4, 8, 16], layers: 1}}"


def backbone(kind: str, method: str) -> list[str]:
    """The words that choose the kind of every dynamics that a method has.

    Args:
        kind: ``gru``, ``transformer``, or one for the lower and one for the upper dynamics, such as
            ``gru+transformer``. Transformers have dropout.
        method: A name of conf/method.
    """
    lower, _, upper = kind.partition("+")
    found = {"lower": lower, "upper": upper or lower}
    missing = {"dreamerv2": "lower", "prelar": "upper", "prelar_fixed": "upper"}.get(method)
    words = []
    for name, chosen in found.items():
        if name != missing:
            words.append(f"world_model.{name}.kind={chosen}")
            words.append(f"world_model.{name}.transformer.dropout=0.1")
    return words


def token_world(
    action_dim: int | None, learn: Taught = "both", semantic_dim: int = 0, **words: object
) -> TokenWorldModel:
    """A token world model of 32 pixels, small: 5 tokens for a frame after the context."""
    tokenizer = TokenizerConfig(
        size=32, channels=[8, 32, 32], blocks=1, groups=8, latent=8, context_codes=32,
        future_codes=32,
    )  # fmt: skip
    transformer = TransformerConfig(layers=2, width=32, heads=4, mlp=64, positions=200)
    cfg = TokenWorldConfig(tokenizer, transformer, **{"lpips": False, "augment": False} | words)  # type: ignore[arg-type]
    names = [] if learn == "transformer" else ["context", "future", "codes"]
    names += [] if learn == "tokenizer" else ["tokens"]
    names += ["reward"] if action_dim is not None and learn != "tokenizer" else []
    names += ["phrase"] if cfg.phrases and learn != "tokenizer" else []
    scales = ObjectiveConfig(dict.fromkeys(names, 1.0))
    return TokenWorldModel(cfg, scales, action_dim, learn, semantic_dim)
