"""VideoCrafter2 (Chen et al. 2024), a text-to-video model that is told the frame rate, as a prior."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from fourdfy.bounds import number
from fourdfy.config import file_path, ignored
from fourdfy.guidance.video import VideoGuidance
from fourdfy.priors import videocrafter2
from fourdfy.priors.frozen import apply_memory_options
from fourdfy.registry import register


@register("videocrafter-guidance")
class VideoCrafterGuidance(VideoGuidance):
    follows_autocast: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class Config(VideoGuidance.Config):
        pretrained_model_name_or_path: str = file_path("VideoCrafter/VideoCrafter2")
        config: str | None = ignored("the model's description comes with its checkpoint")
        half_precision_weights: bool | str = False
        """False unlike elsewhere: the published runs left precision to the trainer."""
        height: int | None = number(320, 1, 8192)
        width: int | None = number(512, 1, 8192)
        width_vid: int | None = ignored("width is the prior's, data.single_view.width_vid the rendering's")
        height_vid: int | None = ignored("height is the prior's, data.single_view.height_vid the rendering's")
        fps: int = number(28, 1, 1000)
        """Frames per second that the model is told: the higher, the less moves between two of them."""
        use_hifa: bool = False
        """Accepted as false alone: the original's HiFA loss called a decoder that raises."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.use_hifa:
                raise ValueError("use_hifa=true never worked with this prior; set use_hifa=false")

        def models(self) -> list[tuple[str, tuple[str, ...]]]:
            return [(self.pretrained_model_name_or_path, videocrafter2.PARTS)]

    cfg: Config

    def load_unet(self, folder: Path) -> torch.nn.Module:
        unet = videocrafter2.load_unet(folder, self.cfg.fps, dtype=self.dtype, device=self.device)
        apply_memory_options(unet, self.cfg, self.device)
        return unet
