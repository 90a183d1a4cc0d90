"""MVDream as a prior (Shi et al. 2023): SD 2.1's U-Net, camera vectors, attention over views.

The U-Net is a plain ``UNet2DConditionModel`` with a projection class embedding of the camera; what
is not in it is the attention over the views of a group, which ``enable_multi_view_attention`` adds.

B images = groups of V views, the views of a group neighbours in the batch; L tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fourdfy.bounds import number
from fourdfy.config import file_path
from fourdfy.priors.base import Denoiser
from fourdfy.priors.frozen import MEMORY_OPTIONS
from fourdfy.priors.hub import MODELS
from fourdfy.priors.latent import LatentPrior
from fourdfy.priors.mvdream_package import load_mvdream_package
from fourdfy.registry import register
from fourdfy.types import Cameras, Conditions

PUBLISHED_VIEWS = 4
"""Number of views of MVDream's checkpoints, and of the model that ships with this package."""


@register("mvdream")
class MVDream(LatentPrior):
    """Denoises the views of a group together, conditioned on their cameras."""

    follows_autocast: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class Config(LatentPrior.Config):
        pretrained_model_name_or_path: str = file_path("MVDream/MVDream")
        model_name: Literal["sd-v2.1-base-4view", "sd-v1.5-4view"] = "sd-v2.1-base-4view"
        """The checkpoint's name in the original code; only the first is supported."""
        ckpt_path: str | None = file_path()
        """The original's checkpoint file, or a folder in diffusers layout, instead of the hub's model."""
        backend: Literal["diffusers", "mvdream"] = "diffusers"
        """The networks' code: ours on diffusers, or the authors' package for comparison. The package
        supports only checkpoint files and float32, whatever ``half_precision_weights`` says, and no options
        for memory."""
        image_size: int | None = number(None, 1, 8192)
        """Height and width if these are null."""
        n_view: int = number(PUBLISHED_VIEWS, 2, 64)
        """Number of views that attend to each other; the data must have as many in a group."""
        camera_condition_type: Literal["rotation"] = "rotation"
        """Condition on rotation and direction of the position; the model does not see the distance."""
        view_dependent_prompting: bool = False
        """False, unlike in other priors: this prior is conditioned on the camera itself."""

        def models(self) -> list[tuple[str, tuple[str, ...]]]:
            return [(self.ckpt_path or self.pretrained_model_name_or_path, self.parts)]

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.model_name == "sd-v1.5-4view":
                raise ValueError(
                    "model_name=sd-v1.5-4view is not supported: nothing here converts its networks, "
                    "those of Stable Diffusion 1.5; set model_name=sd-v2.1-base-4view"
                )
            if self.backend == "mvdream":
                for key in ("token_merging", "recon_pixels", *MEMORY_OPTIONS):
                    if getattr(self, key, False):
                        raise ValueError(f"{key}=true needs backend=diffusers; change one of the two")
                if getattr(self, "pretrained_model_name_or_path_lora", "") is None:
                    raise ValueError(
                        "pretrained_model_name_or_path_lora: backend=mvdream has no place for a LoRA; name a "
                        "model in diffusers layout, or set backend=diffusers"
                    )
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

        def dtype(self, device: torch.device) -> torch.dtype:
            return torch.float32 if self.backend == "mvdream" else super().dtype(device)

        def check_group_size(self, size: int, key: str) -> None:
            if size != self.n_view:
                raise ValueError(
                    f"n_view={self.n_view} disagrees with {key}={size}; set {key}={self.n_view}, "
                    f"or n_view={size} for a model that was trained on {size} views"
                )

    cfg: Config

    def __init__(self, cfg: Config, *, device: torch.device) -> None:
        super().__init__(cfg, device=device)
        self.joint_latents = cfg.n_view

    @property
    def can_be_recorded(self) -> bool:
        return super().can_be_recorded and self.cfg.backend == "diffusers"

    def load(self) -> tuple[Denoiser, nn.Module]:
        if self.cfg.backend == "diffusers":
            return super().load()
        checkpoint, _ = self.cfg.models()[0]
        return load_mvdream_package(self.cfg.model_name, checkpoint, self.cfg.n_view, self.dtype, self.device)

    def load_unet(self, folder: Path) -> nn.Module:
        unet = super().load_unet(folder)
        enable_multi_view_attention(unet, self.cfg.n_view)
        return unet

    def condition(self, texts: Conditions, cameras: Cameras) -> Conditions:
        return texts._replace(cameras=camera_vectors(cameras.c2w).to(self.dtype))


def enable_multi_view_attention(unet: nn.Module, num_views: int = 4) -> None:
    """Let the ``num_views`` neighbours of a batch see each other in every self-attention.

    Each ``attn1`` of ``unet`` keeps its weights and its kernel (SDPA, sliced, xformers); only its
    tokens are regrouped. Cross attention, convolutions and norms stay per image. Call it after the
    attention kernel was chosen; calling it again changes the number of views.

    Raises:
        ValueError: ``unet`` has no ``attn1``.
    """
    named = (module for name, module in unet.named_modules() if name.rpartition(".")[2] == "attn1")
    blocks = [module for module in named if not module.is_cross_attention]  # only_cross_attention
    if not blocks:
        raise ValueError(f"{type(unet).__name__} has no self-attention (attn1) for views to share")
    for block in blocks:
        kernel = block.processor
        if isinstance(kernel, MultiViewAttention):
            kernel = kernel.kernel
        block.set_processor(MultiViewAttention(kernel, num_views))


def camera_vectors(c2w: Float[Tensor, "B 4 4"]) -> Float[Tensor, "B 16"]:
    """The input of MVDream's camera embedding: ``c2w`` row by row, its position scaled to unit length.

    The model does not see distance and field of view. A camera at the origin stays there.
    """
    position = c2w[:, :3, 3]
    # 1e-8 is added and not a lower bound, as in the published vectors.
    unit = position / (torch.linalg.vector_norm(position, dim=-1, keepdim=True) + 1e-8)
    top = torch.cat([c2w[:, :3, :3], unit[:, :, None]], dim=-1)
    return torch.cat([top, c2w[:, 3:]], dim=1).flatten(1)


class MultiViewAttention:
    """A diffusers attention processor: another one, on the tokens of all views of a group."""

    def __init__(self, kernel: Callable[..., Tensor], num_views: int) -> None:
        self.kernel = kernel
        self.num_views = num_views

    @no_type_check  # torch.compile can't look into a checker
    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Float[Tensor, "B L C"],
        encoder_hidden_states: None = None,
        attention_mask: None = None,
    ) -> Float[Tensor, "B L C"]:
        assert encoder_hidden_states is None and attention_mask is None
        batch, tokens, channels = hidden_states.shape
        if batch % self.num_views:
            raise ValueError(
                f"{batch} images do not fill whole groups of {self.num_views} views; "
                f"use a multiple of {self.num_views}"
            )
        grouped = hidden_states.reshape(batch // self.num_views, self.num_views * tokens, channels)
        return self.kernel(attn, grouped).reshape(batch, tokens, channels)
