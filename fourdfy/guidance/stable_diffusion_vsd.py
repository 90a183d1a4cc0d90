"""Variational score distillation from an image model (Wang et al. 2023, ProlificDreamer).

A LoRA learns what the renderings look like from each camera; the update is the difference between the
frozen prior's score and the LoRA's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fourdfy.bounds import number
from fourdfy.config import file_path
from fourdfy.guidance.latent import LatentGuidance
from fourdfy.ops.cameras import projection_matrix
from fourdfy.ops.diffusion import (
    add_noise,
    classifier_free_guidance,
    prediction_target,
    sample_noise,
    sample_timesteps,
    x0_from_prediction,
)
from fourdfy.ops.distillation import score_loss, vsd_gradient
from fourdfy.priors.frozen import FrozenModels, load_noise_schedule
from fourdfy.priors.hub import resolve_model
from fourdfy.priors.lora import LoRA
from fourdfy.registry import register
from fourdfy.types import Cameras, GuidanceOutput, RenderOutput, StepContext, TextEmbeddings, ViewTexts

CAMERA_DROP = 0.1
"""How often the LoRA learns a batch without its cameras, for guidance on them."""


@register("stable-diffusion-vsd-guidance")
class StableDiffusionVSDGuidance(LatentGuidance):
    """Losses ``vsd`` (moves the scene) and ``lora`` (trains the adapter and the camera embedding, where
    the optimizer has them).

    The adapter sits on a U-Net of its own, or, where both paths name one model, on the prior's U-Net,
    switched on only for its own calls.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(LatentGuidance.Config):
        pretrained_model_name_or_path_lora: str = file_path("stabilityai/stable-diffusion-2-1")
        """The model that the adapter sits on: ``unet`` and ``scheduler``."""
        guidance_scale: float = number(7.5, 0, 10_000)
        """Counted from the unconditional prediction: uncond + scale (text - uncond)."""
        guidance_scale_lora: float = number(1.0, 0, 10_000)
        """Of the LoRA, counted from its prediction without text and camera; 1 is no guidance."""
        anneal_start_step: int | None = number(5000, 0)
        lora_rank: int = number(4, 1, 1024)
        lora_cfg_training: bool = True
        """Drop the cameras of some batches, so that the LoRA also knows its images without them."""
        lora_n_timestamp_samples: int = number(1, 1, 64)
        """Noise levels per image in the LoRA's own loss."""
        camera_condition_type: Literal["extrinsics", "mvp"] = "extrinsics"
        """The LoRA sees the camera-to-world matrix as it is, distance included, or the projection with it,
        which tells the angle of view too."""

        def models(self) -> list[tuple[str, tuple[str, ...]]]:
            return [*super().models(), (self.pretrained_model_name_or_path_lora, ("unet", "scheduler"))]

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.enable_sequential_cpu_offload:
                raise ValueError(
                    "enable_sequential_cpu_offload=true would move the LoRA that is being trained; "
                    "set it to false for this guidance"
                )

    cfg: Config

    def __init__(self, cfg: Config, *, device: torch.device) -> None:
        super().__init__(cfg, device=device)
        from diffusers.models.embeddings import TimestepEmbedding

        unet = self.models.unet_lora
        width = unet.time_embedding.linear_2.out_features
        self.camera_embedding = TimestepEmbedding(16, width).to(self.device)
        self.lora = LoRA(unet, cfg.lora_rank)

    def load_models(self) -> FrozenModels:
        models = super().load_models()
        folder, folder_lora = (resolve_model(*model) for model in self.cfg.models())
        if folder_lora.resolve() == folder.resolve():
            return FrozenModels(**vars(models), unet_lora=models.unet, schedule_lora=models.schedule)
        return FrozenModels(
            **vars(models),
            unet_lora=self.load_unet(folder_lora),
            schedule_lora=load_noise_schedule(folder_lora, self.device),
        )

    def forward(
        self,
        frames: RenderOutput,
        text: TextEmbeddings,
        cameras: Cameras,
        context: StepContext,
    ) -> GuidanceOutput:
        latents, timesteps, noise, texts = self.prepare(frames, text, cameras, context)
        # The LoRA is told the camera itself, so its text says nothing of the view.
        lora_texts = text.for_views(cameras, view_dependent=False)
        camera = self.camera_matrices(cameras).flatten(1)
        grad = self.vsd_gradient(latents.detach(), timesteps, noise, texts, lora_texts, camera)
        grad = self.bound(grad, context.step)
        losses = {"vsd": score_loss(latents, grad)}
        if any(parameter.requires_grad for parameter in self.parameters()):
            losses["lora"] = self.lora_loss(latents.detach(), lora_texts.text, camera, context.generator)
        return self.output(losses, grad, context.step)

    def camera_matrices(self, cameras: Cameras) -> Float[Tensor, "B 4 4"]:
        """What the LoRA is told of each camera."""
        if self.cfg.camera_condition_type == "extrinsics":
            return cameras.c2w
        projection = projection_matrix(cameras.fovy_deg, cameras.width / cameras.height)
        return projection @ torch.linalg.inv(cameras.c2w)

    def vsd_gradient(
        self,
        latents: Float[Tensor, "B C h w"],
        timesteps: Int[Tensor, "B"],
        noise: Float[Tensor, "B C h w"],
        texts: ViewTexts,
        lora_texts: ViewTexts,
        camera: Float[Tensor, "B 16"],
    ) -> Float[Tensor, "B C h w"]:
        """The update at given noise levels and noise; no randomness of its own."""
        scales = self.models.schedule.scales(timesteps, latents.ndim)
        noisy = add_noise(latents, noise, scales)
        prior, _ = self.guided_x0(noisy, timesteps, texts, self.cfg.guidance_scale)
        renderings = self.predict_x0_of_renderings(noisy, timesteps, lora_texts, camera)
        return vsd_gradient(prior, renderings, scales)

    @torch.no_grad()
    def predict_x0_of_renderings(
        self,
        noisy: Float[Tensor, "B C h w"],
        timesteps: Int[Tensor, "B"],
        texts: ViewTexts,
        camera: Float[Tensor, "B 16"],
    ) -> Float[Tensor, "B C h w"]:
        """What the LoRA takes for clean: its guided x_0, without a graph."""
        schedule = self.models.schedule_lora
        scales = schedule.scales(timesteps, noisy.ndim)
        if self.cfg.guidance_scale_lora == 1:
            # The unconditional half would be multiplied by zero.
            prediction = self.run_lora_unet(noisy, timesteps, texts.text, camera)
            return x0_from_prediction(prediction, noisy, scales, schedule.prediction)
        prediction = self.run_lora_unet(
            torch.cat([noisy, noisy]),
            torch.cat([timesteps, timesteps]),
            torch.cat([texts.text, texts.uncond]),
            torch.cat([camera, torch.zeros_like(camera)]),
        )
        halves = (x0_from_prediction(p, noisy, scales, schedule.prediction) for p in prediction.chunk(2))
        return classifier_free_guidance(*halves, self.cfg.guidance_scale_lora)

    def lora_loss(
        self,
        latents: Float[Tensor, "B C h w"],
        states: Float[Tensor, "B L E"],
        camera: Float[Tensor, "B 16"],
        generator: torch.Generator,
    ) -> Float[Tensor, ""]:
        """The diffusion loss of the LoRA on the renderings, at all noise levels."""
        repeat = self.cfg.lora_n_timestamp_samples
        latents, states, camera = (torch.cat([x] * repeat) for x in (latents, states, camera))
        schedule = self.models.schedule_lora
        timesteps = sample_timesteps(0, len(schedule) - 1, len(latents), generator, self.device)
        noise = sample_noise(latents.shape, generator, self.device)
        if self.cfg.lora_cfg_training:
            chance = torch.rand((), generator=generator, device=generator.device).to(self.device)
            camera = torch.where(chance < CAMERA_DROP, torch.zeros_like(camera), camera)
        return self.lora_loss_at(latents, timesteps, noise, states, camera)

    def lora_loss_at(
        self,
        latents: Float[Tensor, "B C h w"],
        timesteps: Int[Tensor, "B"],
        noise: Float[Tensor, "B C h w"],
        states: Float[Tensor, "B L E"],
        camera: Float[Tensor, "B 16"],
    ) -> Float[Tensor, ""]:
        """``lora_loss`` at given noise levels, noise and cameras; no randomness of its own."""
        schedule = self.models.schedule_lora
        scales = schedule.scales(timesteps, latents.ndim)
        prediction = self.run_lora_unet(add_noise(latents, noise, scales), timesteps, states, camera)
        return F.mse_loss(prediction, prediction_target(latents, noise, scales, schedule.prediction))

    def run_lora_unet(
        self,
        noisy: Float[Tensor, "N C h w"],
        timesteps: Int[Tensor, "N"],
        states: Float[Tensor, "N L E"],
        camera: Float[Tensor, "N 16"],
    ) -> Float[Tensor, "N C h w"]:
        """The raw prediction of the U-Net with adapter and cameras; carries their graph."""
        with self.lora.active(), self._with_camera_embedding():
            return self.call_unet(self.models.unet_lora, noisy, timesteps, states, camera)

    @contextlib.contextmanager
    def _with_camera_embedding(self) -> Iterator[None]:
        # Not left in place: the prior may be the same U-Net, and it takes no cameras.
        unet = self.models.unet_lora
        unet.class_embedding = self.camera_embedding
        try:
            yield
        finally:
            unet.class_embedding = None
