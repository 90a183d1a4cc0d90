"""Score distillation from a text-to-video model (ZeroScope v2): whole clips at once.

N = B F rendered frames, the F frames of a video neighbours in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.guidance.latent import ScoreDistillationGuidance
from fourdfy.registry import register
from fourdfy.types import Cameras, GuidanceOutput, TextEmbeddings


@register("zeroscope-guidance")
class ZeroScopeGuidance(ScoreDistillationGuidance):
    """Loss ``sds_video``, averaged over videos, not over frames."""

    unet_class: ClassVar[str] = "UNet3DConditionModel"
    loss_name: ClassVar[str] = "sds_video"

    @dataclass(frozen=True, kw_only=True)
    class Config(ScoreDistillationGuidance.Config):
        pretrained_model_name_or_path: str = "cerspense/zeroscope_v2_576w"
        height: int | None = 320
        width: int | None = 576
        num_frames: int | None = None
        """Frames per video; null: all frames of a step are one video."""
        low_ram_vae: int = 0
        """Frames that are in the VAE at once (recomputed in the backward pass); 0 or less: all."""

    cfg: Config

    def forward(
        self,
        rgb: Float[Tensor, "N H W 3"],
        text: TextEmbeddings,
        cameras: Cameras,
        *,
        step: int,
        generator: torch.Generator,
    ) -> GuidanceOutput:
        num_frames = self._num_frames(len(rgb))
        latents = self.encode_videos(rgb, num_frames, generator)
        timesteps, noise = self.draw(latents, step, generator)
        # A video has one text: that of the view of its first frame.
        states = text.for_views(cameras[::num_frames], self.cfg.view_dependent_prompting)
        return self.distill(latents, timesteps, noise, *states, step=step)

    def encode_videos(
        self, rgb: Float[Tensor, "N H W 3"], num_frames: int, generator: torch.Generator
    ) -> Float[Tensor, "B C F h w"]:
        """Latents of videos; gradients reach ``rgb``."""
        latents = self.encode(rgb, generator, chunk=self.cfg.low_ram_vae)
        return latents.unflatten(0, (-1, num_frames)).movedim(1, 2)

    def _num_frames(self, total: int) -> int:
        num_frames = self.cfg.num_frames or total
        if total % num_frames:
            raise ValueError(
                f"{total} frames are no whole number of videos of num_frames={num_frames}; "
                f"set data.single_view.num_frames={num_frames}, or num_frames of the video guidance to null"
            )
        return num_frames
