"""Stable Diffusion 3 and 3.5 (Esser et al. 2024) as a prior: a flow transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from fourdfy.bounds import number
from fourdfy.config import file_path
from fourdfy.priors.base import Network
from fourdfy.priors.hub import stored_description
from fourdfy.priors.latent import LatentPrior
from fourdfy.priors.pooled import split_pooled
from fourdfy.registry import register


@register("sd3")
class StableDiffusion3(LatentPrior):
    @dataclass(frozen=True, kw_only=True)
    class Config(LatentPrior.Config):
        networks: ClassVar[dict[str, str]] = {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"}
        parts: ClassVar[tuple[str, ...]] = ("transformer", "vae", "scheduler")
        text_keys: ClassVar[tuple[str, str]] = ("d_model", "joint_attention_dim")
        is_flow: ClassVar[bool] = True
        text_processors: ClassVar[tuple[str, ...]] = ("sd3-prompt-processor",)

        pretrained_model_name_or_path: str = file_path("stabilityai/stable-diffusion-3.5-medium")
        height: int = number(1024, 1, 8192)
        """Pixels that images are resized to before the VAE; the model's own size is 1024 x 1024."""
        width: int = number(1024, 1, 8192)
        """Pixels, as ``height``."""
        half_precision_weights: bool | str = "bf16"
        """"bf16", the type of Stable Diffusion 3.5, true (float16) or false."""

        @staticmethod
        def multiple(vae: Mapping[str, Any], denoiser: Mapping[str, Any]) -> int:
            return LatentPrior.Config.multiple(vae, denoiser) * StableDiffusion3.patch

        def check_models(self) -> None:
            super().check_models()
            name = self.pretrained_model_name_or_path
            vae, network = (stored_description(name, part) for part in ("vae", "transformer"))
            most = network.get("pos_embed_max_size", 384) * self.multiple(vae, network)
            if max(self.height, self.width) > most:
                raise ValueError(
                    f"height={self.height}, width={self.width}: {name} knows the places of {most} pixels "
                    f"along each side; set both to {most} at most"
                )

        def text_channels(self, name: str) -> int | None:
            return stored_description(name, "text_encoder_3").get("d_model")

    cfg: Config
    patch: ClassVar[int] = 2

    def told(
        self,
        network: Network,
        noisy: Float[Tensor, "B C h w"],
        text_embeddings: Float[Tensor, "B L E"],
        cameras: Float[Tensor, "B K"] | None,
    ) -> dict[str, Any]:
        config = network.config
        states, pooled = split_pooled(
            text_embeddings, config.joint_attention_dim, config.pooled_projection_dim, "sd3-prompt-processor"
        )
        return super().told(network, noisy, states, cameras) | {"pooled_projections": pooled}

    def time_embedding(self, network: Network) -> nn.Module:
        return network.time_text_embed.timestep_embedder
