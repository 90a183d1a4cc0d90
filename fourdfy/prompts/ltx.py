"""Prompts for LTX-Video, whose text encoder is T5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fourdfy.config import file_path
from fourdfy.prompts.t5 import T5PromptProcessor
from fourdfy.registry import register


@register("ltx-prompt-processor")
class LTXPromptProcessor(T5PromptProcessor):
    """The last hidden states of a text's own tokens, which T5 sees among padding, then zeros: the transformer
    is told not to attend to these."""

    max_tokens: ClassVar[int] = 128
    keeps_padding: ClassVar[bool] = False

    @dataclass(frozen=True, kw_only=True)
    class Config(T5PromptProcessor.Config):
        pretrained_model_name_or_path: str = file_path("Lightricks/LTX-Video")
        negative_prompt: str = "worst quality, inconsistent motion, blurry, jittery, distorted"
        """The authors' own by default."""
