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
        length = max_length(tokenizer, folder)

        def encode(texts: list[str]) -> Float[Tensor, "T L C"]:
            ids = [tokenize(tokenizer, text, length) for text in texts]
            # There is no attention mask, because these models were trained with the padding visible.
            return encoder(torch.tensor(ids, device=device)).last_hidden_state

        return encode

    def check_length(self, texts: Collection[str], folder: Path) -> None:
        tokenizer = load_tokenizer(folder)
        for text in texts:
            tokenize(tokenizer, text, max_length(tokenizer, folder))


def max_length(tokenizer: Any, folder: Path, number: str = "") -> int:
    """Tokens that tokenizer and encoder both take, the two ends of a text included.

    Args:
        number: the end of both parts' names: nothing, ``_2`` or ``_3``.
    """
    encoder = read_description(folder, f"text_encoder{number}")
    lengths = tokenizer.model_max_length, encoder.get("max_position_embeddings", 77)
    if not all(isinstance(length, int) and length > 2 for length in lengths):
        raise ConfigError(
            f"{folder}: tokenizer{number} and text_encoder{number} state "
            f"model_max_length={shown(lengths[0])} and max_position_embeddings={shown(lengths[1])}; expected "
            "whole numbers"
        )
    return min(lengths)
