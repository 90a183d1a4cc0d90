"""Prompts for CogVideoX, whose text encoder is T5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fourdfy.config import file_path
from fourdfy.prompts.t5 import T5PromptProcessor
from fourdfy.registry import register


@register("cogvideox-prompt-processor")
class CogVideoXPromptProcessor(T5PromptProcessor):
    """The last hidden states of all tokens, padding included: the transformer attends to every one."""

    max_tokens: ClassVar[int] = 226

    @dataclass(frozen=True, kw_only=True)
    class Config(T5PromptProcessor.Config):
        pretrained_model_name_or_path: str = file_path("zai-org/CogVideoX-2b")
