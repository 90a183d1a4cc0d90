"""The small models of the shapes world, all of genuine diffusers and transformers classes.

Images are 64 x 64. The U-Nets' VAE makes 4 channels of 16 x 16 of each, and the transformer's 8 channels of
5 x 16 x 16 of a clip of 17. B scenes of F frames, latents with the axes S, L tokens of C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from jaxtyping import Float, Real
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import CLIPTextModel, UMT5EncoderModel

from fourdfy.priors.base import DDPMSchedule, FlowSchedule, NoiseSchedule
from fourdfy.priors.causal_vae import STRIDE, wan_moments
from fourdfy.priors.mvdream import enable_multi_view_attention
from fourdfy.prompts.wan import WanPromptProcessor
from fourdfy.shapes.world import IMAGE_SIZE
from tools.shapes_training.text import TEXT_WIDTH, build_encoder

LATENT_SIZE = IMAGE_SIZE // 4
NUM_VIEWS = 4
FRAMES = {"vae": 1, "image": 1, "multi_view": NUM_VIEWS, "video": 8, "wan_vae": 17, "wan": 17}
WAN_CHANNELS = 8

CLASSES = {
    "text": CLIPTextModel,
    "vae": AutoencoderKL,
    "image": UNet2DConditionModel,
    "multi_view": UNet2DConditionModel,
    "video": UNet3DConditionModel,
    "wan_text": UMT5EncoderModel,
    "wan_vae": AutoencoderKLWan,
    "wan": WanTransformer3DModel,
}
TEXTS, VAES, CLIPS = ("text", "wan_text"), ("vae", "wan_vae"), ("video", "wan_vae", "wan")
"""Text encoders, VAEs, and what takes a whole period at once."""
DENOISERS = ("image", "multi_view", "video", "wan")
FOLDERS = {
    "image": "shapes-image",
    "multi_view": "shapes-4view",
    "video": "shapes-video",
    "wan": "shapes-wan",
}

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
        "block_out_channels": (32, 64, 64),
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
    # Its encoder is narrow, since distillation on a CPU takes gradients through it.
    "wan_vae": {
        "base_dim": 16,
        "decoder_base_dim": 24,
        "z_dim": WAN_CHANNELS,
        "dim_mult": [1, 2, 4],
        "num_res_blocks": 1,
        "temperal_downsample": [True, True],
        "scale_factor_spatial": 4,
        "latents_mean": [0.0] * WAN_CHANNELS,  # until they are measured
        "latents_std": [1.0] * WAN_CHANNELS,
    },
    "wan": {
        "num_attention_heads": 8,
        "attention_head_dim": 32,
        "in_channels": WAN_CHANNELS,
        "out_channels": WAN_CHANNELS,
        "text_dim": TEXT_WIDTH,
        "ffn_dim": 1024,
        "num_layers": 7,
    },
}
MEASURED = {"vae": ("scaling_factor",), "wan_vae": ("latents_mean", "latents_std")}
"""Settings that are known after training."""


def needs(part: str) -> tuple[str, str]:
    """The text encoder and the VAE of a denoiser."""
    return ("wan_text", "wan_vae") if part == "wan" else ("text", "vae")


def latent_shape(part: str) -> tuple[int, ...]:
    """A scene's latents: frames before channels for the U-Nets, behind them for the transformer."""
    if part in ("wan", "wan_vae"):
        return WAN_CHANNELS, 1 + FRAMES[part] // STRIDE, LATENT_SIZE, LATENT_SIZE
    return FRAMES[part], 4, LATENT_SIZE, LATENT_SIZE


def build(part: str) -> nn.Module:
    """The untrained model of a part: a text encoder, a VAE or a denoiser."""
    if part in TEXTS:
        return build_encoder(part)
    model = CLASSES[part](**SETTINGS[part])
    prepare(part, model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = (
                0.0  # diffusers drops a tenth in its convolutions over time; small models have no excess
            )
    for block in getattr(model, "blocks", ()):
        # Sharp enough that a text's words stand out among 500 rows of zeros from the first step on.
        nn.init.constant_(block.attn2.norm_q.weight, 2.0)
        nn.init.constant_(block.attn2.norm_k.weight, 2.0)
    return model


def prepare(part: str, model: nn.Module) -> None:
    """Add what no checkpoint of ``part`` stores: the four-view model's attention over views."""
    if part == "multi_view":
        enable_multi_view_attention(model, num_views=NUM_VIEWS)


def build_scheduler(part: str) -> DDIMScheduler | UniPCMultistepScheduler:
    """Wan's rectified flow, or Stable Diffusion's noise schedule with velocity prediction, as in Stable
    Diffusion 2.1: x_0 stays well determined where an image is nearly all noise, where distillation starts."""
    if part == "wan":
        return UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
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


def noise_schedule(part: str, device: torch.device) -> NoiseSchedule:
    """What ``build_scheduler`` describes."""
    scheduler = build_scheduler(part)
    if part == "wan":
        return FlowSchedule(shift=scheduler.config.flow_shift, device=device)
    alphas_cumprod = scheduler.alphas_cumprod.to(device)
    return DDPMSchedule(alphas_cumprod=alphas_cumprod, prediction=scheduler.config.prediction_type)


def posterior(vae: nn.Module, images: Float[Tensor, "B F 3 H W"]) -> DiagonalGaussianDistribution:
    """Of whole scenes, images in -1..1: per image, or [B, C, f, h, w] of a causal VAE."""
    if isinstance(vae, AutoencoderKLWan):
        return DiagonalGaussianDistribution(wan_moments(vae, images.transpose(1, 2)))
    return vae.encode(images.flatten(0, 1).contiguous(memory_format=torch.channels_last)).latent_dist


def encode(vae: nn.Module, images: Float[Tensor, "B F 3 H W"]) -> Float[Tensor, "B *S"]:
    """Latents as a denoiser sees them, of ``latent_shape``: a causal VAE's means, or drawn."""
    latents = posterior(vae, images)
    if isinstance(vae, AutoencoderKLWan):
        centre, spread = _normalisation(vae, latents.mean)
        return (latents.mean - centre) / spread
    return (latents.sample().float() * vae.config.scaling_factor).unflatten(0, images.shape[:2])


def decode(vae: nn.Module, latents: Float[Tensor, "B *S"]) -> Float[Tensor, "B F 3 H W"]:
    """Images of what ``encode`` gives."""
    if isinstance(vae, AutoencoderKLWan):
        centre, spread = _normalisation(vae, latents)
        return vae.decode(latents * spread + centre).sample.transpose(1, 2)
    images = vae.decode(latents.flatten(0, 1) / vae.config.scaling_factor).sample
    return images.unflatten(0, latents.shape[:2])


def predict_velocity(
    part: str,
    denoiser: nn.Module,
    noisy: Float[Tensor, "B *S"],
    timesteps: Real[Tensor, "B"],
    text: Float[Tensor, "B L C"],
    cameras: Float[Tensor, "B F 16"] | None = None,
) -> Float[Tensor, "B *S"]:
    """The denoiser's output for whole scenes, in the layout that its class requires."""
    if part == "wan":
        return denoiser(
            noisy, timesteps, pad(text, (0, 0, 0, WanPromptProcessor.max_tokens - text.shape[1]))
        ).sample
    if part == "video":
        return denoiser(noisy.transpose(1, 2), timesteps, text).sample.transpose(1, 2)
    frames = noisy.shape[1]
    extra = {} if cameras is None else {"class_labels": cameras.flatten(0, 1)}
    flat = noisy.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    text, timesteps = (x[:, None].expand(-1, frames, *x.shape[1:]).flatten(0, 1) for x in (text, timesteps))
    predicted = denoiser(flat, timesteps, text, **extra).sample
    return predicted.unflatten(0, noisy.shape[:2])


def _normalisation(vae: nn.Module, like: Tensor) -> list[Float[Tensor, "C 1 1 1"]]:
    """The latents' mean and standard deviation."""
    numbers = (vae.config.latents_mean, vae.config.latents_std)
    return [like.new_tensor(each).reshape(-1, 1, 1, 1) for each in numbers]
