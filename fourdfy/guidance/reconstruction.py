"""The distance to what the prior takes for clean, its contrast rescaled (Shi et al. 2023, MVDream)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from fourdfy.bounds import number
from fourdfy.guidance.distillation import Distillation, NoisyLatents
from fourdfy.ops.distillation import reconstruction_loss, rescale_guided_x0, score_loss, sds_gradient
from fourdfy.registry import register
from fourdfy.types import StepContext


@register("reconstruction")
class Reconstruction(Distillation):
    losses: ClassVar[tuple[str, ...]] = ("sds",)

    @dataclass(frozen=True, kw_only=True)
    class Config(Distillation.Config):
        guidance_scale: float = number(50.0, 0, 10_000)
        """Counted from the unconditional prediction: uncond + scale (text - uncond)."""
        recon_loss: bool = True
        """True: distance to the prior's x_0; false: score distillation weighted by 1 - abar."""
        recon_std_rescale: float = number(0.5, 0, 1)
        """Share of the guided x_0's excess contrast that is removed, 0..1."""

    cfg: Config

    def distil(
        self, x: NoisyLatents, context: StepContext
    ) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, "B C *S"]]:
        x0, with_text = self.guided_x0(x, self.cfg.guidance_scale)
        if not self.cfg.recon_loss:
            x0 = self.less_still(x0, x)
            grad = self.bound(self.prior.adjust(sds_gradient(x.clean, x0, x.scales, "sds")), context)
            return {self.losses[0]: score_loss(x.latents, grad)}, grad
        x0 = rescale_guided_x0(x0, with_text, self.prior.joint_latents, self.cfg.recon_std_rescale)
        x0 = self.less_still(x0, x)
        if self.prior.is_video or self.cfg.grad_clip is not None:  # else the difference and the sum round
            x0 = x.clean - self.bound(self.prior.adjust(x.clean - x0), context)
        return {self.losses[0]: reconstruction_loss(x.latents, x0)}, (x.clean - x0) / len(x.clean)
