"""Stable Diffusion XL (Podell et al. 2023) as a prior: a U-Net that is told an image's sizes, too."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.bounds import number
from fourdfy.config import file_path
from fourdfy.priors.base import Network
from fourdfy.priors.hub import stored_description
from fourdfy.priors.latent import LatentPrior
from fourdfy.priors.pooled import split_pooled
from fourdfy.registry import register


@register("sdxl")
class StableDiffusionXL(LatentPrior):
    @dataclass(frozen=True, kw_only=True)
    class Config(LatentPrior.Config):
        text_processors: ClassVar[tuple[str, ...]] = ("sdxl-prompt-processor",)
        float32_vae: ClassVar[bool] = True

        pretrained_model_name_or_path: str = file_path("stabilityai/stable-diffusion-xl-base-1.0")
        height: int = number(1024, 1, 8192)
        """Pixels that images are resized to before the VAE; the model's own size is 1024 x 1024."""
        width: int = number(1024, 1, 8192)
        """Pixels, as ``height``."""

        def text_channels(self, name: str) -> int | None:
            encoders = (stored_description(name, part) for part in ("text_encoder", "text_encoder_2"))
            return sum(encoder.get("hidden_size", 0) for encoder in encoders) or None

    cfg: Config

    @cached_property
    def sizes(self) -> Float[Tensor, "1 6"]:
        """What the network is told of an image: its first size, where it was cut out, and its size."""
        return torch.tensor([[*self.image_size, 0.0, 0.0, *self.image_size]], device=self.device)

    def told(
        self,
        network: Network,
        noisy: Float[Tensor, "B C h w"],
        text_embeddings: Float[Tensor, "B L E"],
        cameras: Float[Tensor, "B K"] | None,
    ) -> dict[str, Any]:
        config = network.config
        pooled_channels = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        states, pooled = split_pooled(
            text_embeddings, config.cross_attention_dim, pooled_channels, "sdxl-prompt-processor"
        )
        added = {"text_embeds": pooled, "time_ids": self.sizes.expand(len(pooled), -1)}
        return super().told(network, noisy, states, cameras) | {"added_cond_kwargs": added}
