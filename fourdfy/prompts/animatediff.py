"""Prompts for AnimateDiff, whose text encoder is Stable Diffusion 1.5's."""

from __future__ import annotations

from dataclasses import dataclass

from fourdfy.config import file_path
from fourdfy.prompts.stable_diffusion import StableDiffusionPromptProcessor
from fourdfy.registry import register


@register("animatediff-prompt-processor")
class AnimateDiffPromptProcessor(StableDiffusionPromptProcessor):
    @dataclass(frozen=True, kw_only=True)
    class Config(StableDiffusionPromptProcessor.Config):
        pretrained_model_name_or_path: str = file_path("stable-diffusion-v1-5/stable-diffusion-v1-5")
