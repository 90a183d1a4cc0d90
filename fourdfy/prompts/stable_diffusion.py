"""Prompts for Stable Diffusion and MVDream: the states of a CLIP text encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.diffusion.frozen import load_text_encoder
from fourdfy.prompts.base import PromptProcessor, TextEncoder, tokenize
from fourdfy.registry import register


@register("stable-diffusion-prompt-processor")
class StableDiffusionPromptProcessor(PromptProcessor):
    """The last hidden states of all tokens, padding included: the U-Net attends to every one."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PromptProcessor.Config):
        pass

    def load_encoder(self, folder: Path, device: torch.device) -> TextEncoder:
        tokenizer, encoder = load_text_encoder(folder, device)
        max_length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)

        def encode(texts: list[str]) -> Float[Tensor, "T L C"]:
            ids = [tokenize(tokenizer, text, max_length) for text in texts]
            # No attention mask: these models were trained with the padding visible.
            return encoder(torch.tensor(ids, device=device)).last_hidden_state

        return encode
