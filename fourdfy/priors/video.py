"""Code shared by the text-to-video priors, which take whole clips at once.

N = B F rendered frames, the F frames of a clip neighbours in the batch. P pixels of feature maps, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fourdfy.bounds import number
from fourdfy.ops.distillation import amplify_motion
from fourdfy.priors.frozen import Gradient
from fourdfy.priors.latent import LatentPrior

PACKED_TOKENS = 128
"""Frames, of several pixels, that attend together: what GPU kernels compute at once."""


class VideoPrior(LatentPrior):
    """Losses are averaged over clips, not over frames."""

    is_video: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class Config(LatentPrior.Config):
        networks: ClassVar[dict[str, str]] = {"unet": "UNet3DConditionModel", "vae": "AutoencoderKL"}

        num_frames: int | None = number(None, 2, 1024)
        """Frames per video; null: as in the data."""
        motion_amp_scale: float = number(1.0, 0, 1000)
        """Factor on the score's difference between frames; see ``amplify_motion``."""
        gradient: Gradient = "exact"
        """With ``low_ram_vae``: ``exact`` encodes again in the backward pass; ``subset`` is the original's
        method, where only ``low_ram_vae`` random frames get gradients, without rescaling."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.gradient == "subset" and self.low_ram_vae < 1:
                raise ValueError("gradient=subset needs its size; set low_ram_vae=4, say, or gradient=exact")

        def check_group_size(self, size: int, key: str) -> None:
            if self.num_frames not in (None, size):
                raise ValueError(
                    f"num_frames={self.num_frames} disagrees with {key}={size}; set num_frames=null, "
                    f"or {key}={self.num_frames}"
                )
            if size < 2:
                raise ValueError(f"num_frames is {key}={size}, and one frame cannot move; use 2 or more")

    cfg: Config

    def accelerate(self, compile_small: bool) -> None:
        pack_attention_in_time(self.denoiser.network)
        super().accelerate(compile_small)

    def halve_chunks(self, frames: int) -> dict[str, int]:
        return {} if self.cfg.gradient == "subset" else super().halve_chunks(frames)

    def encode(
        self, rgb: Float[Tensor, "N H W 3"], group_size: int, generator: torch.Generator
    ) -> Float[Tensor, "B C F h w"]:
        """Latents of clips of ``group_size`` frames; gradients reach ``rgb``, as ``cfg.gradient`` says."""
        latents = self.encode_images(rgb, generator, self.cfg.gradient)
        return latents.unflatten(0, (-1, group_size)).movedim(1, 2)

    def decode(self, latents: Float[Tensor, "B C F h w"], most: int) -> Float[Tensor, "N H W 3"]:
        """Of the first clip, evenly."""
        frames = latents[0].movedim(1, 0)
        return super().decode(frames[:: max(1, len(frames) // most)], most)

    def adjust(self, score: Float[Tensor, "B C F h w"]) -> Float[Tensor, "B C F h w"]:
        return amplify_motion(score, self.cfg.motion_amp_scale)


def pack_attention_in_time(unet: nn.Module) -> None:
    """Let the attention over frames take several pixels at once, where its kernel is PyTorch's SDPA."""
    from diffusers.models.attention_processor import AttnProcessor2_0
    from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
    from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D

    kinds = (TransformerTemporalModel, AnimateDiffTransformer3D)
    in_time = [module for module in unet.modules() if isinstance(module, kinds)]
    for block in (block for module in in_time for block in module.transformer_blocks):
        for attention in (block.attn1, block.attn2):
            if type(attention.processor) is AttnProcessor2_0:
                attention.set_processor(PackedAttention(attention.processor))


class PackedAttention:
    """A diffusers attention processor: another one, on the frames of several pixels, each seen by itself.

    The same function. Kernels compute as many pairs for 16 tokens as for 128; here most are masked.
    """

    def __init__(self, kernel: Callable[..., Tensor]) -> None:
        self.kernel = kernel

    @no_type_check  # torch.compile can't look into a checker
    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Float[Tensor, "P F C"],
        encoder_hidden_states: None = None,
        attention_mask: None = None,
    ) -> Float[Tensor, "P F C"]:
        assert encoder_hidden_states is None and attention_mask is None
        pixels, frames, channels = hidden_states.shape
        together = max(1, PACKED_TOKENS // frames)
        while pixels % together:
            together -= 1
        if together == 1:
            return self.kernel(attn, hidden_states)
        pixel = torch.arange(together * frames, device=hidden_states.device) // frames
        unseen = pixel[:, None] != pixel
        mask = torch.zeros_like(unseen, dtype=hidden_states.dtype).masked_fill(unseen, -torch.inf)
        packed = hidden_states.reshape(pixels // together, together * frames, channels)
        # One for each head, so that the kernel does not copy it.
        masks = mask.expand(len(packed) * attn.heads, -1, -1)
        return self.kernel(attn, packed, attention_mask=masks).reshape(pixels, frames, channels)
