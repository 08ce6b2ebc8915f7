"""Tiny image-text models of several families with random weights, saved like the real ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_models import ANSWER, _text, _tilt, _tokenizer
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EYES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
EYES |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 7}
Parts = tuple[PreTrainedConfig, Any, dict[str, Any]]


def _idefics3(
    tokenizer: PreTrainedTokenizerFast, config: Any = Idefics3Config, images: Any = None
) -> Parts:
    made = config(
        text_config=_text(len(tokenizer)) | {"model_type": "llama"},
        vision_config=EYES,
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
    )
    side = {"longest_edge": 28}
    images = (images or Idefics3ImageProcessorPil)(size=side, max_image_size=side)
    return made, images, {"image_seq_len": 4}


def _smolvlm(tokenizer: PreTrainedTokenizerFast) -> Parts:
    return _idefics3(tokenizer, SmolVLMConfig, SmolVLMImageProcessorPil)


def _internvl(tokenizer: PreTrainedTokenizerFast) -> Parts:
    config = InternVLConfig(
        text_config=_text(len(tokenizer)) | {"model_type": "qwen2"},
        vision_config=EYES | {"image_size": [28, 28], "patch_size": [7, 7]},
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=True)
    return config, images, {"image_seq_length": 4}


def _gemma3(tokenizer: PreTrainedTokenizerFast) -> Parts:
    config = Gemma3Config(
        text_config=_text(len(tokenizer)) | {"head_dim": 16, "sliding_window": 4096},
        vision_config=EYES,
        mm_tokens_per_image=4,
        image_token_id=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        tie_word_embeddings=False,
    )
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28}, image_seq_length=4)
    return config, images, {"image_seq_length": 4}


def _llava_onevision(tokenizer: PreTrainedTokenizerFast) -> Parts:
    config = LlavaOnevisionConfig(
        text_config=_text(len(tokenizer)) | {"model_type": "qwen2"},
        vision_config=EYES | {"model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_id=tokenizer.image_token_id,
        image_grid_pinpoints=[[28, 28], [28, 56]],
        vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_9",
    )
    images = LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28}, image_grid_pinpoints=[[28, 28], [28, 56]]
    )
    settings = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    return config, images, settings | {"vision_aspect_ratio": "anyres_max_9"}


LOUD = {"gemma3": 0.25}  # its layers are normalised to be as loud as their input
IMAGE = {"image_token": "<image>"}
FAMILIES: dict[str, tuple[Callable[[PreTrainedTokenizerFast], Parts], dict[str, str], str]] = {
    "idefics3": (
        _idefics3,
        IMAGE
        | {"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"}
        | {"end_of_utterance_token": "<end_of_utterance>"},
        "<image>",
    ),
    "internvl": (
        _internvl,
        {"start_image_token": "<img>", "end_image_token": "</img>"}
        | {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
        "<IMG_CONTEXT>\n",
    ),
    "gemma3": (
        _gemma3,
        {"image_token": "<image_soft_token>"}
        | {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        "<start_of_image>",
    ),
    "llava_onevision": (_llava_onevision, IMAGE | {"video_token": "<video>"}, "<image>"),
    "smolvlm": (_smolvlm, IMAGE, "<image>"),
}
"""Family -> its parts, the tokens it has names for, and how its chat template marks an image."""


def save_family(folder: Path, family: str, seed: int = 1) -> Path:
    """Save a tiny model of a family with its tokenizer, image processor and processor settings.

    As in `tiny_models.save_qwen`, the weights are random, but greedy answers read like
    ``hand lifts ball left``.
    """
    torch.manual_seed(seed)
    make, names, image = FAMILIES[family]
    tokenizer = _tokenizer(names)
    tokenizer.chat_template = CHAT.replace("IMAGE", image)
    config, images, settings = make(tokenizer)
    model = AutoModelForImageTextToText.from_config(config)
    # Fresh eyes hardly see, and Gemma's projector is zero.
    for name, weight in model.named_parameters():
        if name.endswith(("patch_embedding.weight", "mm_input_projection_weight")):
            torch.nn.init.normal_(weight, 0.0, 0.3)
    _tilt(model, tokenizer, ANSWER, loud=LOUD.get(family, 0.05))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    for part in (model, tokenizer, images):
        part.save_pretrained(folder)
    # A processor with a video half cannot be made without torchvision, but this is all it saves.
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder
