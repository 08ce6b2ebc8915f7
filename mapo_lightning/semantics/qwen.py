"""A Qwen2.5-VL or Qwen3-VL in this process, through transformers, and what loads any model.

Their frames go through the model's own image processor and are joined to a video. The video
processor of transformers does the same, but it needs torchvision, which this package does not
install. All other families see the frames as images, see `image_text`.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mapo_lightning.semantics.answers import count_thoughts
from mapo_lightning.semantics.describer import Usage
from mapo_lightning.semantics.phrase import PROMPT
from mapo_lightning.types import DescriberError, Frames

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

_FPS = 2.0  # frame rate that the model is told: Qwen's own sampling rate
_HASHED = 65536  # bytes at either end of a weight file that name it


class Said(NamedTuple):
    """What the model said about one window."""

    text: str
    hidden: NDArray[np.float16] | None
    """Mean state over the tokens after its thoughts, (hidden_dim,); None if there are none."""
    cut: bool
    """It had no tokens left to end by itself."""
    usage: Usage
    """Tokens of this question and this answer."""


class LoadedModel:
    """A Qwen2.5-VL or Qwen3-VL with its tokenizer and image processor, in memory.

    Raises:
        DescriberError: The model is not available, or cannot be asked about frames.
    """

    def __init__(self, source: str, revision: str | None, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

        self.device, self._lock = device, threading.Lock()
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        with loading(source, "vlm.model"):
            where = locate(source, revision)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(**where)
            images: Any = AutoImageProcessor
            self.images = images.from_pretrained(**where, backend="pil")
            model: Any = AutoModelForImageTextToText.from_pretrained(
                **where, dtype=dtype, use_safetensors=True
            )
        self.model = model.eval().requires_grad_(False).to(self.device)
        # Nothing is padded here, but generate wants to know by what, and some models do not say.
        pad = self.tokenizer.pad_token_id
        self.settings: dict[str, Any] = {
            "do_sample": False, "num_beams": 1,
            "temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.0,
            "pad_token_id": self._ends()[0] if pad is None else pad,
        }  # fmt: skip
        self._prepare(source, where)
        log.info("%s answers on %s in %s", source, self.device, str(dtype).split(".")[-1])

    def _prepare(self, source: str, where: dict[str, Any]) -> None:
        """Find out how the model wants to be asked.

        Raises:
            DescriberError: It cannot be.
        """
        config = self.model.config
        if not hasattr(config, "video_token_id") or not self.tokenizer.chat_template:
            raise DescriberError(
                f"'{source}' is a {config.model_type} without a video token or a chat template. "
                "Choose another model with vlm.model=..., or serve it and use vlm=openai_server"
            )
        self.video_id = int(config.video_token_id)

    def _ends(self) -> list[int]:
        """Tokens that end an answer."""
        found = self.model.generation_config.eos_token_id
        found = self.tokenizer.eos_token_id if found is None else found
        return found if isinstance(found, list) else [found]

    def inputs(self, clips: Sequence[Frames]) -> Any:
        """Arguments of ``generate`` about windows of one size, on the model's device."""
        videos = [self._patches(clip) for clip in clips]
        grid = videos[0][1]
        row = self.tokenizer(self._prompt(grid), return_tensors="pt", add_special_tokens=False)
        tokens_BL = row["input_ids"].expand(len(clips), -1).to(self.device)
        inputs = {
            "input_ids": tokens_BL,
            "attention_mask": torch.ones_like(tokens_BL),
            "mm_token_type_ids": (tokens_BL == self.video_id).int() * 2,
            "pixel_values_videos": torch.cat([v for v, _ in videos]).to(
                self.device, self.model.dtype
            ),
            "video_grid_thw": torch.tensor([grid] * len(clips), device=self.device),
        }
        if self.model.config.model_type == "qwen2_5_vl":
            seconds = self.images.temporal_patch_size / _FPS
            inputs["second_per_grid_ts"] = torch.full((len(clips),), seconds, device=self.device)
        return inputs

    @torch.inference_mode()
    def answer(self, clips: Sequence[Frames], max_new_tokens: int) -> list[Said]:
        """Describe windows of one size, (T, H, W, 3) each."""
        inputs = self.inputs(clips)
        asked = inputs["input_ids"].shape[1]
        with self._lock, _states(self.model) as states:
            said_BN = self.model.generate(**inputs, **self.settings, max_new_tokens=max_new_tokens)[
                :, asked:
            ]
        ends = torch.tensor(self._ends(), device=self.device)
        alive_BN = (torch.isin(said_BN, ends).cumsum(1) == 0).cpu()
        # The first state is that of the prompt's end; each later one has read one more token.
        read_BND = torch.stack(states[1:], 1) if len(states) > 1 else torch.zeros(len(clips), 0, 1)
        rows = zip(said_BN.cpu(), read_BND, alive_BN, strict=True)
        return [self._said(*row, asked) for row in rows]

    def _said(self, said_N: Tensor, read_ND: Tensor, alive_N: Tensor, asked: int) -> Said:
        """One row of a batch: its tokens, the states that read them, and which are its words."""

        def text(count: int) -> str:
            return str(self.tokenizer.decode(said_N[:count], skip_special_tokens=True))

        whole = text(len(said_N))
        thoughts = count_thoughts(whole)
        # The tokens up to the end of the last thought: as few as show all of them.
        begin = bisect_left(range(len(said_N)), thoughts, key=lambda n: count_thoughts(text(n)))
        cut = bool(alive_N[-1])
        # The token that ends an answer is one as well.
        usage = Usage(1, 1, asked, int(alive_N.sum()) + (not cut))
        alive_N[:begin] = False
        return Said(whole, _mean(read_ND, alive_N), cut, usage)

    def _patches(self, clip: Frames) -> tuple[Tensor, list[int]]:
        """Patches (N, 3 * TP * P * P) of a clip, and how many lie along time, height and width."""
        deep = int(self.images.temporal_patch_size)
        frames = [*clip, *[clip[-1]] * (-len(clip) % deep)]
        made = self.images(images=frames, return_tensors="pt")
        _, high, wide = made["image_grid_thw"][0].tolist()
        # The processor makes a still video of each frame: take time slice k of frame k.
        still = made["pixel_values"].view(len(frames) // deep, deep, high * wide, 3, deep, -1)
        moving = torch.stack([still[:, k, :, :, k] for k in range(deep)], dim=3)
        return moving.flatten(0, 1).flatten(1), [len(frames) // deep, high, wide]

    def _prompt(self, grid: Sequence[int]) -> str:
        parts = [{"type": "video"}, {"type": "text", "text": PROMPT}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
        )
        pad = self.tokenizer.convert_ids_to_tokens(self.video_id)
        times, high, wide = grid
        merge = int(self.images.merge_size) ** 2
        if self.model.config.model_type == "qwen2_5_vl":
            return str(text).replace(pad, pad * (times * high * wide // merge), 1)
        # Qwen3-VL reads the time of each slice as words before it.
        start, end = (
            self.tokenizer.convert_ids_to_tokens(int(getattr(self.model.config, f"vision_{s}")))
            for s in ("start_token_id", "end_token_id")
        )
        deep = int(self.images.temporal_patch_size)
        middles = [(t * deep + (deep - 1) / 2) / _FPS for t in range(times)]
        slices = [f"<{m:.1f} seconds>{start}{pad * (high * wide // merge)}{end}" for m in middles]
        return str(text).replace(f"{start}{pad}{end}", "".join(slices), 1)


def locate(source: str, revision: str | None) -> dict[str, Any]:
    """Arguments of ``from_pretrained``: a folder, or a hub id at a revision; never its code."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": source, "trust_remote_code": False}
    if Path(source).expanduser().is_dir():
        return where | {"pretrained_model_name_or_path": str(Path(source).expanduser())}
    return where | ({"revision": revision} if revision else {})


@contextmanager
def loading(source: str, field: str) -> Iterator[None]:
    """Turn the errors of transformers about a missing model into one sentence.

    Raises:
        DescriberError: The model cannot be loaded.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = (str(error) or type(error).__name__).split("\n")[0].strip()[:200]
        raise DescriberError(
            f"cannot load '{source}': it is not a folder with a model, and not available from the "
            f"hub or its cache ({reason}). Give a folder with {field}=DIR, or download it once "
            "on a machine with a network"
        ) from error


@functools.lru_cache(maxsize=8)
def hidden_size(source: str, revision: str | None, field: str) -> int:
    """Width of a model's hidden states; reads its configuration, not its weights.

    Raises:
        DescriberError: There is no such model.
    """
    from transformers import AutoConfig

    with loading(source, field):
        config = AutoConfig.from_pretrained(**locate(source, revision))
        return int(config.get_text_config().hidden_size)


def identity(source: str, revision: str | None) -> str:
    """Name weights by hub id and revision, or by a hash of a folder's files."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return f"{source}@{revision or 'main'}"
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(
        p for s in ("json", "safetensors", "jinja", "txt") for p in folder.glob(f"*.{s}")
    ):
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{path.name} {size}".encode() + file.read(_HASHED))
            file.seek(max(0, size - _HASHED))
            digest.update(file.read(_HASHED))
    return f"folder {digest.hexdigest()}"


@contextmanager
def _states(model: Any) -> Iterator[list[Tensor]]:
    """Collect the input of the output layer at every step: the last layer's state, (B, D)."""
    found: list[Tensor] = []

    def keep(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0][:, -1].float().cpu())

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def _mean(state_ND: Tensor, alive_N: Tensor) -> NDArray[np.float16] | None:
    """Mean state over the answer's words; None for an empty answer."""
    kept = state_ND[alive_N[: len(state_ND)]]
    return kept.mean(0).numpy().astype(np.float16) if len(kept) else None
