"""Prompts for Stable Diffusion and MVDream: the embeddings of a CLIP text encoder."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.config_files import ConfigError
from fourdfy.priors.frozen import load_text_encoder, load_tokenizer
from fourdfy.priors.model_folder import read_description, shown
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
        max_length = _max_length(tokenizer, folder)

        def encode(texts: list[str]) -> Float[Tensor, "T L C"]:
            ids = [tokenize(tokenizer, text, max_length) for text in texts]
            # There is no attention mask, because these models were trained with the padding visible.
            return encoder(torch.tensor(ids, device=device)).last_hidden_state

        return encode

    def check_length(self, texts: Collection[str], folder: Path) -> None:
        tokenizer = load_tokenizer(folder)
        for text in texts:
            tokenize(tokenizer, text, _max_length(tokenizer, folder))


def _max_length(tokenizer: Any, folder: Path) -> int:
    """Tokens that tokenizer and encoder both take, the two ends of a text included."""
    encoder = read_description(folder, "text_encoder")
    lengths = tokenizer.model_max_length, encoder.get("max_position_embeddings", 77)
    if not all(isinstance(length, int) and length > 2 for length in lengths):
        raise ConfigError(
            f"{folder}: tokenizer and text_encoder state model_max_length={shown(lengths[0])} and "
            f"max_position_embeddings={shown(lengths[1])}; expected whole numbers"
        )
    return min(lengths)
