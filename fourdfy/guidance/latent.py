"""What the latent diffusion priors share: settings, images to latents, and the networks' x_0.

A subclass says which text and which cameras a batch goes with, and turns x_0 into its loss. Tests
(and new priors) replace ``load_models`` or ``run_unet``; nothing else touches a network.

B latents (images, or videos with a frame axis behind the channels), C channels, H x W pixels of
rendered images, h x w latents, L tokens, E text channels, K numbers of a camera.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fourdfy.diffusion.frozen import (
    FrozenModels,
    MemoryOptions,
    apply_memory_options,
    encode_images,
    load_noise_schedule,
    load_part,
    vae_factor,
)
from fourdfy.diffusion.hub import resolve_model
from fourdfy.guidance.base import Guidance
from fourdfy.ops.diffusion import (
    add_noise,
    classifier_free_guidance,
    sample_noise,
    sample_timesteps,
    timestep_range,
    x0_from_prediction,
)
from fourdfy.ops.distillation import Weighting, bounded, score_loss, sds_gradient, sjc_gradient
from fourdfy.schedules import Schedule, check_schedule, schedule_value
from fourdfy.types import GuidanceOutput

PARTS = ("unet", "vae", "scheduler")


class LatentGuidance(Guidance):
    """A latent diffusion model as a prior on rendered images."""

    unet_class: ClassVar[str] = "UNet2DConditionModel"
    follows_autocast: ClassVar[bool] = False
    """Whether the networks run in the trainer's mixed precision, or in the type of their weights."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MemoryOptions, Guidance.Config):
        pretrained_model_name_or_path: str = "stabilityai/stable-diffusion-2-1-base"
        """Folder, embedded name or hub id with ``unet``, ``vae`` and ``scheduler``."""
        height: int | None = None
        width: int | None = None
        """Pixels that images are resized to before the VAE; null: the model's own size."""
        guidance_scale: float = 100.0
        min_step_percent: Schedule = 0.02
        max_step_percent: Schedule = 0.98
        """Range of the noise level, as shares of the model's timesteps; scheduled scalars."""
        max_step_percent_annealed: float = 0.5
        anneal_start_step: int | None = None
        """Beyond this global step ``max_step_percent_annealed`` replaces ``max_step_percent``."""
        grad_clip: Schedule = None
        """Bound on each entry of the latents' gradient; a scheduled scalar or null."""
        view_dependent_prompting: bool = True
        cache_dir: str | None = None
        """Without effect: HF_HOME says where hub models are kept."""
        token_merging: bool = False
        token_merging_params: dict[str, Any] | None = None
        """Without effect while ``token_merging`` is false, and true is refused."""

        def __post_init__(self) -> None:
            check_schedule(self.min_step_percent, "min_step_percent")
            check_schedule(self.max_step_percent, "max_step_percent")
            if self.grad_clip is not None:
                check_schedule(self.grad_clip, "grad_clip")
            if self.half_precision_weights not in (True, False, "bf16"):
                raise ValueError(
                    f'half_precision_weights={self.half_precision_weights!r}; expected true, false or "bf16"'
                )
            if self.token_merging:
                raise ValueError("token_merging=true is not supported; set token_merging=false")

    cfg: Config

    def __init__(self, cfg: Config, *, device: torch.device) -> None:
        super().__init__(cfg, device=torch.device(device))
        self.dtype = cfg.dtype(self.device)
        self.models = self.load_models()
        self.image_size = self._image_size()

    def load_models(self) -> FrozenModels:
        """The frozen ``unet`` and ``vae``, and their noise ``schedule``."""
        folder = resolve_model(self.cfg.pretrained_model_name_or_path, PARTS)
        return FrozenModels(
            unet=self.load_network(folder, "unet", self.unet_class),
            vae=self.load_network(folder, "vae", "AutoencoderKL"),
            schedule=load_noise_schedule(folder, self.device),
        )

    def load_network(self, folder: Any, part: str, class_name: str) -> torch.nn.Module:
        network = load_part(folder, part, class_name, dtype=self.dtype, device=self.device)
        apply_memory_options(network, self.cfg, self.device)
        return network

    def encode(
        self, rgb: Float[Tensor, "B H W 3"], generator: torch.Generator, chunk: int = 0
    ) -> Float[Tensor, "B C h w"]:
        """Latents of images in 0..1; gradients reach ``rgb``."""
        images = rgb.movedim(-1, 1)
        if images.shape[-2:] != self.image_size:
            images = F.interpolate(images, self.image_size, mode="bilinear", align_corners=False)
        with self._precision():
            return encode_images(self.models.vae, images, generator, chunk)

    def predict_x0(
        self,
        noisy: Float[Tensor, "B C *S"],
        timesteps: Int[Tensor, "B"],
        text: Float[Tensor, "B L E"],
        uncond: Float[Tensor, "B L E"],
        cameras: Float[Tensor, "B K"] | None = None,
    ) -> tuple[Float[Tensor, "B C *S"], Float[Tensor, "B C *S"]]:
        """(with the text, without it) what the prior takes for clean, from one network call."""
        twice = (noisy, timesteps) if cameras is None else (noisy, timesteps, cameras)
        noisy_twice, timesteps_twice, *cameras_twice = (torch.cat([x, x]) for x in twice)
        states = torch.cat([text, uncond])
        prediction = self.run_unet(noisy_twice, timesteps_twice, states, *cameras_twice)
        scales = self.models.schedule.scales(timesteps, noisy.ndim)
        kind = self.models.schedule.prediction
        with_text, without = (x0_from_prediction(p, noisy, scales, kind) for p in prediction.chunk(2))
        return with_text, without

    @torch.no_grad()
    def run_unet(
        self,
        noisy: Float[Tensor, "N C *S"],
        timesteps: Int[Tensor, "N"],
        states: Float[Tensor, "N L E"],
        cameras: Float[Tensor, "N K"] | None = None,
    ) -> Float[Tensor, "N C *S"]:
        """The network's raw prediction in float32, whatever type it computes in."""
        return self.call_unet(self.models.unet, noisy, timesteps, states, cameras)

    def call_unet(
        self,
        unet: torch.nn.Module,
        noisy: Float[Tensor, "N C *S"],
        timesteps: Int[Tensor, "N"],
        states: Float[Tensor, "N L E"],
        cameras: Float[Tensor, "N K"] | None = None,
    ) -> Float[Tensor, "N C *S"]:
        """One call of a diffusers U-Net; ``cameras`` go where it takes class labels."""
        conditioning = {} if cameras is None else {"class_labels": cameras}
        with self._precision():
            (prediction,) = unet(
                noisy.to(self.dtype),
                timesteps,
                encoder_hidden_states=states.to(self.dtype),
                return_dict=False,
                **conditioning,
            )
        return prediction.float()

    def timestep_range(self, step: int) -> tuple[int, int]:
        """First and last timestep to draw at the global ``step``."""
        cfg = self.cfg
        annealed = cfg.anneal_start_step is not None and step > cfg.anneal_start_step
        high = cfg.max_step_percent_annealed if annealed else cfg.max_step_percent
        return timestep_range(cfg.min_step_percent, high, step, len(self.models.schedule))

    def draw(
        self, latents: Float[Tensor, "B C *S"], step: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "B"], Float[Tensor, "B C *S"]]:
        """(timesteps, noise) for each of the latents."""
        low, high = self.timestep_range(step)
        timesteps = sample_timesteps(low, high, len(latents), generator, self.device)
        return timesteps, sample_noise(latents.shape, generator, self.device)

    def bound(self, grad: Float[Tensor, "B C *S"], step: int) -> Float[Tensor, "B C *S"]:
        """``grad`` made finite, and clipped if the config says so."""
        clip = self.cfg.grad_clip
        return bounded(grad, None if clip is None else schedule_value(clip, step))

    def output(self, losses: dict[str, Tensor], grad: Float[Tensor, "B C *S"], step: int) -> GuidanceOutput:
        """Losses, with the metrics that every prior reports."""
        low, high = self.timestep_range(step)
        return GuidanceOutput(
            losses=losses,
            metrics={"grad_norm": grad.norm(), "min_step": float(low), "max_step": float(high)},
        )

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.follows_autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, enabled=False)

    def _image_size(self) -> tuple[int, int]:
        factor = vae_factor(self.models.vae)
        own = self.models.unet.config.sample_size
        own_height, own_width = (own, own) if isinstance(own, int) else own
        size = (self.cfg.height or own_height * factor, self.cfg.width or own_width * factor)
        if any(pixels % factor for pixels in size):
            raise ValueError(f"height, width = {size}: this VAE wants multiples of {factor} pixels")
        return size


class ScoreDistillationGuidance(LatentGuidance):
    """A prior whose loss is score distillation sampling, or score Jacobian chaining."""

    loss_name: ClassVar[str]

    @dataclass(frozen=True, kw_only=True)
    class Config(LatentGuidance.Config):
        weighting_strategy: Weighting = "sds"
        """w(t): sds 1 - abar, uniform 1, fantasia3d sqrt(abar) (1 - abar)."""
        use_sjc: bool = False
        var_red: bool = True
        """With ``use_sjc``: compare the denoised latents with the clean ones, not the noisy ones."""

    cfg: Config

    def distill(
        self,
        latents: Float[Tensor, "B C *S"],
        timesteps: Int[Tensor, "B"],
        noise: Float[Tensor, "B C *S"],
        text: Float[Tensor, "B L E"],
        uncond: Float[Tensor, "B L E"],
        *,
        step: int,
    ) -> GuidanceOutput:
        """The loss at given noise levels and noise; no randomness of its own."""
        clean = latents.detach()
        scales = self.models.schedule.scales(timesteps, latents.ndim)
        noisy = add_noise(clean, noise, scales)
        # + 1: these priors' scale is counted from the text prediction, ours from the uncond.
        x0 = classifier_free_guidance(
            *self.predict_x0(noisy, timesteps, text, uncond), self.cfg.guidance_scale + 1
        )
        if self.cfg.use_sjc:
            grad = sjc_gradient(clean, noise, x0, scales, self.cfg.var_red)
        else:
            grad = sds_gradient(clean, x0, scales, self.cfg.weighting_strategy)
        grad = self.bound(grad, step)
        return self.output({self.loss_name: score_loss(latents, grad)}, grad, step)

    @abstractmethod
    def forward(self, rgb, text, cameras, *, step, generator) -> GuidanceOutput: ...
