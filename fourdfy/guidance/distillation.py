"""Code shared by all distillations: noise levels, and the path from frames to a loss.

B latents of rendered frames (images or clips), C channels, S the axes behind them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from fourdfy.bounds import number, scheduled
from fourdfy.config import Component
from fourdfy.ops.diffusion import NoiseScales, add_noise, sample_noise
from fourdfy.ops.distillation import bounded
from fourdfy.priors.base import Prior
from fourdfy.prompts.views import for_views
from fourdfy.schedules import Schedule, schedule_value
from fourdfy.types import (
    Cameras,
    Conditions,
    GuidanceOutput,
    RenderOutput,
    StepContext,
    TextEmbeddings,
)


@dataclass(frozen=True, kw_only=True)
class NoisyLatents:
    """A step's noisy latents, and everything else that a distillation uses."""

    latents: Float[Tensor, "B C *S"]
    """They carry the graph to the frames."""
    timesteps: Real[Tensor, "B"]
    noise: Float[Tensor, "B C *S"]
    scales: NoiseScales
    conditions: Conditions
    """The prior's conditioning."""
    text: TextEmbeddings
    cameras: Cameras
    """Cameras of the latents' first frames."""

    @property
    def clean(self) -> Float[Tensor, "B C *S"]:
        return self.latents.detach()

    @property
    def noisy(self) -> Float[Tensor, "B C *S"]:
        return add_noise(self.clean, self.noise, self.scales)


class Distillation(Component, nn.Module, ABC):
    """A way to learn from a prior; together with a prior it is a ``Guidance`` (``guidance.pairs.join``)."""

    losses: ClassVar[tuple[str, ...]]
    """Names of its losses; ``sds`` becomes ``sds_video`` with a prior for clips."""
    prior_class: ClassVar[type[Prior]]

    @dataclass(frozen=True, kw_only=True)
    class Config(Prior.Config):
        min_step_percent: Schedule = scheduled(0.02, 0, 0.999)
        """Least noise that is drawn, as a share of the model's timesteps; may be a schedule."""
        max_step_percent: Schedule = scheduled(0.98, 0, 0.999)
        """Most noise that is drawn, as a share of the model's timesteps; may be a schedule."""
        max_step_percent_annealed: float = number(0.5, 0, 0.999)
        """Most noise after ``anneal_start_step``, as a share of the model's timesteps."""
        anneal_start_step: int | None = number(None, 0)
        """Beyond this global step ``max_step_percent_annealed`` replaces ``max_step_percent``."""
        grad_clip: Schedule = scheduled(None, 0)
        """Bound on each entry of the latents' gradient; a scheduled scalar or null."""

        def __post_init__(self) -> None:
            super().__post_init__()
            for step in sorted(self._turns()):
                low, high = self.noise_range(step)
                if low > high:
                    raise ValueError(
                        f"min_step_percent={self.min_step_percent} is {low:g} at step {step}, where the most "
                        f"is {high:g}; lower it, or raise max_step_percent or max_step_percent_annealed"
                    )

        def noise_range(self, step: int) -> tuple[float | int, float | int]:
            """Least and most noise at the global ``step``, as shares of the model's timesteps."""
            annealed = self.anneal_start_step is not None and step > self.anneal_start_step
            high = self.max_step_percent_annealed if annealed else self.max_step_percent
            return schedule_value(self.min_step_percent, step), schedule_value(high, step)

        def _turns(self) -> set[int]:
            """Global steps between which the noise range is linear."""
            ramps = [s for s in (self.min_step_percent, self.max_step_percent) if isinstance(s, Sequence)]
            turns = {0, *(turn for ramp in ramps for turn in (*ramp[:-3], ramp[-1]))}
            start = self.anneal_start_step
            return turns if start is None else turns | {start, start + 1}

    cfg: Config

    def __init__(self, cfg: Config, *, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.cfg = cfg
        self.device = torch.device(device)
        self.prior = self.prior_class(cfg, device=self.device)

    def accelerate(self, compile_small: bool) -> None:
        self.prior.accelerate(compile_small)

    def halve_chunks(self, frames: int) -> dict[str, int]:
        halved = self.prior.halve_chunks(frames)
        self.cfg = replace(self.cfg, **halved)
        return halved

    def forward(
        self, frames: RenderOutput, text: TextEmbeddings, cameras: Cameras, context: StepContext
    ) -> GuidanceOutput:
        self.cfg.check_group_size(cameras.group_size, "the group_size of the step's cameras")
        low, high = self.cfg.noise_range(context.step)
        prior, schedule, generator = self.prior, self.prior.denoiser.schedule, context.random
        latents = prior.encode(frames.comp_rgb, cameras.group_size, generator)
        timesteps = prior.draw_timesteps(schedule, low, high, len(latents), generator)
        noise = sample_noise(latents.shape, generator, self.device)
        # A clip has one text: that of the view of its first frame.
        first = cameras[:: len(cameras) // len(latents)]
        step = NoisyLatents(
            latents=latents,
            timesteps=timesteps,
            noise=noise,
            scales=schedule.scales(timesteps, latents.ndim),
            conditions=prior.condition(for_views(text, first, prior.view_dependent), first),
            text=text,
            cameras=first,
        )
        losses, grad = self.distil(step, context)
        least, most = schedule.span(low, high)
        return GuidanceOutput(
            losses=losses,
            metrics={"grad_norm": grad.norm(), "min_step": float(least), "max_step": float(most)},
        )

    @abstractmethod
    def distil(
        self, x: NoisyLatents, context: StepContext
    ) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, "B C *S"]]:
        """(losses by name, the gradient of the latents, which is logged)."""

    def bound(self, grad: Float[Tensor, "B C *S"], context: StepContext) -> Float[Tensor, "B C *S"]:
        """``grad``, clipped if the config says so."""
        clip = self.cfg.grad_clip
        return bounded(grad, None if clip is None else context.at_step(clip))
