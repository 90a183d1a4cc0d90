"""The small models of the shapes world, all of genuine diffusers and transformers classes.

Images are 64 x 64; the VAE makes 4 channels of 16 x 16 of them. Texts are 32 tokens of TEXT_WIDTH.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from fourdfy.shapes.grammar import grammar_words
from fourdfy.shapes.world import IMAGE_SIZE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet3DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

TEXT_WIDTH = 64
NUM_TOKENS = 32
LATENT_SIZE = IMAGE_SIZE // 4
NUM_VIEWS = 4
NUM_FRAMES = 8
NUM_TRAIN_TIMESTEPS = 1000

DENOISERS = ("image", "multi_view", "video")
FOLDERS = {"image": "shapes-image", "multi_view": "shapes-4view", "video": "shapes-video"}

_START, _END = "<|startoftext|>", "<|endoftext|>"
_SCHEDULE = {
    "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def byte_pair_files() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary and merges in which each word of the grammar is one token.

    Any other text falls apart into bytes and pieces of these words.
    """
    letters = _byte_letters()
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in grammar_words():
        # Merges of earlier words come first and have precedence, so the ones a word adds are those
        # that its own leftovers need: earlier words stay whole.
        pieces = _apply_merges([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            vocabulary.append(pieces[0])
    tokens = [*dict.fromkeys(vocabulary), _START, _END]
    return {token: index for index, token in enumerate(tokens)}, merges


def write_tokenizer(folder: Path) -> None:
    """``vocab.json``, ``merges.txt`` and the two settings files of a CLIPTokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = byte_pair_files()
    special = {"bos_token": _START, "eos_token": _END, "pad_token": _END, "unk_token": _END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": NUM_TOKENS, **special}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def build_tokenizer() -> CLIPTokenizer:
    """The tokenizer that ``write_tokenizer`` describes."""
    from transformers import CLIPTokenizer

    vocabulary, merges = byte_pair_files()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=NUM_TOKENS)


def build_text_encoder() -> CLIPTextModel:
    """Three causal transformer layers; untrained."""
    from transformers import CLIPTextConfig, CLIPTextModel

    vocabulary, _ = byte_pair_files()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=NUM_TOKENS,
            hidden_act="gelu",
            projection_dim=TEXT_WIDTH,
            bos_token_id=vocabulary[_START],
            eos_token_id=vocabulary[_END],
            pad_token_id=vocabulary[_END],
        )
    )


def build_vae() -> AutoencoderKL:
    """64 x 64 x 3 to 16 x 16 x 4; untrained, with a scaling factor of 1 until it is measured."""
    from diffusers import AutoencoderKL

    channels = (24, 48, 64)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
    )


def build_unet(part: str) -> UNet2DConditionModel | UNet3DConditionModel:
    """The denoiser of ``part`` (image, multi_view, video); untrained.

    The four-view model takes a flattened camera as class label; its self-attention has to be spread
    over the views with ``fourdfy.priors.mvdream.enable_multi_view_attention``.
    """
    from diffusers import UNet2DConditionModel, UNet3DConditionModel

    common = {
        "sample_size": LATENT_SIZE,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "cross_attention_dim": TEXT_WIDTH,
    }
    if part == "video":
        return UNet3DConditionModel(
            down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
            block_out_channels=(48, 96, 112),
            norm_num_groups=16,
            attention_head_dim=16,
            **common,
        )
    camera = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16}
    return UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 96, 128),
        norm_num_groups=16,
        attention_head_dim=(2, 3, 4),  # diffusers' name for the number of heads; each is 32 wide
        use_linear_projection=True,
        **(camera if part == "multi_view" else {}),
        **common,
    )


def prepare_unet(part: str, unet: UNet2DConditionModel | UNet3DConditionModel) -> None:
    """What no checkpoint of ``part`` stores: the four-view model's attention over views."""
    if part == "multi_view":
        from fourdfy.priors.mvdream import enable_multi_view_attention

        enable_multi_view_attention(unet, num_views=NUM_VIEWS)


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule. Velocity prediction, as in Stable Diffusion 2.1: x_0 stays well
    determined where an image is nearly all noise, which is where distillation starts."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(**_SCHEDULE)


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of the bytes they stand for."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: chr(byte) for byte in printable}
    stand_in |= {byte: chr(256 + k) for k, byte in enumerate(others)}
    return [stand_in[byte] for byte in range(256)]


def _apply_merges(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    rank = {pair: index for index, pair in enumerate(merges)}
    while len(pieces) > 1:
        at = min(range(len(pieces) - 1), key=lambda k: rank.get((pieces[k], pieces[k + 1]), len(merges)))
        if (pieces[at], pieces[at + 1]) not in rank:
            break
        pieces = [*pieces[:at], pieces[at] + pieces[at + 1], *pieces[at + 2 :]]
    return pieces
