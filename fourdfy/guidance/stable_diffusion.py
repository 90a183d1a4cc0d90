"""Score distillation from an image model (Poole et al. 2022): each frame for itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fourdfy.guidance.latent import ScoreDistillationGuidance
from fourdfy.registry import register


@register("stable-diffusion-guidance")
class StableDiffusionGuidance(ScoreDistillationGuidance):
    """Loss ``sds``."""

    loss_name: ClassVar[str] = "sds"

    @dataclass(frozen=True, kw_only=True)
    class Config(ScoreDistillationGuidance.Config):
        pass
