"""The small models of the shapes world, all of genuine diffusers and transformers classes.

Images are 64 x 64; the VAE makes 4 channels of 16 x 16 of them. Texts are 32 tokens of TEXT_WIDTH.
B scenes of F frames, L tokens of C channels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet3DConditionModel
from jaxtyping import Float, Int
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fourdfy.priors.mvdream import enable_multi_view_attention
from fourdfy.shapes.grammar import COLOURS, MOMENTS, MOTIONS, SHAPES, VIEWS
from fourdfy.shapes.world import IMAGE_SIZE

TEXT_WIDTH = 64
NUM_TOKENS = 32
LATENT_SIZE = IMAGE_SIZE // 4
NUM_VIEWS = 4
NUM_FRAMES = 8

CLASSES = {
    "text": CLIPTextModel,
    "vae": AutoencoderKL,
    "image": UNet2DConditionModel,
    "multi_view": UNet2DConditionModel,
    "video": UNet3DConditionModel,
}
DENOISERS = ("image", "multi_view", "video")
FOLDERS = {"image": "shapes-image", "multi_view": "shapes-4view", "video": "shapes-video"}

START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"

_UNET = {
    "sample_size": LATENT_SIZE,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "cross_attention_dim": TEXT_WIDTH,
    "norm_num_groups": 16,
}
_IMAGE_UNET = _UNET | {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (64, 96, 128),
    "attention_head_dim": (2, 3, 4),  # diffusers' name for the number of heads; each is 32 wide
    "use_linear_projection": True,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "vae": {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (24, 48, 64),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": IMAGE_SIZE,
        "scaling_factor": 1.0,  # until it is measured
    },
    "image": _IMAGE_UNET,
    # The flattened camera is the class label.
    "multi_view": _IMAGE_UNET
    | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16},
    "video": _UNET
    | {
        "down_block_types": ("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
        "block_out_channels": (48, 96, 112),
        "attention_head_dim": 16,
    },
}


def build(part: str) -> nn.Module:
    """The untrained model of a part: text (three causal transformer layers), vae, or a denoiser."""
    if part == "text":
        return CLIPTextModel(_text_settings())
    model = CLASSES[part](**SETTINGS[part])
    prepare(part, model)
    return model


def prepare(part: str, model: nn.Module) -> None:
    """Add what no checkpoint of ``part`` stores: the four-view model's attention over views."""
    if part == "multi_view":
        enable_multi_view_attention(model, num_views=NUM_VIEWS)


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule. Velocity prediction, as in Stable Diffusion 2.1: x_0 stays well
    determined where an image is nearly all noise, which is where distillation starts."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def predict_velocity(
    part: str,
    unet: nn.Module,
    noisy: Float[Tensor, "B F 4 h w"],
    timesteps: Int[Tensor, "B"],
    text: Float[Tensor, "B L C"],
    cameras: Float[Tensor, "B F 16"] | None = None,
) -> Float[Tensor, "B F 4 h w"]:
    """The denoiser's output for whole scenes, in the layout that its class requires."""
    if part == "video":
        return unet(noisy.transpose(1, 2), timesteps, text).sample.transpose(1, 2)
    frames = noisy.shape[1]
    extra = {} if cameras is None else {"class_labels": cameras.flatten(0, 1)}
    flat = noisy.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    text = text.repeat_interleave(frames, dim=0)
    predicted = unet(flat, timesteps.repeat_interleave(frames), text, **extra).sample
    return predicted.unflatten(0, noisy.shape[:2])


# ---------------------------------------------------------------------------------------------
# Text


def grammar_words() -> tuple[str, ...]:
    """Every word that a text of the world is made of, each once, in order of appearance."""
    texts = ("a", "an", *COLOURS, *SHAPES, *MOTIONS, *MOMENTS, *VIEWS)
    return tuple(dict.fromkeys(word for text in texts for word in text.split()))


def byte_pair_files() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary and merges in which each word of the grammar is one token.

    Any other text falls apart into bytes and pieces of these words.
    """
    letters = [bytes_to_unicode()[byte] for byte in range(256)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in grammar_words():
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


def build_tokenizer() -> CLIPTokenizer:
    """The tokenizer that ``write_tokenizer`` describes."""
    vocabulary, merges = byte_pair_files()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=NUM_TOKENS)


def _text_settings() -> CLIPTextConfig:
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
