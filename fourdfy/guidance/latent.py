"""What the latent diffusion priors share: settings, images to latents, and the networks' x_0.

A subclass turns x_0 into its loss. Tests (and new priors) replace ``load_models``, ``load_unet`` or
``run_unet``; nothing else touches a network.

N rendered frames of H x W pixels, B latents of h x w (images, or videos with a frame axis behind the
channels), C channels, L tokens, E text channels, K numbers of a camera.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fourdfy.bounds import number, scheduled
from fourdfy.config import file_path, ignored
from fourdfy.guidance.base import Guidance
from fourdfy.ops.diffusion import (
    add_noise,
    classifier_free_guidance,
    lead_away,
    sample_noise,
    sample_timesteps,
    timestep_range,
    x0_from_prediction,
)
from fourdfy.ops.distillation import Weighting, bounded, score_loss, sds_gradient, sjc_gradient
from fourdfy.priors.frozen import (
    FrozenModels,
    Gradient,
    MemoryOptions,
    apply_memory_options,
    encode_images,
    load_noise_schedule,
    load_part,
    vae_factor,
)
from fourdfy.priors.hub import resolve_model, stored_description
from fourdfy.schedules import Schedule, schedule_value
from fourdfy.types import Cameras, GuidanceOutput, RenderOutput, StepContext, TextEmbeddings, ViewTexts

PARTS = ("unet", "vae", "scheduler")

VAE_BYTES_PER_PIXEL = 11_000
"""Activations of Stable Diffusion's VAE encoder in 16 bits, per pixel of its input."""


class LatentGuidance(Guidance):
    """A latent diffusion model as a prior on rendered images."""

    unet_class: ClassVar[str] = "UNet2DConditionModel"
    follows_autocast: ClassVar[bool] = False
    """Whether the networks run in the trainer's mixed precision, or in the type of their weights."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MemoryOptions, Guidance.Config):
        pretrained_model_name_or_path: str = file_path("stabilityai/stable-diffusion-2-1-base")
        """Folder, embedded name or hub id with ``unet``, ``vae`` and ``scheduler``."""
        height: int | None = number(None, 1, 8192)
        width: int | None = number(None, 1, 8192)
        """Pixels that images are resized to before the VAE; null: the model's own size."""
        min_step_percent: Schedule = scheduled(0.02, 0, 0.999)
        max_step_percent: Schedule = scheduled(0.98, 0, 0.999)
        """Range of the noise level, as shares of the model's timesteps; scheduled scalars."""
        max_step_percent_annealed: float = number(0.5, 0, 0.999)
        anneal_start_step: int | None = number(None, 0)
        """Beyond this global step ``max_step_percent_annealed`` replaces ``max_step_percent``."""
        grad_clip: Schedule = scheduled(None, 0)
        """Bound on each entry of the latents' gradient; a scheduled scalar or null."""
        view_dependent_prompting: bool = True
        """Ask with the text of each frame's view (of a video's first frame), not with the plain prompt."""
        cache_dir: str | None = ignored("HF_HOME says where hub models are kept")
        token_merging: bool = False
        """Fewer tokens in the self-attention of image models, by the package tomesd (Bolya & Hoffman
        2023): faster, and not quite the same prior."""
        token_merging_params: dict[str, Any] | None = None
        """Arguments of ``tomesd.apply_patch``; ``use_rand`` is false unless it stands here."""

        def models(self) -> list[tuple[str, tuple[str, ...]]]:
            return [(self.pretrained_model_name_or_path, PARTS)]

        def activation_bytes(self, frames: int, height: int, width: int) -> int:
            return frames * (self.height or height) * (self.width or width) * VAE_BYTES_PER_PIXEL

        def check_text_encoder(self, name: str) -> None:
            given = stored_description(name, "text_encoder").get("hidden_size")
            for model in [model for model, parts in self.models() if "unet" in parts]:
                read = stored_description(model, "unet").get("cross_attention_dim")
                if given and isinstance(read, int) and read != given:
                    raise ValueError(
                        f"pretrained_model_name_or_path: {model} reads texts of {read} channels, and the "
                        f"prompt processor's pretrained_model_name_or_path={name} gives {given}; set the "
                        f"latter to the model whose text encoder this prior was trained with"
                    )

        def __post_init__(self) -> None:
            for step in sorted(self._turns()):
                low, high = self.noise_range(step)
                if low > high:
                    raise ValueError(
                        f"min_step_percent={self.min_step_percent} is {low:g} at step {step}, where the most "
                        f"is {high:g}; lower it, or raise max_step_percent or max_step_percent_annealed"
                    )
            if self.half_precision_weights not in (True, False, "bf16"):
                raise ValueError(
                    f'half_precision_weights={self.half_precision_weights!r}; expected true, false or "bf16"'
                )
            if self.token_merging and find_spec("tomesd") is None:
                raise ValueError("token_merging=true needs tomesd: pip install tomesd, or set it to false")

        def noise_range(self, step: int) -> tuple[float | int, float | int]:
            """Least and most noise at the global ``step``, as shares of the model's timesteps."""
            annealed = self.anneal_start_step is not None and step > self.anneal_start_step
            high = self.max_step_percent_annealed if annealed else self.max_step_percent
            return schedule_value(self.min_step_percent, step), schedule_value(high, step)

        def _turns(self) -> set[int]:
            """Steps between which the noise range is linear."""
            ramps = [s for s in (self.min_step_percent, self.max_step_percent) if isinstance(s, Sequence)]
            turns = {0, *(turn for ramp in ramps for turn in (*ramp[:-3], ramp[-1]))}
            start = self.anneal_start_step
            return turns if start is None else turns | {start, start + 1}

    cfg: Config

    def __init__(self, cfg: Config, *, device: torch.device) -> None:
        super().__init__(cfg, device=torch.device(device))
        self.dtype = cfg.dtype(self.device)
        self.models = self.load_models()
        self.image_size = self._image_size()

    def load_models(self) -> FrozenModels:
        """The frozen ``unet`` and ``vae``, and their noise ``schedule``."""
        folder = resolve_model(*self.cfg.models()[0])
        return FrozenModels(
            unet=self.load_unet(folder),
            vae=self.load_network(folder, "vae", "AutoencoderKL"),
            schedule=load_noise_schedule(folder, self.device),
        )

    def load_unet(self, folder: Path) -> torch.nn.Module:
        unet = self.load_network(folder, "unet", self.unet_class)
        if self.cfg.token_merging:
            import tomesd

            # Its random choices come from a generator of its own, which no checkpoint would hold.
            tomesd.apply_patch(unet, **{"use_rand": False} | (self.cfg.token_merging_params or {}))
        return unet

    def load_network(self, folder: Path, part: str, class_name: str) -> torch.nn.Module:
        network = load_part(folder, part, class_name, dtype=self.dtype, device=self.device)
        apply_memory_options(network, self.cfg, self.device)
        return network

    def prepare(
        self,
        frames: RenderOutput,
        text: TextEmbeddings,
        cameras: Cameras,
        context: StepContext,
    ) -> tuple[Float[Tensor, "B C *S"], Int[Tensor, "B"], Float[Tensor, "B C *S"], ViewTexts]:
        """(latents, timesteps, noise, texts) of N rendered frames: all that a loss needs."""
        self.cfg.check_group_size(cameras.group_size, "the group_size of the step's cameras")
        latents = self.encode(frames.comp_rgb, cameras.group_size, context.generator)
        timesteps, noise = self.draw(latents, context.step, context.generator)
        # A video has one text: that of the view of its first frame.
        first = cameras[:: len(cameras) // len(latents)]
        return latents, timesteps, noise, text.for_views(first, self.cfg.view_dependent_prompting)

    def encode(
        self, rgb: Float[Tensor, "N H W 3"], group_size: int, generator: torch.Generator
    ) -> Float[Tensor, "B C *S"]:
        """Latents of images in 0..1; gradients reach ``rgb``."""
        return self.encode_images(rgb, generator)

    def encode_images(
        self,
        rgb: Float[Tensor, "N H W 3"],
        generator: torch.Generator,
        chunk: int = 0,
        gradient: Gradient = "exact",
    ) -> Float[Tensor, "N C h w"]:
        """Each image's latents, at the size that the model works at; see ``frozen.encode_images``."""
        images = rgb.movedim(-1, 1)
        if images.shape[-2:] != self.image_size:
            images = F.interpolate(images, self.image_size, mode="bilinear", align_corners=False)
        with self._precision():
            return encode_images(self.models.vae, images, generator, chunk, gradient)

    def guided_x0(
        self,
        noisy: Float[Tensor, "B C *S"],
        timesteps: Int[Tensor, "B"],
        texts: ViewTexts,
        scale: float,
        cameras: Float[Tensor, "B K"] | None = None,
    ) -> tuple[Float[Tensor, "B C *S"], Float[Tensor, "B C *S"]]:
        """What the prior takes for clean, from one network call: (guided by ``scale``, by the text alone).

        Args:
            scale: counted from the unconditional prediction.
        """
        states = (texts.text, texts.uncond, *texts.negatives)
        inputs = (noisy, timesteps) if cameras is None else (noisy, timesteps, cameras)
        noisy_all, timesteps_all, *cameras_all = (torch.cat([x] * len(states)) for x in inputs)
        prediction = self.run_unet(noisy_all, timesteps_all, torch.cat(states), *cameras_all)
        scales = self.models.schedule.scales(timesteps, noisy.ndim)
        with_text, without, *with_negatives = (
            x0_from_prediction(part, noisy, scales, self.models.schedule.prediction)
            for part in prediction.chunk(len(states))
        )
        led = lead_away(with_text, without, with_negatives, texts.weights)
        return classifier_free_guidance(led, without, scale), with_text

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
        return timestep_range(*self.cfg.noise_range(step), step, len(self.models.schedule))

    def draw(
        self, latents: Float[Tensor, "B C *S"], step: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "B"], Float[Tensor, "B C *S"]]:
        """(timesteps, noise) for each of the latents."""
        low, high = self.timestep_range(step)
        timesteps = sample_timesteps(low, high, len(latents), generator, self.device)
        return timesteps, sample_noise(latents.shape, generator, self.device)

    def bound(self, grad: Float[Tensor, "B C *S"], step: int) -> Float[Tensor, "B C *S"]:
        """``grad``, clipped if the config says so."""
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
        guidance_scale: float = number(100.0, 0, 10_000)
        """Counted from the prediction with the text: text + scale (text - uncond), one less than usual."""
        weighting_strategy: Weighting = "sds"
        """w(t): sds 1 - abar, uniform 1, fantasia3d sqrt(abar) (1 - abar)."""
        use_sjc: bool = False
        """Score Jacobian chaining (Wang et al. 2022) in place of score distillation."""
        var_red: bool = True
        """With ``use_sjc``: compare the denoised latents with the clean ones, not the noisy ones."""

    cfg: Config

    def forward(
        self,
        frames: RenderOutput,
        text: TextEmbeddings,
        cameras: Cameras,
        context: StepContext,
    ) -> GuidanceOutput:
        return self.distill(*self.prepare(frames, text, cameras, context), step=context.step)

    def distill(
        self,
        latents: Float[Tensor, "B C *S"],
        timesteps: Int[Tensor, "B"],
        noise: Float[Tensor, "B C *S"],
        texts: ViewTexts,
        *,
        step: int,
    ) -> GuidanceOutput:
        """The loss at given noise levels and noise; no randomness of its own."""
        clean = latents.detach()
        scales = self.models.schedule.scales(timesteps, latents.ndim)
        noisy = add_noise(clean, noise, scales)
        # + 1: these priors' scale is counted from the text prediction, ours from the uncond.
        x0, _ = self.guided_x0(noisy, timesteps, texts, self.cfg.guidance_scale + 1)
        if self.cfg.use_sjc:
            score = sjc_gradient(clean, noise, x0, scales, self.cfg.var_red)
        else:
            score = sds_gradient(clean, x0, scales, self.cfg.weighting_strategy)
        grad = self.bound(self.adjust(score), step)
        return self.output({self.loss_name: score_loss(latents, grad)}, grad, step)

    def adjust(self, score: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
        """What becomes of the weighted score before it is bounded; nothing, unless a prior says more."""
        return score
