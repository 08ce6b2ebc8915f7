"""Who describes which frames, and where the answers are kept; free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from mapo_lightning.types import ConfigError, check_at_least


@dataclass
class WindowConfig:
    """Which frames of a video the describer sees together, and which frame they label (O2, O5)."""

    frames: int = 4
    """Frames in one window (O2)."""
    stride: int = 4
    """Frames from one window of a video to the next; a label is held until the next one (O5)."""
    offset: int = 0
    """Frames between a window's last frame and the frame it labels (O2): 0 counts the frame itself,
    1 ends the window one frame earlier, so that a label never shows what is to be predicted."""
    size: int = 128
    """Short side of the video frames shown to the describer, in pixels (O10)."""

    def __post_init__(self) -> None:
        check_at_least(self, frames=2, stride=1, offset=0)
        _check_size(self.size)


@dataclass
class ServerConfig:
    """Servers that speak OpenAI's API, and how patiently they are asked; for kind=openai."""

    base_url: str = ""
    """Address of the server, such as http://127.0.0.1:8000/v1; several, separated by commas, share
    the work. The key comes from the environment: MAPO_VLM_API_KEY or OPENAI_API_KEY."""
    concurrency: int = 16
    """Queries in flight to the servers from one training process and its loader's workers."""
    timeout_seconds: float = 60.0
    """Seconds that one query may take."""
    retries: int = 5
    """Failed attempts after which a window is left without a label, if others are answered."""
    on_outage: Literal["wait", "skip", "error"] = "wait"
    """While no server answers: wait for one; skip the window, whose label is null now and not
    stored; or stop with an error."""
    structured: Literal["auto", "brackets"] = "auto"
    """auto: ask for the five slots as JSON where the server can; brackets: never."""

    def __post_init__(self) -> None:
        check_at_least(self, concurrency=1, retries=0)
        if self.timeout_seconds <= 0.0:
            raise ConfigError(f"timeout_seconds must be positive, got {self.timeout_seconds}")
        for url in self.base_urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ConfigError(f"base_url must hold http(s) addresses, got '{url}'")
            if parts.username or parts.password or parts.query:
                raise ConfigError(
                    f"base_url must not hold a password or a key ({parts.hostname}): give the key "
                    "in the environment variable MAPO_VLM_API_KEY"
                )

    @property
    def base_urls(self) -> tuple[str, ...]:
        """The servers' addresses."""
        return tuple(url.strip().rstrip("/") for url in self.base_url.split(",") if url.strip())


@dataclass
class CollectConfig:
    """How the frames of environments are described while an agent collects experience."""

    every: int = 4
    """Agent steps from one query about an environment to the next (O6)."""
    size: int | None = None
    """Side of the environment frames shown to the describer, in pixels; null: the 64 px image
    (O10)."""
    late: bool | None = None
    """Act on the newest answer there is, and complete replay when an entry's own answer arrives.
    null: yes, but no for flow and none and where trainer.deterministic is on."""
    queue: int = 64
    """Windows of environments that may wait for a late answer at once. Where the queue is full, a
    window is skipped as null and counted in labels/skipped: no environment waits."""
    drain: float = 30.0
    """Seconds to wait for outstanding answers at the end of fine-tuning; the rest stay null."""

    def __post_init__(self) -> None:
        check_at_least(self, every=1, queue=1)
        if self.size is not None:
            _check_size(self.size)
        if not 0.0 <= self.drain <= 3600.0:
            raise ConfigError(f"drain must lie in [0, 3600] seconds, got {self.drain}")


@dataclass
class EmbedConfig:
    """How a phrase becomes a vector (O1)."""

    encoder: str = ""
    """Hub id or folder of a sentence encoder that turns phrases into vectors, or wordllama, the
    package; empty: the hidden state of kind=transformers, and hashed words for the others."""
    revision: str | None = None
    """Commit hash of the hub's sentence encoder; not used for a folder."""
    direction: bool | None = None
    """Join direction and displacement of the phrase to the vector, as 8 further entries, so that
    opposite directions are far apart. null: where vlm.direction=flow. Hashed words, which hold them
    already, stay as they are."""


@dataclass
class VlmConfig:
    """Who describes the frames, and where the answers are kept (O1, O7)."""

    kind: Literal["flow", "none", "templates", "transformers", "openai"] = "flow"
    """flow: optical flow, no weights and no network. none: no describer, all labels are null.
    templates: sentences that come with the videos, put into slots; no model. transformers:
    a vision-language model in this process. openai: a server that speaks OpenAI's API, such as
    vLLM."""
    captions: str = ""
    """File of sentences about the videos, for kind=templates: CSV, JSON or JSON lines with the
    columns video, start, end, text. Empty: those of the data set itself, or ``captions.csv``,
    ``captions.json`` or ``captions.jsonl`` in data.root."""
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """Hub id or folder of an image-text model; with kind=openai its name at the server."""
    revision: str | None = None
    """Commit hash of the hub's model, so that its weights never change; not used for a folder."""
    device: str = "auto"
    """Where the model of kind=transformers runs: auto, cpu, cuda, cuda:1 ..."""
    batch_size: int = 16
    """Windows that a model in this process describes at once."""
    max_new_tokens: int = 64
    """Longest answer, in tokens. One that is cut there is asked for once more, with four times as
    many; what is still cut then is not stored."""
    direction: Literal["model", "flow"] = "model"
    """Who says in which direction and how far things move: the model itself, as published, or
    optical flow, which fills these two slots of every answer of the model that is not null."""
    hidden_dim: int | None = None
    """Width of the model's hidden state; null reads it from the model's configuration. With
    kind=none, the width of the vectors that an agent's networks were trained with."""
    cached_only: bool = False
    """Use stored labels only: a window that is not in the store stops the run and is named."""
    flow_min_percent: float = 0.7
    """Smallest motion over one window that counts, in percent of the frame width."""
    store: str = "labels"
    """Folder of the label store; a relative path lies inside the run's work folder."""
    reviews: str = ""
    """File of accepted, rejected and corrected labels, from the gallery; rejected ones count as
    null, and corrected ones say what a person has written."""
    window: WindowConfig = field(default_factory=WindowConfig)
    """What the describer sees."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """Where it runs, for kind=openai."""
    collect: CollectConfig = field(default_factory=CollectConfig)
    """How environments are described."""
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    """How phrases become vectors."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: A value is out of range.
        """
        check_at_least(self, batch_size=1, max_new_tokens=1, hidden_dim=1)
        if not 0.0 < self.flow_min_percent <= 50.0:
            raise ConfigError(
                f"flow_min_percent must lie in (0, 50] percent, got {self.flow_min_percent}"
            )
        unasked = {
            "flow": "measures directions itself",
            "none": "gives no answers",
            "templates": "sees no frames",
        }
        if self.direction == "flow" and self.kind in unasked:
            why = unasked[self.kind]
            raise ConfigError(
                f"direction must be model with kind={self.kind}, which {why}: flow completes the "
                "answers of a model, such as those of vlm=openai_server"
            )
        hidden = self.kind == "transformers" and not self.embed.encoder
        if self.direction == "flow" and hidden and not self.joins_direction:
            raise ConfigError(
                "direction cannot be flow with embed.direction=false: the vector of "
                "kind=transformers is the model's hidden state, which does not hold the measured "
                "direction. Leave out vlm.embed.direction"
            )
        if not self.store:
            raise ConfigError("store must name a folder, got an empty text")
        if not self.model:
            raise ConfigError("model must name a model, got an empty text")
        if self.captions and self.kind != "templates":
            raise ConfigError(
                f"vlm.captions='{self.captions}' is read by vlm=templates only, and vlm.kind is "
                f"{self.kind}: choose vlm=templates, or leave out vlm.captions"
            )
        if self.kind == "openai" and not self.server.base_urls and not self.cached_only:
            raise ConfigError(
                "server.base_url must name a server, such as "
                "vlm.server.base_url=http://127.0.0.1:8000/v1"
            )

    @property
    def caption_file(self) -> str | None:
        """Where sentences are looked for: a file, '' for the data set's own; None: nowhere."""
        return self.captions if self.kind == "templates" else None

    @property
    def joins_direction(self) -> bool:
        """Whether vectors other than hashed words get entries for direction and displacement."""
        if self.embed.direction is None:
            return self.direction == "flow"
        return self.embed.direction


def _check_size(size: int) -> None:
    if not 16 <= size <= 2048:
        raise ConfigError(f"size must lie in [16, 2048] pixels, got {size}")
