"""Prompts for models whose text encoder is T5 or one of its kin."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fourdfy.priors.frozen import load_text_encoder, load_tokenizer
from fourdfy.prompts.base import PromptProcessor, TextEncoder, tokenize

TOKENIZER = "T5Tokenizer"


class T5PromptProcessor(PromptProcessor):
    """The last hidden states of a text's tokens, and what a model was trained to see behind them."""

    encoder_class: ClassVar[str] = "T5EncoderModel"
    """Of the encoder, in transformers."""
    number: ClassVar[str] = ""
    """The end of the names of its parts: nothing, ``_2`` or ``_3``."""
    max_tokens: ClassVar[int]
    """Rows of an embedding."""
    encodes_padding: ClassVar[bool] = True
    """Whether padding is given to the encoder, without a mask: a text's own states depend on it then."""
    keeps_padding: ClassVar[bool] = True
    """Whether the states of the padding stay; if not, zeros are in their place."""

    def load_encoder(self, folder: Path, device: torch.device) -> TextEncoder:
        # In float32 the usual ones have 19 GB or more, which a GPU need not have.
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        tokenizer, encoder = load_text_encoder(
            folder, device, self.encoder_class, TOKENIZER, dtype, self.number
        )

        def encode(text: str, padded: list[int]) -> Float[Tensor, "L C"]:
            length = len(tokenizer(self.cleaned(text)).input_ids)
            ids = padded if self.encodes_padding else padded[:length]
            states = encoder(torch.tensor([ids], device=device)).last_hidden_state[0]
            kept = states if self.keeps_padding else states[:length]
            return F.pad(kept, (0, 0, 0, self.max_tokens - len(kept)))

        def encode_all(texts: list[str]) -> Float[Tensor, "T L C"]:
            rows = self._tokens(tokenizer, texts)  # all are checked before the first one takes its time
            return torch.stack([encode(*row) for row in zip(texts, rows, strict=True)])

        return encode_all

    def cleaned(self, text: str) -> str:
        """The text as the model's own pipeline reads it."""
        return text

    def check_length(self, texts: Collection[str], folder: Path) -> None:
        self._tokens(load_tokenizer(folder, TOKENIZER, self.number), texts)

    def _tokens(self, tokenizer: Any, texts: Collection[str]) -> list[list[int]]:
        return [tokenize(tokenizer, self.cleaned(text), self.max_tokens) for text in texts]

    def identity(self, folder: Path) -> str:
        return f"{super().identity(folder)} {self.max_tokens} tokens"
