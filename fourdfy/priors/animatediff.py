"""AnimateDiff (Guo et al. 2024) as a prior: Stable Diffusion 1.5, whose layers alternate with attention in
time.

B clips of F frames, C channels, h x w latents, L tokens, E text channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fourdfy.bounds import number
from fourdfy.config import file_path
from fourdfy.priors.base import Network, NoiseSchedule
from fourdfy.priors.distilled import check_not_distilled
from fourdfy.priors.frozen import freeze, load_noise_schedule, loading
from fourdfy.priors.hub import resolve_model, stored_description
from fourdfy.priors.video import VideoPrior
from fourdfy.registry import register

ADAPTER = "motion_adapter"

MOST_FRAMES = 32
"""Of an adapter whose description is not known yet: that of all that are published."""


@register("animatediff")
class AnimateDiff(VideoPrior):
    @dataclass(frozen=True, kw_only=True)
    class Config(VideoPrior.Config):
        networks: ClassVar[dict[str, str]] = {
            "unet": "UNet2DConditionModel",
            "vae": "AutoencoderKL",
            ADAPTER: "MotionAdapter",
        }
        text_processors: ClassVar[tuple[str, ...]] = ("animatediff-prompt-processor",)

        pretrained_model_name_or_path: str = file_path("stable-diffusion-v1-5/stable-diffusion-v1-5")
        """Folder or hub id of the image model: Stable Diffusion 1.5, or one made from it."""
        motion_adapter: str = file_path("guoyww/animatediff-motion-adapter-v1-5-3")
        """Folder or hub id of the layers in time: a ``MotionAdapter`` for Stable Diffusion 1.5."""
        height: int | None = number(320, 1, 8192)
        """Pixels that frames are resized to before the VAE; null: the image model's own size."""
        width: int | None = number(576, 1, 8192)
        """Pixels, as ``height``."""

        def models(self) -> list[tuple[str, tuple[str, ...]]]:
            return [*super().models(), (self.motion_adapter, (ADAPTER,))]

        def check_group_size(self, size: int, key: str) -> None:
            super().check_group_size(size, key)
            most = stored_description(self.motion_adapter, ADAPTER).get("motion_max_seq_length", MOST_FRAMES)
            if isinstance(most, int) and size > most:
                raise ValueError(f"num_frames is {key}={size}: this adapter knows {most} frames; use {most}")

        def check_models(self) -> None:
            check_not_distilled(self.motion_adapter, ADAPTER, key="motion_adapter")
            super().check_models()
            unet = stored_description(self.pretrained_model_name_or_path, "unet")
            adapter = stored_description(self.motion_adapter, ADAPTER)
            widths, given = (part.get("block_out_channels") for part in (unet, adapter))
            if unet and adapter and (given != widths or adapter.get("conv_in_channels")):
                raise ValueError(
                    f"motion_adapter={self.motion_adapter}: made for another kind of model than "
                    f"{self.pretrained_model_name_or_path}, as block_out_channels or conv_in_channels of its "
                    "config.json say; use one for Stable Diffusion 1.5"
                )

    cfg: Config

    def read_network(self, folder: Path, part: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
        if part != "unet":
            return super().read_network(folder, part, dtype, device)
        from diffusers import UNetMotionModel

        place = resolve_model(self.cfg.motion_adapter, (ADAPTER,))
        image, adapter = (
            super(AnimateDiff, self).read_network(where, part, dtype, torch.device("cpu"))
            for where, part in ((folder, "unet"), (place, ADAPTER))
        )
        with loading(folder / "unet"):
            unet = UNetMotionModel.from_unet2d(image, adapter)
            if lost := sorted(image.state_dict().keys() - unet.state_dict().keys()):
                raise ValueError(f"{lost[0]} has no place beside layers in time; use Stable Diffusion 1.5")
        return freeze(unet.to(device))

    def load_schedule(self, folder: Path) -> NoiseSchedule:
        # The layers in time were trained with linear betas, unlike the image model, whose file it is.
        return load_noise_schedule(folder, self.device, beta_schedule="linear")

    def told(
        self,
        network: Network,
        noisy: Float[Tensor, "B C F h w"],
        text_embeddings: Float[Tensor, "B L E"],
        cameras: Float[Tensor, "B K"] | None,
    ) -> dict[str, Any]:
        # Its cross-attention sees images, so each frame has a text.
        return {"encoder_hidden_states": text_embeddings.repeat_interleave(noisy.shape[2], 0)}
