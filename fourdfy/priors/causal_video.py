"""Code shared by video models whose VAE is causal: one latent of the first frame, then one of several.

N = B F rendered frames, the F = 1 + stride k frames of a clip neighbours in the batch; f latents in time of
h x w.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.bounds import number
from fourdfy.ops.ranks import spread
from fourdfy.priors.causal_vae import STRIDE, check_frames
from fourdfy.priors.video import VideoPrior


class CausalVideoPrior(VideoPrior):
    moments: ClassVar[Callable[..., Tensor]]
    """The function of ``causal_vae`` that encodes by the model's kind of VAE."""

    @dataclass(frozen=True, kw_only=True)
    class Config(VideoPrior.Config):
        decodes_all: ClassVar[bool] = False
        stride: ClassVar[int] = STRIDE
        """Frames that each latent but the first one holds."""
        frames_in_chunk: ClassVar[int] = STRIDE
        """What the VAE takes together."""
        vae_bytes_per_pixel: ClassVar[int]
        """What the VAE keeps for the backward pass, of each frame that is in it at once."""
        cache_bytes_per_pixel: ClassVar[int]
        """What it keeps of one frame, for each latent in time."""
        fits_float16: ClassVar[bool] = True
        """Whether the transformer's numbers do."""

        height: int = number(320, 1, 8192)
        """Pixels that frames are resized to before the VAE."""
        width: int = number(576, 1, 8192)
        """Pixels, as ``height``."""
        low_ram_vae: int = number(STRIDE, -1, 1024)
        """Number of frames in the VAE at once, in whole chunks of what it takes together; fewer than all are
        encoded again in the backward pass. 0 or -1: all."""

        def __post_init__(self) -> None:
            if self.gradient == "subset":
                raise ValueError("gradient=subset: this VAE takes frames together; set gradient=exact")
            super().__post_init__()
            if self.half_precision_weights is True and not self.fits_float16:
                raise ValueError(
                    "half_precision_weights=true is float16, too narrow for this model; set it to bf16"
                )

        def frames_at_once(self, frames: int) -> int:
            """Those of whole chunks; fewer than a chunk as they are given."""
            whole = self.low_ram_vae - self.low_ram_vae % self.frames_in_chunk
            return min(frames, whole or self.low_ram_vae) if self.low_ram_vae > 0 else frames

        def activation_bytes(self, frames: int, height: int, width: int) -> int:
            kept = (
                max(self.frames_in_chunk, self.frames_at_once(frames)) * self.vae_bytes_per_pixel
                + frames // self.stride * self.cache_bytes_per_pixel
            )
            return self.height * self.width * kept

        def check_group_size(self, size: int, key: str) -> None:
            check_frames(size, f"num_frames is {key}", self.stride)
            super().check_group_size(size, key)

    cfg: Config

    def encode(
        self, rgb: Float[Tensor, "N H W 3"], group_size: int, generator: torch.Generator
    ) -> Float[Tensor, "B C f h w"]:
        """Latents of clips of ``group_size`` frames: the posterior's means."""
        clips = self.resized(rgb).unflatten(0, (-1, group_size)).movedim(1, 2)
        with self._precision():
            moments = spread(
                lambda mine: self.moments(self.vae, mine, self.cfg.low_ram_vae),
                clips.to(self.vae.dtype) * 2 - 1,
            )
        mean, _ = moments.float().chunk(2, dim=1)
        return self.normalised(mean)

    def decode(self, latents: Float[Tensor, "B C f h w"], most: int) -> Float[Tensor, "N H W 3"]:
        """Of the first clip the first frame, which alone can be decoded without all others."""
        first = latents[:1, :, :1]
        zero, one = (self.normalised(torch.full_like(first, value)) for value in (0.0, 1.0))
        return self._images((first - zero) / (one - zero))[0].movedim(0, -1)

    @abstractmethod
    def normalised(self, latents: Float[Tensor, "B C f h w"]) -> Float[Tensor, "B C f h w"]:
        """What the VAE makes of clips, as the transformer knows it."""

    def halve_chunks(self, frames: int) -> dict[str, int]:
        chunked = self.cfg.frames_at_once(frames) > self.cfg.frames_in_chunk
        return super().halve_chunks(frames) if chunked else {}

    def _image_size(self) -> tuple[int, int]:
        self.cfg.check_size(self.cfg.multiple(self.vae.config, self.denoiser.network.config))
        return self.cfg.height, self.cfg.width
