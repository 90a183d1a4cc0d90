"""CogVideoX (Yang et al. 2024), a text-to-video model, as a prior: a transformer behind a causal VAE.

B clips, f latents in time of h x w, C channels, L tokens, E text channels, T tokens of a clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float, Real
from torch import Tensor, nn

from fourdfy.bounds import number
from fourdfy.config import file_path
from fourdfy.priors.base import Network
from fourdfy.priors.causal_vae import cogvideox_moments
from fourdfy.priors.causal_video import CausalVideoPrior
from fourdfy.priors.hub import stored_description
from fourdfy.priors.video import VideoPrior
from fourdfy.registry import register


@register("cogvideox")
class CogVideoX(CausalVideoPrior):
    moments = staticmethod(cogvideox_moments)

    @dataclass(frozen=True, kw_only=True)
    class Config(CausalVideoPrior.Config):
        networks: ClassVar[dict[str, str]] = {
            "transformer": "CogVideoXTransformer3DModel",
            "vae": "AutoencoderKLCogVideoX",
        }
        parts: ClassVar[tuple[str, ...]] = ("transformer", "vae", "scheduler")
        text_keys: ClassVar[tuple[str, str]] = ("d_model", "text_embed_dim")
        text_processors: ClassVar[tuple[str, ...]] = ("cogvideox-prompt-processor",)
        frames_in_chunk: ClassVar[int] = 8
        vae_bytes_per_pixel: ClassVar[int] = 5_000
        cache_bytes_per_pixel: ClassVar[int] = 1_000
        block_bytes_per_pixel: ClassVar[int] = 46_000
        """What the largest block of a chunk takes while its gradients are computed."""

        pretrained_model_name_or_path: str = file_path("zai-org/CogVideoX-2b")
        height: int = number(480, 1, 8192)
        """Pixels that frames are resized to before the VAE; the model has seen 480 x 720 alone."""
        width: int = number(720, 1, 8192)
        """Pixels, as ``height``."""
        half_precision_weights: bool | str = True
        """true (float16) for 2B, "bf16" for 5B, or false."""
        low_ram_vae: int = number(8, -1, 1024)
        """Number of frames in the VAE at once, by eights; fewer than all are encoded again in the backward
        pass. 1 to 7: eight, but one residual block's activations at a time, which are computed a third time.
        0 or -1: all."""

        @property
        def by_blocks(self) -> bool:
            """Whether the VAE keeps one residual block's activations at a time."""
            return 0 < self.low_ram_vae < self.frames_in_chunk

        def activation_bytes(self, frames: int, height: int, width: int) -> int:
            kept = 0 if self.by_blocks else self.frames_at_once(frames) * self.vae_bytes_per_pixel
            caches = frames // self.stride * self.cache_bytes_per_pixel
            return self.height * self.width * (self.block_bytes_per_pixel + kept + caches)

        @staticmethod
        def multiple(vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> int:
            levels = len(vae.get("block_out_channels", "1234"))
            return 2 ** (levels - 1) * transformer.get("patch_size", 2)

        def check_models(self) -> None:
            super().check_models()
            name = self.pretrained_model_name_or_path
            transformer = stored_description(name, "transformer")
            if transformer.get("patch_size_t"):
                raise ValueError(
                    f"pretrained_model_name_or_path={name}: CogVideoX 1.5, whose tokens hold two latents in "
                    "time, is not supported; use zai-org/CogVideoX-2b or zai-org/CogVideoX-5b"
                )
            if transformer.get("in_channels", 16) != transformer.get("out_channels", 16):
                raise ValueError(
                    f"pretrained_model_name_or_path={name}: this model continues an image; "
                    "use zai-org/CogVideoX-2b or zai-org/CogVideoX-5b"
                )
            if transformer.get("use_rotary_positional_embeddings") and self.half_precision_weights is True:
                raise ValueError(
                    "half_precision_weights=true is float16, too narrow for CogVideoX-5B; set it to bf16"
                )

    cfg: Config

    def halve_chunks(self, frames: int) -> dict[str, int]:
        # Half of a chunk means a block of it at a time.
        return {} if self.cfg.by_blocks else VideoPrior.halve_chunks(self, frames)

    def normalised(self, latents: Float[Tensor, "B C f h w"]) -> Float[Tensor, "B C f h w"]:
        return latents * self.vae.config.scaling_factor

    def predict(
        self,
        network: nn.Module,
        noisy: Float[Tensor, "B C f h w"],
        timesteps: Real[Tensor, "B"],
        text_embeddings: Float[Tensor, "B L E"],
        cameras: Float[Tensor, "B K"] | None = None,
    ) -> Float[Tensor, "B C f h w"]:
        """The network's prediction; its own axes are B f C h w."""
        prediction = super().predict(network, noisy.transpose(1, 2), timesteps, text_embeddings, cameras)
        return prediction.transpose(1, 2)

    def told(
        self,
        network: Network,
        noisy: Float[Tensor, "B f C h w"],
        text_embeddings: Float[Tensor, "B L E"],
        cameras: Float[Tensor, "B K"] | None,
    ) -> dict[str, Any]:
        told = super().told(network, noisy, text_embeddings, cameras)
        return told | {"image_rotary_emb": rotary_embedding(network.config, noisy)}


def rotary_embedding(
    config: Any, latents: Float[Tensor, "B f C h w"]
) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T D"]] | None:
    """(cosines, sines) of the T tokens' positions; None for a transformer that embeds them itself.

    A frame of another size is fitted into the one that the model was trained at, in the middle of it.
    """
    if not config.use_rotary_positional_embeddings:
        return None
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    height, width = (size // config.patch_size for size in latents.shape[-2:])
    most_high, most_wide = config.sample_height // config.patch_size, config.sample_width // config.patch_size
    scale = min(most_high / height, most_wide / width)
    inner = round(scale * height), round(scale * width)
    top, left = round((most_high - inner[0]) / 2), round((most_wide - inner[1]) / 2)
    return get_3d_rotary_pos_embed(
        config.attention_head_dim,
        ((top, left), (top + inner[0], left + inner[1])),
        (height, width),
        latents.shape[1],
        device=latents.device,
    )
