"""Score distillation sampling (Poole et al. 2022) and score Jacobian chaining (Wang et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from fourdfy.bounds import scheduled
from fourdfy.guidance.distillation import Distillation, NoisyLatents
from fourdfy.ops.distillation import Weighting, score_loss, sds_gradient, sjc_gradient
from fourdfy.registry import register
from fourdfy.schedules import Schedule
from fourdfy.types import StepContext


@register("sds")
class ScoreDistillation(Distillation):
    losses: ClassVar[tuple[str, ...]] = ("sds",)

    @dataclass(frozen=True, kw_only=True)
    class Config(Distillation.Config):
        guidance_scale: Schedule = scheduled(100.0, 0, 10_000)
        """Counted from the prediction with the text: text + scale (text - uncond), one less than usual."""
        weighting_strategy: Weighting = "sds"
        """w(t): sds 1 - abar, uniform 1, fantasia3d sqrt(abar) (1 - abar), flow 1 / sqrt(abar): the
        difference of a rectified flow's velocities, for any prior."""
        use_sjc: bool = False
        """Use score Jacobian chaining (Wang et al. 2022) instead of score distillation."""
        var_red: bool = True
        """With ``use_sjc``: compare the denoised latents with the clean ones instead of the noisy ones."""

    cfg: Config

    def distil(
        self, x: NoisyLatents, context: StepContext
    ) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, "B C *S"]]:
        # + 1: this config's scale is counted from the text prediction, the prior's from the uncond.
        x0, _ = self.guided_x0(x, context.at_step(self.cfg.guidance_scale) + 1)
        x0 = self.less_still(x0, x)
        if self.cfg.use_sjc:
            score = sjc_gradient(x.clean, x.noise, x0, x.scales, self.cfg.var_red)
        else:
            score = sds_gradient(x.clean, x0, x.scales, self.cfg.weighting_strategy)
        grad = self.bound(self.prior.adjust(score), context)
        return {self.losses[0]: score_loss(x.latents, grad)}, grad
