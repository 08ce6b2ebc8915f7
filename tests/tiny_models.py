"""Tiny models with random weights, built and saved like the real ones; nothing is downloaded."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
SPECIAL += ("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    "Please describe possible actions in this video: hand moves lifts ball brick right left null"
)
PATTERN = r" ?\p{L}+| ?[^\s\p{L}\p{N}]| ?\p{N}|\s+"
Answer = tuple[str | tuple[str, ...], ...]
ANSWER: Answer = ("\n", " hand", (" moves", " lifts"), (" ball", " brick"), (" right", " left"))


def save_qwen(
    folder: Path, family: str = "qwen2_5", seed: int = 1, answer: Answer = ANSWER
) -> Path:
    """Save a tiny Qwen2.5-VL or Qwen3-VL: config, weights, tokenizer, processor, chat template.

    The weights are random, but the output layer is tilted so that greedy answers read like
    ``hand lifts ball left``: random words would all be unreadable. The
    picture decides between left and right. Another ``answer`` begins, like this one, with the last
    token of the question.
    """
    torch.manual_seed(seed)
    tokenizer = _tokenizer()
    tags = [step for step in answer if isinstance(step, str) and step.startswith("<")]
    if tags:
        tokenizer.add_tokens(tags)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    config = _qwen2_5(len(tokenizer), ids) if family == "qwen2_5" else _qwen3(len(tokenizer), ids)
    model = AutoModelForImageTextToText.from_config(config)
    _tilt(model, tokenizer, answer)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    patch = config.vision_config.patch_size
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=patch, min_pixels=4 * patch * patch, max_pixels=1280 * patch * patch
    ).save_pretrained(folder)
    return folder


def _tokenizer(names: Mapping[str, str] = MappingProxyType({})) -> PreTrainedTokenizerFast:
    """A tokenizer of Qwen's kind; ``names``: more special tokens, and what a family calls them."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [*SPECIAL, *names.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    bpe.train_from_iterator([WORDS] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=dict(names) or list(SPECIAL[3:]),
        padding_side="left",
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def _qwen2_5(vocabulary: int, ids: dict[str, int]) -> Qwen2_5_VLConfig:
    text = _text(vocabulary) | {"rope_parameters": _rope([2, 3, 3])}
    vision = {"depth": 2, "hidden_size": 64, "num_heads": 4, "out_hidden_size": 64}
    vision |= {"intermediate_size": 128, "fullatt_block_indexes": [1], "window_size": 112}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_marks(ids))


def _qwen3(vocabulary: int, ids: dict[str, int]) -> Qwen3VLConfig:
    text = _text(vocabulary) | {"rope_parameters": _rope([4, 2, 2]), "head_dim": 16}
    vision = {"depth": 2, "hidden_size": 64, "num_heads": 4, "out_hidden_size": 64}
    vision |= {"intermediate_size": 128, "deepstack_visual_indexes": [0, 1]}
    vision |= {"num_position_embeddings": 64}
    return Qwen3VLConfig(text_config=text, vision_config=vision, **_marks(ids))


def _text(vocabulary: int) -> dict[str, object]:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return {"hidden_size": 64, "intermediate_size": 128, "vocab_size": vocabulary, **heads}


def _rope(section: list[int]) -> dict[str, object]:
    return {"rope_type": "default", "mrope_section": section, "rope_theta": 1e6}


def _marks(ids: dict[str, int]) -> dict[str, int]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def _tilt(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, answer: Answer, loud: float = 0.05
) -> None:
    """Let each word of the answer call for the next; between two, the rest of the model decides.

    The louder its words are, the less is left to the rest.
    """
    seen = model.get_input_embeddings().weight.data
    said = model.get_output_embeddings().weight.data
    seen.normal_(0.0, loud)
    steps = [(step,) if isinstance(step, str) else step for step in (*answer, "<|im_end|>")]
    tokens = [[tokenizer(word)["input_ids"] for word in step] for step in steps]
    for before, after in itertools.pairwise(tokens):
        calls = torch.stack([seen[first] for (first,) in before]).sum(0)
        for (word,) in after:
            said[word] += 4.0 * calls / calls.norm()


def save_bert(folder: Path, seed: int = 0) -> Path:
    """Save a tiny BERT with random weights and the tokenizer that goes with it."""
    torch.manual_seed(seed)
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words.train_from_iterator([WORDS], trainers.WordLevelTrainer(special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]"
    )
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":  # python tests/tiny_models.py DIR: for trying things by hand
    save_qwen(Path(sys.argv[1]))
