"""Prompts for Stable Diffusion 3 and 3.5, whose text encoders are two CLIPs and T5."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fourdfy.config import file_path
from fourdfy.priors.pooled import with_pooled
from fourdfy.prompts.base import TextEncoder
from fourdfy.prompts.clip_pair import POOLED, check_clip_length, load_clip_pair
from fourdfy.prompts.t5 import T5PromptProcessor
from fourdfy.registry import register


@register("sd3-prompt-processor")
class StableDiffusion3PromptProcessor(T5PromptProcessor):
    """The last hidden states but one of both CLIPs, then T5's, all with their padding, and the CLIPs' vectors
    for the whole text in a last row. The CLIPs bound the length of a text."""

    number: ClassVar[str] = "_3"
    max_tokens: ClassVar[int] = 256

    @dataclass(frozen=True, kw_only=True)
    class Config(T5PromptProcessor.Config):
        parts: ClassVar[tuple[str, ...]] = tuple(
            f"{part}{number}" for number in ("", "_2", "_3") for part in ("tokenizer", "text_encoder")
        )

        pretrained_model_name_or_path: str = file_path("stabilityai/stable-diffusion-3.5-medium")

    def load_encoder(self, folder: Path, device: torch.device) -> TextEncoder:
        pair, t5 = load_clip_pair(folder, device, POOLED, POOLED), super().load_encoder(folder, device)

        def encode(texts: list[str]) -> Float[Tensor, "T L C"]:
            states, pooled = pair(texts)
            others = t5(texts)
            states = F.pad(states, (0, others.shape[-1] - states.shape[-1]))
            return with_pooled(torch.cat([states, others], dim=1), pooled)

        return encode

    def check_length(self, texts: Collection[str], folder: Path) -> None:
        check_clip_length(texts, folder)
        super().check_length(texts, folder)
