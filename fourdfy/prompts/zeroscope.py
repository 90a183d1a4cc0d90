"""Prompts for ZeroScope, whose text encoder is Stable Diffusion 2.1's."""

from __future__ import annotations

from dataclasses import dataclass

from fourdfy.config import file_path
from fourdfy.prompts.stable_diffusion import StableDiffusionPromptProcessor
from fourdfy.registry import register


@register("zeroscope-prompt-processor")
class ZeroScopePromptProcessor(StableDiffusionPromptProcessor):
    @dataclass(frozen=True, kw_only=True)
    class Config(StableDiffusionPromptProcessor.Config):
        pretrained_model_name_or_path: str = file_path("cerspense/zeroscope_v2_576w")
