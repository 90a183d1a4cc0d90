"""Prompts for VideoCrafter2, whose text encoder is OpenCLIP's without its last block.

A folder made from the original checkpoint holds it as a ``CLIPTextModel`` with one layer fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

from fourdfy.config import file_path
from fourdfy.prompts.stable_diffusion import StableDiffusionPromptProcessor
from fourdfy.registry import register


@register("videocrafter-prompt-processor")
class VideoCrafterPromptProcessor(StableDiffusionPromptProcessor):
    @dataclass(frozen=True, kw_only=True)
    class Config(StableDiffusionPromptProcessor.Config):
        pretrained_model_name_or_path: str = file_path("VideoCrafter/VideoCrafter2")
