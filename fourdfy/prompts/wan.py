"""Prompts for Wan, whose text encoder is UMT5: any language that it knows."""

from __future__ import annotations

import html
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fourdfy.config import file_path
from fourdfy.priors.frozen import load_text_encoder, load_tokenizer
from fourdfy.prompts.base import PromptProcessor, TextEncoder, model_identity, tokenize
from fourdfy.registry import register

MAX_TOKENS = 512
TOKENIZER = "T5Tokenizer"


@register("wan-prompt-processor")
class WanPromptProcessor(PromptProcessor):
    """The last hidden states of a text's own tokens, then zeros: the transformer attends to these as well."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PromptProcessor.Config):
        pretrained_model_name_or_path: str = file_path("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
        negative_prompt: str = (
            "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, "
            "static, overall gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, "
            "extra fingers, poorly drawn hands, poorly drawn faces, deformed, disfigured, misshapen limbs, "
            "fused fingers, still picture, messy background, three legs, many people in the background, "
            "walking backwards"
        )
        """The authors' own by default, which leads away from stillness and from limbs too many."""

    def load_encoder(self, folder: Path, device: torch.device) -> TextEncoder:
        # In float32 it has 23 GB, which a GPU need not have.
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        tokenizer, encoder = load_text_encoder(folder, device, "UMT5EncoderModel", TOKENIZER, dtype)

        def encode(text: str) -> Float[Tensor, "L C"]:
            # Padding would be masked here, so it is left out.
            ids = tokenizer(_cleaned(text), return_tensors="pt").input_ids
            states = encoder(ids.to(device)).last_hidden_state[0]
            return F.pad(states, (0, 0, 0, MAX_TOKENS - len(states)))

        def encode_all(texts: list[str]) -> Float[Tensor, "T L C"]:
            _check_length(tokenizer, texts)
            return torch.stack([encode(text) for text in texts])

        return encode_all

    def check_length(self, texts: Collection[str], folder: Path) -> None:
        _check_length(load_tokenizer(folder, TOKENIZER), texts)

    def identity(self, folder: Path) -> str:
        return f"{model_identity(folder)} {MAX_TOKENS} tokens"


def _check_length(tokenizer: object, texts: Collection[str]) -> None:
    for text in texts:
        tokenize(tokenizer, _cleaned(text), MAX_TOKENS)


def _cleaned(text: str) -> str:
    """As the model's own pipeline reads it."""
    return " ".join(html.unescape(html.unescape(text)).split())
