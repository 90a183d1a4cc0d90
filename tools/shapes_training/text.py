"""Tokenizers and text encoders of the small models: CLIP's kind for the U-Nets, T5's for the transformer.

Each word of the grammar is one token. T texts of L tokens of C channels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from itertools import chain
from pathlib import Path
from string import printable

import torch
from jaxtyping import Float, Int
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fourdfy.shapes.grammar import COLOURS, FLOW_MOMENTS, MOMENTS, MOTIONS, SHAPES, VIEWS
from fourdfy.shapes.prompts import MOVES, THINGS

SOLIDS_ONLY = ("wan_text", "wan_vae", "wan")
"""What knows no creatures, and quarters of the period instead of sixteenths."""

TEXT_WIDTH = 64
NUM_TOKENS = 32
"""Of a text, padding included; T5 does not attend to it."""
SPECIAL_PIECES = ("<pad>", "</s>", "<unk>")
START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"


def text_words(part: str) -> tuple[tuple[str, ...], ...]:
    """Colours, things, moves, moments and views that a part knows."""
    if part in SOLIDS_ONLY:
        return COLOURS, SHAPES, MOTIONS, FLOW_MOMENTS, VIEWS
    return COLOURS, THINGS, MOVES, MOMENTS, VIEWS


def grammar_words(part: str) -> tuple[str, ...]:
    """Every word that a text is made of, each once, in order of appearance."""
    texts = ("a", "an", *chain(*text_words(part)))
    return tuple(dict.fromkeys(word for text in texts for word in text.split()))


@lru_cache
def byte_pair_files() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary and merges in which each word of the grammar is one token.

    Any other text falls apart into bytes and pieces of these words.
    """
    letters = [bytes_to_unicode()[byte] for byte in range(256)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in grammar_words("text"):
        # Merges of earlier words come first and have precedence, so the ones a word adds are those
        # that its own leftovers need: earlier words stay whole.
        known = BPE(vocab=_numbered(vocabulary), merges=merges, end_of_word_suffix="</w>")
        pieces = [token.value for token in known.tokenize(word)]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            vocabulary.append(pieces[0])
    return _numbered([*vocabulary, START_TOKEN, END_TOKEN]), merges


def write_tokenizer(folder: Path) -> None:
    """``vocab.json``, ``merges.txt`` and the two settings files of a CLIPTokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = byte_pair_files()
    special = {
        "bos_token": START_TOKEN,
        "eos_token": END_TOKEN,
        "pad_token": END_TOKEN,
        "unk_token": END_TOKEN,
    }
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": NUM_TOKENS, **special}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    for name, text in {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(lines) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }.items():
        (folder / name).write_text(text, encoding="utf-8")


def word_pieces() -> list[tuple[str, float]]:
    """T5's vocabulary and scores in which each word of the grammar is one piece, and so is a comma.

    Any other text falls apart into letters and pieces of these words.
    """
    letters = [("▁", -10.0), *((letter, -10.0) for letter in printable.strip() if letter != ",")]
    words = [*(f"▁{word}" for word in grammar_words("wan_text")), ","]
    return [*((special, 0.0) for special in SPECIAL_PIECES), *((word, -1.0) for word in words), *letters]


def build_tokenizer(part: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a text encoder: text (CLIP's, which ``write_tokenizer`` describes) or wan_text."""
    if part == "wan_text":
        return T5Tokenizer(vocab=word_pieces(), extra_ids=0)
    vocabulary, merges = byte_pair_files()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=NUM_TOKENS)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
) -> tuple[Int[Tensor, "T L"], Int[Tensor, "T L"]]:
    """(ids, 1 where an encoder attends): CLIP reads its padding, and T5 masks it."""
    reads_padding = isinstance(tokenizer, CLIPTokenizer)
    padding = "max_length" if reads_padding else "longest"
    tokens = tokenizer([*texts], padding=padding, truncation=reads_padding, return_tensors="pt")
    ids, own = tokens.input_ids, tokens.attention_mask
    return ids, torch.ones_like(ids) if reads_padding else own


def embed(
    encoder: nn.Module, ids: Int[Tensor, "T L"], attended: Int[Tensor, "T L"]
) -> Float[Tensor, "T L C"]:
    """The last hidden states, zeros where nothing is attended to."""
    return encoder(ids, attention_mask=attended).last_hidden_state * attended[..., None]


def build_encoder(part: str) -> nn.Module:
    """The untrained text encoder, of three layers: text (causal) or wan_text."""
    if part == "wan_text":
        settings = UMT5Config(
            vocab_size=len(word_pieces()),
            d_model=TEXT_WIDTH,
            d_ff=2 * TEXT_WIDTH,
            d_kv=TEXT_WIDTH // 4,
            num_heads=4,
            num_layers=3,
            dropout_rate=0.0,
        )
        return UMT5EncoderModel(settings)
    return CLIPTextModel(_clip_settings())


def _clip_settings() -> CLIPTextConfig:
    vocabulary, _ = byte_pair_files()
    return CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=NUM_TOKENS,
        hidden_act="gelu",
        projection_dim=TEXT_WIDTH,
        bos_token_id=vocabulary[START_TOKEN],
        eos_token_id=vocabulary[END_TOKEN],
        pad_token_id=vocabulary[END_TOKEN],
    )


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}
