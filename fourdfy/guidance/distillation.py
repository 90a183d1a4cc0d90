"""Code shared by all distillations: noise levels, and the path from frames to a loss.

B latents of rendered frames (images or clips), C channels, S the axes behind them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from fourdfy.bounds import number, scheduled
from fourdfy.config import Component
from fourdfy.ops.diffusion import GuidanceMode, NoiseScales, add_noise, noise_from_x0, sample_noise
from fourdfy.ops.distillation import bounded, less_still_motion
from fourdfy.priors.base import Prior
from fourdfy.prompts.views import for_views
from fourdfy.schedules import SQRT, Schedule, ramp, schedule_value
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
    rgb: Float[Tensor, "N H W 3"]
    """The rendered frames."""
    still: NoisyLatents | None = None
    """The same clips held still, with the same noise and the text for it; only with ``still_source``."""

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
    own_losses: ClassVar[tuple[str, ...]] = ()
    """Those of them that teach only its own parameters, not the scene."""
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
        guidance_mode: GuidanceMode = "cfg"
        """How predictions with and without the text are combined: ``cfg`` as usual (Ho & Salimans 2022),
        ``apg`` without the part that raises saturation (Sadat et al. 2024), ``cfg_zero`` with the flow
        without the text scaled to fit that with it (CFG-Zero*, Fan et al. 2025). All cost the same."""
        apg_norm_bound: float = number(0.0, 0)
        """With ``apg``: bound on the norm of the difference that the text makes to a latent; 0 is none."""
        correct_noise: bool = False
        """Replace the noise that was drawn by the one that the prior sees in the noisy latents (RFDS-Rev,
        Yang et al. 2025), for one more network call with the text alone."""
        still_source: bool = False
        """Clips alone: learn the motion as the difference to what the prior would move in the first frame
        held still, with ``prompt_still`` of the prompt processor (motion score distillation, MSD); what the
        frames have in common is learned as usual. One more network call, and the VAE's without gradients.
        With ``vsd`` it is the LoRA that sees, and learns, the clip held still."""
        still_guidance_scale: float = number(1.0, 0, 10_000)
        """With ``still_source``: guidance on ``prompt_still``, counted from the unconditional prediction; at
        1, none, the call takes half the time."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.apg_norm_bound and self.guidance_mode != "apg":
                raise ValueError(
                    f"apg_norm_bound={self.apg_norm_bound:g}: guidance_mode={self.guidance_mode} has no "
                    "bound; set guidance_mode=apg"
                )
            if self.still_source and not self.is_video:
                raise ValueError("still_source=true needs a prior for clips: one image does not move")
            if self.still_guidance_scale != 1 and not self.still_source:
                raise ValueError(
                    f"still_guidance_scale={self.still_guidance_scale:g}: nothing is held still; set "
                    "still_source=true"
                )
            for step in sorted(self._turns()):
                low, high = self.noise_range(step)
                if self.is_flow and high <= 0:
                    raise ValueError(
                        f"max_step_percent={self.max_step_percent}: the most noise is 0 at step {step}, and "
                        "a flow learns nothing from it; raise max_step_percent or max_step_percent_annealed"
                    )
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
            """Global steps that show where the ends of the noise range are too near."""
            turns = {0}
            for value in (self.min_step_percent, self.max_step_percent):
                if isinstance(value, Sequence):
                    first, _, _, last = ramp(value)
                    parts = 64 if value[-1] == SQRT else 1  # a root bends on its way
                    turns |= {first + (last - first) * part // parts for part in range(parts + 1)}
            start = self.anneal_start_step
            return turns if start is None else turns | {start, start + 1}

    cfg: Config

    def __init__(self, cfg: Config, *, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.cfg = cfg
        self.device = torch.device(device)
        self.prior = self.prior_class(cfg, device=self.device)
        self.observer: Callable[[NoisyLatents, Tensor], None] | None = None
        """Told the guided x_0 of noisy latents, for a look at it."""

    def accelerate(self, compile_small: bool) -> None:
        self.prior.accelerate(compile_small)

    def halve_chunks(self, frames: int) -> dict[str, int]:
        halved: dict[str, Any] = self.prior.halve_chunks(frames)
        self.cfg = replace(self.cfg, **halved)
        return halved

    def forward(
        self, frames: RenderOutput, text: TextEmbeddings, cameras: Cameras, context: StepContext
    ) -> GuidanceOutput:
        self.cfg.check_group_size(cameras.group_size, "the group_size of the step's cameras")
        low, high = self.cfg.noise_range(context.step)
        prior, generator = self.prior, context.random
        same_draws = generator.clone_state()
        with torch.set_grad_enabled(not self.compares_frames):
            latents = prior.encode(frames.comp_rgb, cameras.group_size, generator)
        schedule = prior.levels(prior.denoiser.schedule, latents)
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
            rgb=frames.comp_rgb,
        )
        if self.cfg.correct_noise:
            step = replace(step, noise=noise_from_x0(self.text_x0(step), step.noisy, step.scales))
        if self.cfg.still_source:
            step = self.beside_still(step, frames.comp_rgb, cameras.group_size, same_draws)
        losses, grad = self.distil(step, context)
        least, most = schedule.span(low, high)
        return GuidanceOutput(
            losses=losses,
            metrics={"grad_norm": grad.norm(), "min_step": float(least), "max_step": float(most)},
        )

    @property
    def compares_frames(self) -> bool:
        """Whether the loss is of the frames, so that the latents need no graph."""
        return False

    @abstractmethod
    def distil(
        self, x: NoisyLatents, context: StepContext
    ) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, "B C *S"]]:
        """(losses by name, the gradient of the latents, which is logged)."""

    @torch.no_grad()
    def beside_still(
        self, x: NoisyLatents, rgb: Float[Tensor, "N H W 3"], frames: int, generator: torch.Generator
    ) -> NoisyLatents:
        """``x`` with its clips held still, those of ``frames`` frames of ``rgb``."""
        held = rgb[::frames].repeat_interleave(frames, 0)
        text, latents = x.text.still or x.text, self.prior.encode(held, frames, generator)
        texts = for_views(text, x.cameras, self.prior.view_dependent)
        conditions = self.prior.condition(texts, x.cameras)
        return replace(x, still=replace(x, latents=latents, text=text, conditions=conditions))

    def less_still(self, x0: Float[Tensor, "B C *S"], x: NoisyLatents) -> Float[Tensor, "B C *S"]:
        """``x0`` without what the prior would move in the clips held still too."""
        if x.still is None:
            return x0
        scale = self.cfg.still_guidance_scale
        source = self.text_x0(x.still) if scale == 1 else self.guided_x0(x.still, scale)[0]
        return less_still_motion(x0, x.still.clean, source)

    def text_x0(self, x: NoisyLatents) -> Float[Tensor, "B C *S"]:
        """The prior's x_0 from the text alone."""
        return self.prior.x0(x.noisy, x.timesteps, [x.conditions.text], x.conditions.cameras)[0]

    def guided_x0(
        self, x: NoisyLatents, scale: float
    ) -> tuple[Float[Tensor, "B C *S"], Float[Tensor, "B C *S"]]:
        """``Prior.guided_x0``, combined as the config says."""
        mode, norm_bound = self.cfg.guidance_mode, self.cfg.apg_norm_bound
        x0, with_text = self.prior.guided_x0(x.noisy, x.timesteps, x.conditions, scale, mode, norm_bound)
        if self.observer is not None:
            self.observer(x, x0)
        return x0, with_text

    def bound(self, grad: Float[Tensor, "B C *S"], context: StepContext) -> Float[Tensor, "B C *S"]:
        """``grad``, clipped if the config says so."""
        clip = self.cfg.grad_clip
        return bounded(grad, None if clip is None else context.at_step(clip))
