"""Prompts for Wan, whose text encoder is UMT5: any language that it knows."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import ClassVar

from fourdfy.config import file_path
from fourdfy.prompts.t5 import T5PromptProcessor
from fourdfy.registry import register


@register("wan-prompt-processor")
class WanPromptProcessor(T5PromptProcessor):
    """The last hidden states of a text's own tokens, then zeros: the transformer attends to these as well."""

    encoder_class: ClassVar[str] = "UMT5EncoderModel"
    max_tokens: ClassVar[int] = 512
    encodes_padding: ClassVar[bool] = False
    keeps_padding: ClassVar[bool] = False

    @dataclass(frozen=True, kw_only=True)
    class Config(T5PromptProcessor.Config):
        pretrained_model_name_or_path: str = file_path("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
        negative_prompt: str = (
            "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, "
            "static, overall gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, "
            "extra fingers, poorly drawn hands, poorly drawn faces, deformed, disfigured, misshapen limbs, "
            "fused fingers, still picture, messy background, three legs, many people in the background, "
            "walking backwards"
        )
        """The authors' own by default, which leads away from stillness and from superfluous limbs."""

    def cleaned(self, text: str) -> str:
        return " ".join(html.unescape(html.unescape(text)).split())
