"""Variational score distillation (Wang et al. 2023, ProlificDreamer).

A LoRA learns what the renderings look like from each camera; the update is the difference between the
frozen prior's score and the LoRA's.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor, nn

from fourdfy.bounds import number, scheduled
from fourdfy.config import file_path
from fourdfy.guidance.distillation import Distillation, NoisyLatents
from fourdfy.ops.cameras import projection_matrix
from fourdfy.ops.diffusion import (
    add_noise,
    classifier_free_guidance,
    prediction_target,
    sample_noise,
    x0_from_prediction,
)
from fourdfy.ops.distillation import score_loss, vsd_gradient
from fourdfy.ops.ranks import spread
from fourdfy.ops.replay import Replay, beside
from fourdfy.priors.frozen import to_channels_last
from fourdfy.priors.lora import LoRA
from fourdfy.prompts.views import for_views
from fourdfy.registry import register
from fourdfy.schedules import Schedule
from fourdfy.types import Cameras, Conditions, StepContext

CAMERA_DROP = 0.1
"""How often the LoRA is trained without its cameras, so that guidance on them is possible."""


@register("vsd")
class VariationalScoreDistillation(Distillation):
    """Losses ``vsd`` (moves the scene) and ``lora`` (trains the adapter and the camera embedding, where
    the optimizer has them).

    The adapter sits on a separate network or, if both paths name one model, on the prior's,
    where it is active only in its own calls.
    """

    losses: ClassVar[tuple[str, ...]] = ("vsd", "lora")
    own_losses: ClassVar[tuple[str, ...]] = ("lora",)

    @dataclass(frozen=True, kw_only=True)
    class Config(Distillation.Config):
        pretrained_model_name_or_path_lora: str | None = file_path()
        """The model that the adapter sits on: ``unet`` and ``scheduler``; null: the prior's own."""
        guidance_scale: Schedule = scheduled(7.5, 0, 10_000)
        """Counted from the unconditional prediction: uncond + scale (text - uncond)."""
        guidance_scale_lora: float = number(1.0, 0, 10_000)
        """Scale of the LoRA, counted from its prediction without text and camera; 1 is no guidance."""
        anneal_start_step: int | None = number(5000, 0)
        lora_rank: int = number(4, 1, 1024)
        """Rank of the LoRA's matrices."""
        lora_cfg_training: bool = True
        """Drop the cameras of some batches, so that the LoRA also learns to predict without them."""
        lora_n_timestamp_samples: int = number(1, 1, 64)
        """Noise levels per latent in the LoRA's own loss."""
        camera_condition_type: Literal["extrinsics", "mvp"] = "extrinsics"
        """Condition the LoRA on the camera-to-world matrix, distance included, or (``mvp``) on the projection
        of the world-to-camera matrix, which includes the field of view."""

        def models(self) -> list[tuple[str, tuple[str, ...]]]:
            own, second = super().models(), self.pretrained_model_name_or_path_lora
            if second is None:
                return own
            parts = tuple(part for part in own[0][1] if part != "vae") if own else ()
            return [*own, (second, parts)]

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.still_guidance_scale != 1:
                raise ValueError(
                    f"still_guidance_scale={self.still_guidance_scale:g}: here the LoRA sees the clip held "
                    "still; set guidance_scale_lora"
                )
            for key in ("enable_sequential_cpu_offload", "shard_over_ranks"):
                if getattr(self, key, False):
                    raise ValueError(
                        f"{key}=true would move the LoRA that is being trained; "
                        "set it to false for this guidance"
                    )

    cfg: Config

    def __init__(self, cfg: Config, *, device: torch.device) -> None:
        super().__init__(cfg, device=device)
        from diffusers.models.embeddings import TimestepEmbedding

        second = cfg.pretrained_model_name_or_path_lora
        self.renderings = self.prior.load_denoiser(second) if second else self.prior.denoiser
        network = self.renderings.network
        layers = self.prior.time_embedding(network).modules()
        *_, last = (layer for layer in layers if isinstance(layer, nn.Linear))
        self.camera_embedding = TimestepEmbedding(16, last.out_features).to(self.device)
        self.lora = LoRA(network, cfg.lora_rank, self.prior.lora_targets)
        self.denoise_renderings: Callable[..., Tensor] = self.predict_renderings
        """``predict_renderings`` for use without gradients."""
        self.recorded_lora: Replay | None = None
        """``lora_gradients``, if it can be recorded."""

    def accelerate(self, compile_small: bool) -> None:
        super().accelerate(compile_small)
        if not self.prior.can_be_recorded:
            return
        # Not compiled: that would take minutes for each of its forms, to save milliseconds of some steps.
        to_channels_last(self.renderings.network)
        name = f"the LoRA on {self.cfg.pretrained_model_name_or_path_lora or 'the prior'}"
        self.denoise_renderings = Replay(self.predict_renderings, name)
        self.recorded_lora = Replay(self.lora_gradients, name, alone=True)

    def distil(
        self, x: NoisyLatents, context: StepContext
    ) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, "B C *S"]]:
        source = x.still or x
        # The LoRA is conditioned on the camera itself, so its text does not mention the view.
        texts = self.prior.condition(for_views(source.text, x.cameras, view_dependent=False), x.cameras)
        camera = self.camera_matrices(x.cameras).flatten(1)
        # First, since it may run beside the other networks.
        learning = (
            self.start_learning(source.clean, texts, camera, context.random) if self._learning() else None
        )
        guided, _ = self.guided_x0(x, context.at_step(self.cfg.guidance_scale))
        renderings = self.predict_x0_of_renderings(source.noisy, x.timesteps, texts, camera)
        if x.still:  # not always: the sum rounds
            renderings = renderings + (x.clean - source.clean)
        grad = self.bound(self.prior.adjust(vsd_gradient(guided, renderings, x.scales)), context)
        losses = {"vsd": score_loss(x.latents, grad)}
        if learning:
            losses["lora"] = learning()
        return losses, grad

    def camera_matrices(self, cameras: Cameras) -> Float[Tensor, "B 4 4"]:
        """The LoRA's conditioning on each camera."""
        if self.cfg.camera_condition_type == "extrinsics":
            return cameras.c2w
        projection = projection_matrix(cameras.fovy_deg, cameras.width / cameras.height)
        # inv waits for the device, to see whether it failed; a pose can be inverted.
        return projection @ torch.linalg.inv_ex(cameras.c2w).inverse

    @torch.no_grad()
    def predict_x0_of_renderings(
        self,
        noisy: Float[Tensor, "B C *S"],
        timesteps: Real[Tensor, "B"],
        texts: Conditions,
        camera: Float[Tensor, "B 16"],
    ) -> Float[Tensor, "B C *S"]:
        """The LoRA's guided x_0, without a graph."""
        schedule = self.renderings.schedule
        scales = schedule.scales(timesteps, noisy.ndim)
        scale = self.cfg.guidance_scale_lora
        # At 1 the unconditional half would be multiplied by zero.
        halves = ((texts.text, camera), (texts.uncond, torch.zeros_like(camera)))[: 1 if scale == 1 else 2]
        text, told = (torch.cat(x) for x in zip(*halves, strict=True))
        prediction = spread(
            self.denoise_renderings,
            torch.cat([noisy] * len(halves)),
            torch.cat([timesteps] * len(halves)),
            text,
            told,
            None if texts.cameras is None else torch.cat([texts.cameras] * len(halves)),
            group=self.prior.joint_latents,
        )
        x0, *uncond = (
            x0_from_prediction(part, noisy, scales, schedule.prediction)
            for part in prediction.chunk(len(halves))
        )
        return classifier_free_guidance(x0, uncond[0], scale) if uncond else x0

    def start_learning(
        self,
        latents: Float[Tensor, "B C *S"],
        texts: Conditions,
        camera: Float[Tensor, "B 16"],
        generator: torch.Generator,
    ) -> Callable[[], Float[Tensor, ""]]:
        """What returns the diffusion loss of the LoRA on the renderings, at all noise levels."""
        repeat = self.cfg.lora_n_timestamp_samples
        schedule = self.prior.levels(self.renderings.schedule, latents)
        # Each time anew, since a prior of several views has one level for all that it is asked for at once.
        draws = (self.prior.draw_timesteps(schedule, 0, 1, len(latents), generator) for _ in range(repeat))
        timesteps = torch.cat([*draws])
        latents, text, camera = (torch.cat([x] * repeat) for x in (latents, texts.text, camera))
        told = None if texts.cameras is None else torch.cat([texts.cameras] * repeat)
        noise = sample_noise(latents.shape, generator, self.device)
        if self.cfg.lora_cfg_training:
            chance = torch.rand((), generator=generator, device=generator.device).to(self.device)
            camera = torch.where(chance < CAMERA_DROP, torch.zeros_like(camera), camera)
        scales = schedule.scales(timesteps, latents.ndim)
        target = prediction_target(latents, noise, scales, schedule.prediction)
        inputs = (add_noise(latents, noise, scales), timesteps, text, camera, told)
        if self.recorded_lora is None:
            group = self.prior.joint_latents
            return lambda: F.mse_loss(spread(self.predict_renderings, *inputs, group=group), target)
        learns = tuple(parameter.requires_grad for parameter in self.parameters())
        started = beside(self.recorded_lora, target, *inputs, variant=learns)
        return lambda: _LossOfKnownGradient.apply(*started(), *self._learning())

    def lora_gradients(
        self, target: Float[Tensor, "B C *S"], *inputs: Any
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "P"]]:
        """The LoRA's loss and its gradient, all parameters that learn in one row.

        Args:
            inputs: those of ``predict_renderings``.
        """
        with torch.enable_grad():
            loss = F.mse_loss(self.predict_renderings(*inputs), target)
            # A mean's gradients are small for half precision. A power of two rounds nothing.
            scale = 2.0 ** round(math.log2(target.numel()))
            grads = torch.autograd.grad(scale * loss, self._learning())
        return loss.detach(), torch.cat([grad.flatten() for grad in grads]) / scale

    def _learning(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def predict_renderings(
        self,
        noisy: Float[Tensor, "B C *S"],
        timesteps: Real[Tensor, "B"],
        text_embeddings: Float[Tensor, "B L E"],
        camera: Float[Tensor, "B 16"],
        told: Float[Tensor, "B K"] | None = None,
    ) -> Float[Tensor, "B C *S"]:
        """The raw prediction of the network with adapter and camera; carries their graph.

        Args:
            told: the network's own conditioning on the cameras, without the adapter.
        """
        network = self.renderings.network
        with self.lora.active(), self._told(network, camera), torch.compiler.set_stance("force_eager"):
            # As it is, although it may be the prior's own network, whose layers are compiled.
            return self.prior.predict(network, noisy, timesteps, text_embeddings, told)

    @contextlib.contextmanager
    def _told(self, network: nn.Module, camera: Float[Tensor, "B 16"]) -> Iterator[None]:
        """The camera's embedding is added to the noise level's; not left in place: the prior's network, which
        may be the same, takes no cameras."""

        def add_camera(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return output + self.camera_embedding(camera).to(output.dtype)

        hook = self.prior.time_embedding(network).register_forward_hook(add_camera)
        try:
            yield
        finally:
            hook.remove()


class _LossOfKnownGradient(torch.autograd.Function):
    """A loss whose gradient on some parameters, in one row, was computed with it."""

    @staticmethod
    def forward(ctx, loss, gradient, *parameters):
        ctx.save_for_backward(gradient)
        ctx.shapes = [parameter.shape for parameter in parameters]
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        parts = (upstream * gradient).split([shape.numel() for shape in ctx.shapes])
        return None, None, *(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))
