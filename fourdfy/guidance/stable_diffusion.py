"""Score distillation from an image model (Poole et al. 2022): each frame for itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.guidance.latent import ScoreDistillationGuidance
from fourdfy.registry import register
from fourdfy.types import Cameras, GuidanceOutput, TextEmbeddings


@register("stable-diffusion-guidance")
class StableDiffusionGuidance(ScoreDistillationGuidance):
    """Loss ``sds``."""

    loss_name: ClassVar[str] = "sds"

    @dataclass(frozen=True, kw_only=True)
    class Config(ScoreDistillationGuidance.Config):
        pass

    def forward(
        self,
        rgb: Float[Tensor, "B H W 3"],
        text: TextEmbeddings,
        cameras: Cameras,
        *,
        step: int,
        generator: torch.Generator,
    ) -> GuidanceOutput:
        latents = self.encode(rgb, generator)
        timesteps, noise = self.draw(latents, step, generator)
        states = text.for_views(cameras, self.cfg.view_dependent_prompting)
        return self.distill(latents, timesteps, noise, *states, step=step)
