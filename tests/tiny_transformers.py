"""More of ``tests.tiny_models``: video and image models that are transformers or read several texts.

``save_cogvideox(folder)`` writes a diffusers folder and returns it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from tests.tiny_models import TEXT_WIDTH, _randomise, unigram_pieces


def save_cogvideox(folder: Path, seed: int = 0, rotary: bool = False) -> Path:
    """CogVideoX-2B, or -5B if ``rotary``: transformer, causal VAE of the genuine strides, T5 encoder."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        time_embed_dim=8,
        text_embed_dim=TEXT_WIDTH,
        num_layers=2,
        sample_width=6,
        sample_height=4,
        sample_frames=9,
        use_rotary_positional_embeddings=rotary,
    )
    _randomise(transformer).save_pretrained(folder / "transformer")
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.7 if rotary else 1.15258426,
    )
    _randomise(vae).save_pretrained(folder / "vae")
    CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0 if rotary else 3.0,
        timestep_spacing="trailing",
        clip_sample=False,
    ).save_pretrained(folder / "scheduler")
    save_t5_text(folder)
    return folder


def save_t5_text(folder: Path, tokenizer: str = "tokenizer", text_encoder: str = "text_encoder") -> None:
    """The parts ``tokenizer`` and ``text_encoder``, or others."""
    pieces = unigram_pieces()
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder / tokenizer)
    config = T5Config(vocab_size=len(pieces), d_model=TEXT_WIDTH, d_ff=32, d_kv=8, num_heads=2, num_layers=2)
    T5EncoderModel(config).save_pretrained(folder / text_encoder)
