"""Wan 2.1 (Wan Team 2025), a text-to-video model, as a prior: a flow transformer behind a causal VAE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from fourdfy.bounds import number
from fourdfy.config import file_path
from fourdfy.priors.base import Network
from fourdfy.priors.causal_vae import wan_moments
from fourdfy.priors.causal_video import CausalVideoPrior
from fourdfy.priors.hub import stored_folder
from fourdfy.priors.model_folder import read_mapping
from fourdfy.registry import register


@register("wan")
class Wan(CausalVideoPrior):
    moments = staticmethod(wan_moments)

    patch: ClassVar[int] = 2

    @dataclass(frozen=True, kw_only=True)
    class Config(CausalVideoPrior.Config):
        networks: ClassVar[dict[str, str]] = {
            "transformer": "WanTransformer3DModel",
            "vae": "AutoencoderKLWan",
        }
        parts: ClassVar[tuple[str, ...]] = ("transformer", "vae", "scheduler")
        text_keys: ClassVar[tuple[str, str]] = ("d_model", "text_dim")
        is_flow: ClassVar[bool] = True
        text_processors: ClassVar[tuple[str, ...]] = ("wan-prompt-processor",)
        float32_vae: ClassVar[bool] = True
        vae_bytes_per_pixel: ClassVar[int] = 13_300
        cache_bytes_per_pixel: ClassVar[int] = 5_600
        fits_float16: ClassVar[bool] = False

        pretrained_model_name_or_path: str = file_path("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
        height: int = number(320, 1, 8192)
        """Pixels that frames are resized to before the VAE; the model's own size is 480 x 832."""
        half_precision_weights: bool | str = "bf16"
        """"bf16" or false: float16 is too narrow for this transformer. The VAE has float32 in any case."""

        @staticmethod
        def multiple(vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> int:
            return vae.get("scale_factor_spatial", 8) * Wan.patch

        def check_models(self) -> None:
            super().check_models()
            name = self.pretrained_model_name_or_path
            folder = stored_folder(name, self.parts)
            index = folder / "model_index.json" if folder else Path()
            # Some files of Wan 2.1 name it too, with nothing behind the name.
            if index.is_file() and any(read_mapping(index).get("transformer_2") or ()):
                raise ValueError(
                    f"pretrained_model_name_or_path={name}: its transformer_2 denoises lower noise levels, "
                    "which is not supported; use a model of one transformer, such as Wan 2.1"
                )

    cfg: Config

    def normalised(self, latents: Float[Tensor, "B C f h w"]) -> Float[Tensor, "B C f h w"]:
        scales = self.vae.config.latents_mean, self.vae.config.latents_std
        centre, spread = (latents.new_tensor(numbers).reshape(-1, 1, 1, 1) for numbers in scales)
        return (latents - centre) / spread

    def time_embedding(self, network: Network) -> nn.Module:
        return network.condition_embedder.time_embedder
