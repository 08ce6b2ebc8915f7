"""Builds describers and labelers from their settings."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from mapo_lightning.semantics.describer import Describer, NullDescriber
from mapo_lightning.semantics.embed import needs_hidden
from mapo_lightning.semantics.flow import FlowDescriber
from mapo_lightning.semantics.in_process import InProcessDescriber
from mapo_lightning.semantics.labeler import Labeler
from mapo_lightning.semantics.measured_direction import fill_direction
from mapo_lightning.semantics.openai_server import OpenAIDescriber
from mapo_lightning.semantics.reviews import read_reviews
from mapo_lightning.semantics.server_pool import OutageLog
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.semantics.store import LabelStore
from mapo_lightning.semantics.templates import TemplateDescriber
from mapo_lightning.semantics.text_encoder import build_encoder
from mapo_lightning.types import ConfigError

log = logging.getLogger(__name__)


def semantic_dim(cfg: VlmConfig) -> int:
    """Return the width V of the vectors that `build_labeler(cfg, ...)` will give.

    Raises:
        DescriberError: There is no such model or sentence encoder.
    """
    return build_encoder(cfg).semantic_dim


def log_servers(cfg: VlmConfig) -> None:
    """Log whom frames will be sent to, if the describer is behind the network."""
    if cfg.kind == "openai" and cfg.server.base_urls and not cfg.cached_only:
        hosts = ", ".join(urlsplit(url).netloc for url in cfg.server.base_urls)
        log.info("frames are sent to the vision-language model at %s", hosts)


def build_describer(cfg: VlmConfig, outage: OutageLog | None = None) -> Describer:
    """Build the configured describer; loads no weights, opens no connection.

    Args:
        cfg: Which one.
        outage: Where describers that wait for a server log that there is none.
    """
    flow = FlowDescriber(min_percent=cfg.flow_min_percent)
    if cfg.kind == "flow":
        return flow
    if cfg.kind == "templates":
        return TemplateDescriber()
    kinds: dict[str, Callable[[VlmConfig], Describer]]
    kinds = {"transformers": InProcessDescriber, "openai": OpenAIDescriber}
    describer = kinds[cfg.kind](cfg) if cfg.kind in kinds else NullDescriber()
    if isinstance(describer, OpenAIDescriber) and outage is not None:
        describer.outage = outage
    return fill_direction(describer, flow) if cfg.direction == "flow" else describer


def build_labeler(cfg: VlmConfig, root: Path, writer: str) -> Labeler:
    """Build the configured labeler; cheap, opens nothing.

    Args:
        cfg: Describer and store.
        root: The run's work folder; a relative ``cfg.store`` lies inside it.
        writer: Name of this process in the store, such as ``rank0-worker1``.
    """
    # Computing flow again is cheaper than waiting for the disk; a model's answers are expensive.
    durable = cfg.kind not in ("flow", "templates")
    store = LabelStore(Path(root) / cfg.store, writer, durable=durable)
    describer = build_describer(cfg, OutageLog(store.root / "outage"))
    reviews, encoder = read_reviews(cfg.reviews), build_encoder(cfg)
    if reviews.corrected and needs_hidden(encoder):
        raise ConfigError(
            f"vlm.reviews='{cfg.reviews}' corrects labels, and the vectors are the describer's own "
            "hidden states, which no person can correct: name a sentence encoder with "
            "vlm.embed.encoder, or reject these labels"
        )
    return Labeler(describer, store, encoder, reviews, cfg.cached_only)
