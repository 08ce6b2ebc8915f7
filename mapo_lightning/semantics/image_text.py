"""Any other image-text family of transformers: a window is shown to it as images, oldest first.

Question and frames go through the family's own processor class and chat template. Processors that
also take videos want torchvision for them; here they do without their video half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mapo_lightning.semantics.phrase import PROMPT
from mapo_lightning.semantics.qwen import LoadedModel
from mapo_lightning.types import DescriberError, Frames

# Switches that cut an image into tiles, each as expensive as an image. Families that have them do
# without for the frames of a video, and so does this file.
_TILES = ("do_image_splitting", "crop_to_patches", "do_pan_and_scan")
_TRIAL = np.full((2, 64, 64, 3), 127, np.uint8)


class ImageTextModel(LoadedModel):
    """A model of any family with its processor, in memory; its first question is a trial.

    Raises:
        DescriberError: The model is not available, or its family cannot be asked in this way.
    """

    def _prepare(self, source: str, where: dict[str, Any]) -> None:
        try:
            self.processor = _processor(type(self.model.config), self.images, self.tokenizer, where)
            self.whole = {name: False for name in _TILES if hasattr(self.images, name)}
            if self.model.config.is_encoder_decoder:
                raise ValueError("encoder and decoder are apart")
            self.answer([_TRIAL], 1)
        except Exception as error:  # whatever a family's own code may raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DescriberError(
                f"'{source}' is a {self.model.config.model_type}, which cannot be asked about "
                f"frames in this process ({reason}). Choose another model with vlm.model=..., or "
                "serve it and use vlm=openai_server"
            ) from error

    def inputs(self, clips: Sequence[Frames]) -> Any:
        """Arguments of ``generate`` about windows of one size, on the model's device."""
        parts = [{"type": "image"}] * len(clips[0]) + [{"type": "text", "text": PROMPT}]
        # Not the processor's method of this name: some look into their video half first.
        question = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}],
            chat_template=self.processor.chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
        begin = self.tokenizer.bos_token
        made = self.processor(
            text=[question] * len(clips),
            images=[[Image.fromarray(frame) for frame in clip] for clip in clips],
            add_special_tokens=not (begin and question.startswith(begin)),
            return_tensors="pt",
            **self.whole,
        )
        return made.to(self.device, self.model.dtype)


def _processor(family: type, images: Any, tokenizer: Any, where: dict[str, Any]) -> Any:
    """The family's processor, made of its parts; a part for videos is left out.

    Raises:
        ValueError: The family has no processor class, or its model no chat template.
    """
    from transformers import PROCESSOR_MAPPING

    if family not in PROCESSOR_MAPPING:
        raise ValueError("transformers has no processor class for it")
    complete: Any = PROCESSOR_MAPPING[family]

    class WithoutVideo(complete):  # type: ignore[misc]
        """Takes None for the part that needs torchvision."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    WithoutVideo.__name__ = complete.__name__
    settings, _ = complete.get_processor_dict(
        **{name: value for name, value in where.items() if name != "trust_remote_code"}
    )
    parts = {"image_processor": images, "tokenizer": tokenizer}
    found = WithoutVideo.from_args_and_dict(
        [parts.get(name) for name in complete.get_attributes()], settings
    )
    found.chat_template = found.chat_template or tokenizer.chat_template
    if not found.chat_template:
        raise ValueError("it has no chat template")
    return found
