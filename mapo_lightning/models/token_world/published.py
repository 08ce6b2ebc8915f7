"""Takes over the published weights of iVideoGPT, whose files name every tensor otherwise.

The files are ``diffusion_pytorch_model.safetensors`` of the tokenizer and ``model.safetensors`` of
the transformer, as on the hub under ``thuml/ivideogpt-oxe-64-act-free``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from mapo_lightning.models.token_world.tokenizer import Tokenizer
from mapo_lightning.models.token_world.transformer import TokenTransformer
from mapo_lightning.types import CheckpointError

# Applied one after the other to our name of a tensor.
_TOKENIZER = (
    (r"^context_encoder\.", "encoder."),
    (r"^future_encoder\.", "cond_encoder."),
    (r"^context_decoder\.", "decoder."),
    (r"^future_decoder\.", "cond_decoder."),
    (r"(?<=encoder\.)levels\.", "down_blocks."),
    (r"(?<=decoder\.)levels\.", "up_blocks."),
    (r"(?<=down_blocks\.\d)\.resample\.", ".downsamplers.0."),
    (r"(?<=up_blocks\.\d)\.resample\.", ".upsamplers.0."),
    (r"(?<=blocks\.\d)\.blocks\.", ".resnets."),
    (r"\.mid\.first\.", ".mid_block.resnets.0."),
    (r"\.mid\.last\.", ".mid_block.resnets.1."),
    (r"\.mid\.attention\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attention\.out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attention\.(q|k|v)\w+\.", r".mid_block.attentions.0.to_\1."),
    (r"\.skip\.", ".conv_shortcut."),
    (r"\.ending\.0\.", ".conv_norm_out."),
    (r"\.ending\.2\.", ".conv_out."),
    (r"(?<=decoder)\.cross\.", ".cross_att_blocks.0."),
    (r"\.attention\.(?=in_proj|out_proj)", ".att."),
    (r"\.norm_context\.(?=\w+$)", ".kv_norm."),
    (r"(?<=cross_att_blocks\.\d)\.norm\.", ".q_norm."),
    (r"\.position_context$", ".kv_pos_emb"),
    (r"\.position$", ".q_pos_emb"),
    (r"^before_codes\.", "quant_conv."),
    (r"^after_codes\.", "post_quant_conv."),
    (r"^patch_in\.", "quant_linear."),
    (r"^patch_out\.", "post_quant_linear."),
    (r"^context_codes\.codes$", "quantize.embedding.weight"),
    (r"^future_codes\.codes$", "dynamics_quantize.embedding.weight"),
)
_TRANSFORMER = (
    (r"^embedding\.", "model.embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"^norm\.", "model.norm."),
    (r"^layers\.", "model.layers."),
    (r"\.norm_attention\.", ".input_layernorm."),
    (r"\.norm_mlp\.", ".post_attention_layernorm."),
    (r"\.(q)uery\.|\.(k)ey\.|\.(v)alue\.|\.(o)ut\.", r".self_attn.\1\2\3\4_proj."),
    (r"\.(gate|up|down)\.", r".mlp.\1_proj."),
)


def published_names(model: Tokenizer | TokenTransformer) -> dict[str, str]:
    """Our name of every tensor -> its name in the published file."""
    if isinstance(model, TokenTransformer):
        return {name: _renamed(name, _TRANSFORMER) for name in model.state_dict()}
    crossed = list(model.future_encoder.cross)  # ours are called by level, theirs are counted
    names = {}
    for name in model.state_dict():
        counted = re.sub(
            r"^future_encoder\.cross\.(\d+)\.",
            lambda found: f"future_encoder.cross_att_blocks.{crossed.index(found[1])}.",
            name,
        )
        names[name] = _renamed(counted, _TOKENIZER)
    return names


def load_published(
    model: Tokenizer | TokenTransformer, stored: Mapping[str, Tensor], origin: str
) -> None:
    """Fill a model with published weights.

    Args:
        model: Of the published sizes.
        stored: What is in the published file.
        origin: Its name, for messages.

    Raises:
        CheckpointError: The tensors are not those of the model.
    """
    names = published_names(model)
    _check(model, names, stored, origin)
    found = {ours: stored[theirs] for ours, theirs in names.items()}
    model.load_state_dict(found)


def _check(
    model: nn.Module, names: Mapping[str, str], stored: Mapping[str, Tensor], origin: str
) -> None:
    wanted = model.state_dict()
    for ours, theirs in names.items():
        if theirs not in stored:
            raise CheckpointError(f"'{origin}' has no tensor '{theirs}': it holds another model")
        shapes = tuple(stored[theirs].shape), tuple(wanted[ours].shape)
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"'{theirs}' is {shapes[0]} in '{origin}' and {shapes[1]} in the model: the sizes "
                "must be the published ones, size=paper"
            )
    if left := sorted(set(stored) - set(names.values())):
        raise CheckpointError(f"the model has no place for '{left[0]}' of '{origin}'")


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, theirs in rules:
        name = re.sub(pattern, theirs, name)
    return name
