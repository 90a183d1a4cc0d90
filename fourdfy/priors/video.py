"""Code shared by the text-to-video priors, which take whole clips at once.

N = B F rendered frames, the F frames of a clip neighbours in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.bounds import number
from fourdfy.ops.distillation import amplify_motion
from fourdfy.priors.frozen import Gradient
from fourdfy.priors.latent import LatentPrior


class VideoPrior(LatentPrior):
    """Losses are averaged over clips, not over frames."""

    is_video: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class Config(LatentPrior.Config):
        unet_class: ClassVar[str] = "UNet3DConditionModel"

        num_frames: int | None = number(None, 2, 1024)
        """Frames per video; null: as in the data."""
        motion_amp_scale: float = number(1.0, 0, 1000)
        """Factor on the score's difference between frames; see ``amplify_motion``."""
        low_ram_vae: int = number(0, -1, 1024)
        """Number of frames in the VAE at once, with their activations; 0 or -1: all."""
        gradient: Gradient = "exact"
        """With ``low_ram_vae``: ``exact`` encodes again in the backward pass; ``subset`` is the original's
        method, where only ``low_ram_vae`` random frames get gradients, without rescaling."""

        def activation_bytes(self, frames: int, height: int, width: int) -> int:
            at_once = min(frames, self.low_ram_vae) if self.low_ram_vae > 0 else frames
            return super().activation_bytes(at_once, height, width)

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.token_merging:
                raise ValueError("token_merging=true is for image models; set token_merging=false")
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

    def encode(
        self, rgb: Float[Tensor, "N H W 3"], group_size: int, generator: torch.Generator
    ) -> Float[Tensor, "B C F h w"]:
        """Latents of clips of ``group_size`` frames; gradients reach ``rgb``, as ``cfg.gradient`` says."""
        latents = self.encode_images(rgb, generator, self.cfg.low_ram_vae, self.cfg.gradient)
        return latents.unflatten(0, (-1, group_size)).movedim(1, 2)

    def adjust(self, score: Float[Tensor, "B C F h w"]) -> Float[Tensor, "B C F h w"]:
        return amplify_motion(score, self.cfg.motion_amp_scale)
