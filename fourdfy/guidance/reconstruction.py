"""The distance to what the prior takes for clean, its contrast rescaled (Shi et al. 2023, MVDream)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fourdfy.bounds import number, scheduled
from fourdfy.guidance.distillation import Distillation, NoisyLatents
from fourdfy.ops.distillation import reconstruction_loss, rescale_guided_x0, score_loss, sds_gradient
from fourdfy.registry import register
from fourdfy.schedules import Schedule
from fourdfy.types import StepContext


@register("reconstruction")
class Reconstruction(Distillation):
    losses: ClassVar[tuple[str, ...]] = ("sds",)

    @dataclass(frozen=True, kw_only=True)
    class Config(Distillation.Config):
        guidance_scale: Schedule = scheduled(50.0, 0, 10_000)
        """Counted from the unconditional prediction: uncond + scale (text - uncond)."""
        recon_loss: bool = True
        """True: distance to the prior's x_0; false: score distillation weighted by 1 - abar."""
        recon_std_rescale: float = number(0.5, 0, 1)
        """Share of the guided x_0's excess contrast that is removed, 0..1."""
        recon_pixels: bool = False
        """With ``recon_loss``: compare the frames with the decoded x_0 (Zhu et al. 2023, HiFA), instead of
        their latents with it. So details are learned that the gradient of the VAE's encoder spoils."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.recon_pixels and not self.recon_loss:
                raise ValueError("recon_pixels=true needs recon_loss=true: score distillation has no images")
            if self.recon_pixels and not self.decodes_all:
                raise ValueError("recon_pixels=true: this prior decodes no whole clips; set it to false")
            if self.recon_pixels and getattr(self, "gradient", "exact") != "exact":
                raise ValueError("recon_pixels=true learns from all frames; set gradient=exact")

    cfg: Config

    @property
    def compares_frames(self) -> bool:
        return self.cfg.recon_pixels

    def distil(
        self, x: NoisyLatents, context: StepContext
    ) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, "B C *S"]]:
        x0, with_text = self.guided_x0(x, context.at_step(self.cfg.guidance_scale))
        if not self.cfg.recon_loss:
            x0 = self.less_still(x0, x)
            grad = self.bound(self.prior.adjust(sds_gradient(x.clean, x0, x.scales, "sds")), context)
            return {self.losses[0]: score_loss(x.latents, grad)}, grad
        x0 = rescale_guided_x0(x0, with_text, self.prior.joint_latents, self.cfg.recon_std_rescale)
        x0 = self.less_still(x0, x)
        if self.prior.is_video or self.cfg.grad_clip is not None:  # else the difference and the sum round
            x0 = x.clean - self.bound(self.prior.adjust(x.clean - x0), context)
        grad = (x.clean - x0) / len(x.clean)
        if self.compares_frames:
            return {self.losses[0]: self._image_loss(x.rgb, x0)}, grad
        return {self.losses[0]: reconstruction_loss(x.latents, x0)}, grad

    def _image_loss(self, rgb: Float[Tensor, "N H W 3"], x0: Float[Tensor, "B C *S"]) -> Float[Tensor, ""]:
        """Half the squared distance of the frames to the decoded ``x0``, per latent, at the frames' size."""
        with torch.no_grad():
            parts = x0.split(1 if self.prior.is_video else len(x0))
            images = torch.cat([self.prior.decode(part, len(rgb)) for part in parts]).movedim(-1, 1)
            target = F.interpolate(images, rgb.shape[1:3], mode="bilinear", align_corners=False)
        return len(rgb) / len(x0) * reconstruction_loss(rgb.movedim(-1, 1), target)
