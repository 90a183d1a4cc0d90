"""Prompts for Stable Diffusion XL, whose text encoders are two CLIPs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.config import file_path
from fourdfy.priors.pooled import with_pooled
from fourdfy.prompts.base import PromptProcessor, TextEncoder
from fourdfy.prompts.clip_pair import POOLED, check_clip_length, load_clip_pair
from fourdfy.registry import register


@register("sdxl-prompt-processor")
class StableDiffusionXLPromptProcessor(PromptProcessor):
    """The last hidden states but one of both encoders, padding included, and the second one's vector for the
    whole text in a last row. An empty text is zeros, as in training."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PromptProcessor.Config):
        parts: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")

        pretrained_model_name_or_path: str = file_path("stabilityai/stable-diffusion-xl-base-1.0")

    def load_encoder(self, folder: Path, device: torch.device) -> TextEncoder:
        pair = load_clip_pair(folder, device, "CLIPTextModel", POOLED)

        def encode(texts: list[str]) -> Float[Tensor, "T L C"]:
            given = torch.tensor([bool(text) for text in texts], device=device)
            return with_pooled(*pair(texts)) * given[:, None, None]

        return encode

    def check_length(self, texts: Collection[str], folder: Path) -> None:
        check_clip_length(texts, folder)
