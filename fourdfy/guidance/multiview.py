"""MVDream as a prior (Shi et al. 2023): the views of a group are denoised together.

B images = groups of V views, the views of a group neighbours in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fourdfy.bounds import number
from fourdfy.config import file_path
from fourdfy.guidance.latent import PARTS, LatentGuidance
from fourdfy.ops.diffusion import add_noise
from fourdfy.ops.distillation import reconstruction_loss, rescale_guided_x0, score_loss, sds_gradient
from fourdfy.priors.frozen import FrozenModels
from fourdfy.priors.hub import MODELS
from fourdfy.priors.mvdream import camera_vectors, enable_multi_view_attention
from fourdfy.priors.mvdream_package import load_mvdream_package
from fourdfy.registry import register
from fourdfy.types import Cameras, GuidanceOutput, RenderOutput, StepContext, TextEmbeddings, ViewTexts

PUBLISHED_VIEWS = 4
"""Of MVDream's checkpoints, and of the model that this package brings."""


@register("multiview-diffusion-guidance")
class MultiViewGuidance(LatentGuidance):
    """Loss ``sds``: the distance to the reconstructed x_0, or score distillation."""

    follows_autocast: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class Config(LatentGuidance.Config):
        pretrained_model_name_or_path: str = file_path("MVDream/MVDream")
        model_name: Literal["sd-v2.1-base-4view", "sd-v1.5-4view"] = "sd-v2.1-base-4view"
        """The checkpoint's name in the original code; only the first is supported."""
        ckpt_path: str | None = file_path()
        """The original's checkpoint file, or a folder in diffusers layout, in the place of the hub's."""
        backend: Literal["diffusers", "mvdream"] = "diffusers"
        """The networks' code: ours on diffusers, or the authors' package, to compare with. The package
        takes checkpoint files and float32 alone, and no options for memory."""
        half_precision_weights: bool | str = False
        """False unlike elsewhere: the published runs kept this prior in float32."""
        guidance_scale: float = number(50.0, 0, 10_000)
        """Counted from the unconditional prediction: uncond + scale (text - uncond)."""
        image_size: int | None = number(None, 1, 8192)
        """Height and width where they are not given."""
        n_view: int = number(PUBLISHED_VIEWS, 2, 64)
        """Views that see each other; the data must have as many in a group."""
        camera_condition_type: Literal["rotation"] = "rotation"
        """Rotation and direction of the position; the distance is not seen."""
        view_dependent_prompting: bool = False
        """False unlike elsewhere: this prior is told the camera itself."""
        recon_loss: bool = True
        """Distance to the prior's x_0; false: score distillation weighted by 1 - abar."""
        recon_std_rescale: float = number(0.5, 0, 1)
        """Share of the guided x_0's excess contrast that is taken back, 0..1."""

        def models(self) -> list[tuple[str, tuple[str, ...]]]:
            return [(self.ckpt_path or self.pretrained_model_name_or_path, PARTS)]

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.model_name == "sd-v1.5-4view":
                raise ValueError(
                    "model_name=sd-v1.5-4view is not supported: nothing here converts its networks, "
                    "those of Stable Diffusion 1.5; set model_name=sd-v2.1-base-4view"
                )
            if self.backend == "mvdream" and self.token_merging:
                raise ValueError("token_merging=true needs backend=diffusers; change one of the two")
            if (
                self.n_view != PUBLISHED_VIEWS
                and not self.ckpt_path
                and self.pretrained_model_name_or_path in MODELS
            ):
                raise ValueError(
                    f"n_view={self.n_view}: {self.pretrained_model_name_or_path} denoises {PUBLISHED_VIEWS} "
                    f"views together; set n_view={PUBLISHED_VIEWS}"
                )
            for side in ("height", "width"):
                if getattr(self, side) is None:
                    object.__setattr__(self, side, self.image_size)

        def check_group_size(self, size: int, key: str) -> None:
            if size != self.n_view:
                raise ValueError(
                    f"n_view={self.n_view} disagrees with {key}={size}; set {key}={self.n_view}, "
                    f"or n_view={size} for a model that was trained on {size} views"
                )

    cfg: Config

    def load_models(self) -> FrozenModels:
        if self.cfg.backend == "diffusers":
            return super().load_models()
        checkpoint, _ = self.cfg.models()[0]
        return load_mvdream_package(self.cfg.model_name, checkpoint, self.cfg.n_view, self.dtype, self.device)

    def load_unet(self, folder: Path) -> torch.nn.Module:
        unet = super().load_unet(folder)
        enable_multi_view_attention(unet, self.cfg.n_view)
        return unet

    def forward(
        self,
        frames: RenderOutput,
        text: TextEmbeddings,
        cameras: Cameras,
        context: StepContext,
    ) -> GuidanceOutput:
        latents, timesteps, noise, texts = self.prepare(frames, text, cameras, context)
        # One noise level for all: the network attends over views and has only seen equal ones.
        timesteps = timesteps[:1].expand(len(latents))
        return self.distill(latents, timesteps, noise, texts, cameras.c2w, step=context.step)

    def distill(
        self,
        latents: Float[Tensor, "B C h w"],
        timesteps: Int[Tensor, "B"],
        noise: Float[Tensor, "B C h w"],
        texts: ViewTexts,
        c2w: Float[Tensor, "B 4 4"],
        *,
        step: int,
    ) -> GuidanceOutput:
        """The loss at a given noise level and noise; no randomness of its own."""
        clean = latents.detach()
        scales = self.models.schedule.scales(timesteps, latents.ndim)
        noisy = add_noise(clean, noise, scales)
        cameras = camera_vectors(c2w).to(self.dtype)
        x0, with_text = self.guided_x0(noisy, timesteps, texts, self.cfg.guidance_scale, cameras)
        if self.cfg.recon_loss:
            x0 = rescale_guided_x0(x0, with_text, self.cfg.n_view, self.cfg.recon_std_rescale)
            loss = reconstruction_loss(latents, x0)
            return self.output({"sds": loss}, (clean - x0) / len(clean), step)
        grad = self.bound(sds_gradient(clean, x0, scales, "sds"), step)
        return self.output({"sds": score_loss(latents, grad)}, grad, step)
