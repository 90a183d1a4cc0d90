"""More of ``tests.tiny_models``: video and image models that are transformers or read several texts.

``save_cogvideox(folder)``, ``save_ltx(folder)``, ``save_sdxl(folder)`` and ``save_sd3(folder)`` write a
diffusers folder and return it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTXVideoTransformer3DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from tests.tiny_models import (
    SAMPLE_SIZE,
    TEXT_WIDTH,
    randomise,
    save_clip_text,
    save_common,
    unet_config,
    unigram_pieces,
)

LTX_CHANNELS = 16
LTX_ENCODERS = {
    "0.9.0": {"block_out_channels": (8,) * 4},
    "0.9.5": {
        "block_out_channels": (8, 8, 16, 16, 16),
        "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
        "spatio_temporal_scaling": (True,) * 4,
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "timestep_conditioning": True,
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    },
}
"""Versions, with what differs in their VAE."""


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
    randomise(transformer).save_pretrained(folder / "transformer")
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.7 if rotary else 1.15258426,
    )
    randomise(vae).save_pretrained(folder / "vae")
    CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0 if rotary else 3.0,
        timestep_spacing="trailing",
        clip_sample=False,
    ).save_pretrained(folder / "scheduler")
    save_t5_text(folder)
    return folder


def save_ltx(folder: Path, seed: int = 0, version: str = "0.9.0") -> Path:
    """LTX-Video, its VAE of version 0.9.0 or 0.9.5: transformer, VAE of the genuine strides, T5 encoder."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    transformer = LTXVideoTransformer3DModel(
        in_channels=LTX_CHANNELS,
        out_channels=LTX_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=TEXT_WIDTH,
    )
    randomise(transformer).save_pretrained(folder / "transformer")
    vae = AutoencoderKLLTXVideo(
        latent_channels=LTX_CHANNELS,
        decoder_block_out_channels=(8,) * 4,
        decoder_layers_per_block=(1,) * 5,
        layers_per_block=(1,) * 5,
        **LTX_ENCODERS[version],
    )
    # Mean and spread of latents are weights, which the config does not hold.
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2.0)
    randomise(vae).save_pretrained(folder / "vae")
    by_tokens = {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024, "max_image_seq_len": 4096}
    levels = {"use_dynamic_shifting": True, "shift_terminal": 0.1, **by_tokens} if version == "0.9.0" else {}
    FlowMatchEulerDiscreteScheduler(**levels).save_pretrained(folder / "scheduler")
    save_t5_text(folder)
    return folder


def save_sdxl(folder: Path, seed: int = 0) -> Path:
    """Stable Diffusion XL: a U-Net that is told sizes and a vector for the text, and two CLIPs."""
    torch.manual_seed(seed)
    save_common(folder, "StableDiffusionXLPipeline", "UNet2DConditionModel", "epsilon")
    save_clip_text(folder, "_2", CLIPTextModelWithProjection)
    config = unet_config(SAMPLE_SIZE) | {"cross_attention_dim": 2 * TEXT_WIDTH}
    config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    config |= {"projection_class_embeddings_input_dim": 6 * 8 + TEXT_WIDTH}
    randomise(UNet2DConditionModel(**config)).save_pretrained(folder / "unet")
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    ).save_pretrained(folder / "scheduler")
    return folder


def save_sd3(folder: Path, seed: int = 0) -> Path:
    """Stable Diffusion 3.5: a flow transformer, a VAE with a shift, two CLIPs and T5."""
    torch.manual_seed(seed)
    for number in ("", "_2"):
        save_clip_text(folder, number, CLIPTextModelWithProjection)
    save_t5_text(folder, "_3", width=3 * TEXT_WIDTH)
    transformer = SD3Transformer2DModel(
        sample_size=SAMPLE_SIZE,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * TEXT_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    randomise(transformer).save_pretrained(folder / "transformer")
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    return folder


def save_t5_text(folder: Path, number: str = "", width: int = TEXT_WIDTH) -> None:
    """The parts ``tokenizer`` and ``text_encoder``, with ``number`` behind their names."""
    pieces = unigram_pieces()
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder / f"tokenizer{number}")
    config = T5Config(vocab_size=len(pieces), d_model=width, d_ff=32, d_kv=8, num_heads=2, num_layers=2)
    T5EncoderModel(config).save_pretrained(folder / f"text_encoder{number}")
