"""A frozen sentence encoder: similar phrases get similar vectors.

`build_encoder` chooses between it, a model's hidden states and hashed words (facts O1).
"""

from __future__ import annotations

import functools
import importlib.util
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mapo_lightning.semantics.embed import Encoder, HashedSlots, HiddenState, WithDirection
from mapo_lightning.semantics.phrase import Phrase
from mapo_lightning.semantics.qwen import hidden_size, loading, locate
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.types import DescriberError

WORDLLAMA = "wordllama"
"""Value of ``vlm.embed.encoder`` that means the package of this name."""
_WORDLLAMA_DIM = 256  # width of the vectors inside its wheel
_CACHED = 65536  # phrases


class TextEncoder:
    """Mean of a sentence encoder's last layer over the words of a phrase, on the CPU.

    Args:
        source: Hub id or folder of a BERT-like model.
        revision: Commit hash of the hub's model.

    Raises:
        DescriberError: There is no such model.
    """

    def __init__(self, source: str, revision: str | None = None) -> None:
        self.source, self.revision = source, revision
        self.semantic_dim = hidden_size(source, revision, "vlm.embed.encoder")
        self._start()

    def _start(self) -> None:
        self._memory: dict[Phrase, NDArray[np.float32]] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        """Leave out the weights."""
        return {key: self.__dict__[key] for key in ("source", "revision", "semantic_dim")}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Load the weights at the first use."""
        self.__dict__ |= state
        self._start()

    def encode(
        self, phrase: Phrase, hidden: NDArray[np.float16] | None = None
    ) -> NDArray[np.float32]:
        """Embed one phrase.

        Args:
            phrase: The action; its slots are read as one sentence.
            hidden: Ignored.

        Returns:
            (V,) float32 of unit root mean square.
        """
        with self._lock:
            if phrase not in self._memory:
                if len(self._memory) >= _CACHED:
                    self._memory.clear()
                self._memory[phrase] = self._embed(" ".join(slot for slot in phrase if slot))
            return self._memory[phrase].copy()

    @torch.inference_mode()
    def _embed(self, sentence: str) -> NDArray[np.float32]:
        tokenizer, model = _load(self.source, self.revision)
        tokens = tokenizer(sentence, return_tensors="pt", truncation=True, max_length=64)
        tokens.pop("token_type_ids", None)
        state_LD = model(**tokens).last_hidden_state[0].float()
        mean_D = state_LD.mean(0)  # one sentence at a time, so that nothing is padded
        return np.asarray((mean_D / mean_D.square().mean().sqrt().clamp(min=1e-6)).numpy())


class WordLlamaEncoder(TextEncoder):
    """Mean of the word vectors of the package wordllama, whose wheel holds them.

    Raises:
        DescriberError: The package is not installed.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("wordllama") is None:
            raise DescriberError(
                f"vlm.embed.encoder={WORDLLAMA} needs the package wordllama, which is not "
                "installed: pip install 'mapo-lightning[wordllama]'"
            )
        self.source, self.revision, self.semantic_dim = WORDLLAMA, None, _WORDLLAMA_DIM
        self._start()

    def _embed(self, sentence: str) -> NDArray[np.float32]:
        mean_D: NDArray[np.float32] = _load_wordllama().embed([sentence])[0]
        scale = float(np.sqrt(np.mean(mean_D**2)))
        return np.asarray(mean_D / max(scale, 1e-6), np.float32)


@functools.lru_cache(maxsize=1)
def _load_wordllama() -> Any:
    import wordllama

    # Its own look-up misses the tokenizer beside its weights; a cache of the same layout finds it.
    inside = Path(wordllama.__file__).parent
    with loading(WORDLLAMA, "vlm.embed.encoder"):
        return wordllama.WordLlama.load(dim=_WORDLLAMA_DIM, cache_dir=inside, disable_download=True)


@functools.lru_cache(maxsize=2)
def _load(source: str, revision: str | None) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    with loading(source, "vlm.embed.encoder"):
        where = locate(source, revision)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModel.from_pretrained(**where, dtype=torch.float32, use_safetensors=True)
    return tokenizer, model.eval().requires_grad_(False)


def build_encoder(cfg: VlmConfig) -> Encoder:
    """Build the configured encoder: sentence encoder, hidden states or hashed words."""
    encoder: Encoder
    if cfg.embed.encoder == WORDLLAMA and cfg.kind != "none":
        encoder = WordLlamaEncoder()
    elif cfg.embed.encoder and cfg.kind != "none":
        encoder = TextEncoder(cfg.embed.encoder, cfg.embed.revision)
    elif cfg.kind == "transformers":
        width = cfg.hidden_dim or hidden_size(cfg.model, cfg.revision, "vlm.model")
        encoder = HiddenState(width)
    elif cfg.kind == "none" and cfg.hidden_dim:
        return HiddenState(cfg.hidden_dim)  # nothing is encoded; networks of this width fit
    else:
        return HashedSlots()  # these hold the direction in any case
    return WithDirection(encoder) if cfg.joins_direction else encoder
