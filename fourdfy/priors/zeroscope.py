"""ZeroScope v2, a text-to-video model, as a prior."""

from __future__ import annotations

from dataclasses import dataclass

from fourdfy.bounds import number
from fourdfy.config import file_path
from fourdfy.priors.video import VideoPrior
from fourdfy.registry import register


@register("zeroscope")
class ZeroScope(VideoPrior):
    @dataclass(frozen=True, kw_only=True)
    class Config(VideoPrior.Config):
        pretrained_model_name_or_path: str = file_path("cerspense/zeroscope_v2_576w")
        height: int | None = number(320, 1, 8192)
        """Pixels that frames are resized to before the VAE; null: the model's own size."""
        width: int | None = number(576, 1, 8192)
        """Pixels, as ``height``."""
