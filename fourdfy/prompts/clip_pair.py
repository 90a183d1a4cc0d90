"""Two CLIP text encoders side by side, as Stable Diffusion XL and 3 read a text.

T texts, L tokens, C channels of both, P channels of the vectors for a whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.priors.frozen import load_text_encoder, load_tokenizer
from fourdfy.prompts.base import tokenize
from fourdfy.prompts.stable_diffusion import max_length

NUMBERS = ("", "_2")
"""Ends of the parts' names."""
POOLED = "CLIPTextModelWithProjection"
"""The class of an encoder whose vector for the whole text counts."""


def load_clip_pair(
    folder: Path, device: torch.device, *classes: str
) -> Callable[[list[str]], tuple[Float[Tensor, "T L C"], Float[Tensor, "T P"]]]:
    """A function that gives texts' last hidden states but one, and their vectors.

    Args:
        classes: of the encoders, in transformers.
    """
    pair = [
        (*load_text_encoder(folder, device, class_name, number=number), number)
        for number, class_name in zip(NUMBERS, classes, strict=True)
    ]

    def encode(texts: list[str]) -> tuple[Float[Tensor, "T L C"], Float[Tensor, "T P"]]:
        states, pooled = [], []
        for tokenizer, encoder, number in pair:
            length = max_length(tokenizer, folder, number)
            ids = torch.tensor([tokenize(tokenizer, text, length) for text in texts], device=device)
            output = encoder(ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled += [output.text_embeds] if "text_embeds" in output else []
        return torch.cat(states, dim=-1), torch.cat(pooled, dim=-1)

    return encode


def check_clip_length(texts: Collection[str], folder: Path) -> None:
    """See ``PromptProcessor.check_length``."""
    for number in NUMBERS:
        tokenizer = load_tokenizer(folder, number=number)
        for text in texts:
            tokenize(tokenizer, text, max_length(tokenizer, folder, number))
