"""LTX-Video (HaCohen et al. 2024), a text-to-video model, as a prior: a flow transformer behind a causal VAE
whose latents hold 8 frames of 32 x 32 pixels.

B clips, f latents in time of h x w, C channels, L tokens of a text, E text channels.
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
from fourdfy.priors.causal_vae import LTX_STRIDE, ltx_moments
from fourdfy.priors.causal_video import CausalVideoPrior
from fourdfy.priors.hub import stored_description
from fourdfy.registry import register

SIDE = 32
"""Pixels along each side of a latent."""


@register("ltx")
class LTX(CausalVideoPrior):
    moments = staticmethod(ltx_moments)

    @dataclass(frozen=True, kw_only=True)
    class Config(CausalVideoPrior.Config):
        networks: ClassVar[dict[str, str]] = {
            "transformer": "LTXVideoTransformer3DModel",
            "vae": "AutoencoderKLLTXVideo",
        }
        parts: ClassVar[tuple[str, ...]] = ("transformer", "vae", "scheduler")
        text_keys: ClassVar[tuple[str, str]] = ("d_model", "caption_channels")
        is_flow: ClassVar[bool] = True
        text_processors: ClassVar[tuple[str, ...]] = ("ltx-prompt-processor",)
        stride: ClassVar[int] = LTX_STRIDE
        fits_float16: ClassVar[bool] = False

        pretrained_model_name_or_path: str = file_path("Lightricks/LTX-Video")
        half_precision_weights: bool | str = "bf16"
        """"bf16" or false: float16 is too narrow for this transformer."""
        low_ram_vae: int = number(0, -1, 1024)
        """0 or -1: the VAE keeps all that its backward pass needs. Else one block's activations at a time,
        which are computed again; all frames are in it together in any case."""
        fps: float = number(25.0, 1, 1000)
        """Frame rate that the model is conditioned on: the lower, the more motion between two frames."""

        @staticmethod
        def multiple(vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> int:
            return SIDE

        def activation_bytes(self, frames: int, height: int, width: int) -> int:
            blocks = stored_description(self.pretrained_model_name_or_path, "vae").get("down_block_types", ())
            kept = 1_900 if "LTXVideo095DownBlock3D" in blocks else 970
            share = 3 if self.low_ram_vae > 0 else 1
            in_float32 = 2 if self.half_precision_weights is False else 1
            return frames * self.height * self.width * kept * in_float32 // share

    cfg: Config

    def halve_chunks(self, frames: int) -> dict[str, int]:
        return {} if self.cfg.low_ram_vae > 0 else super().halve_chunks(frames)

    def normalised(self, latents: Float[Tensor, "B C f h w"]) -> Float[Tensor, "B C f h w"]:
        # Unlike those of other models, they are among the weights.
        centre, spread = (
            numbers.float().reshape(-1, 1, 1, 1) for numbers in (self.vae.latents_mean, self.vae.latents_std)
        )
        return (latents - centre) * self.vae.config.scaling_factor / spread

    def predict(
        self,
        network: nn.Module,
        noisy: Float[Tensor, "B C f h w"],
        timesteps: Real[Tensor, "B"],
        text_embeddings: Float[Tensor, "B L E"],
        cameras: Float[Tensor, "B K"] | None = None,
    ) -> Float[Tensor, "B C f h w"]:
        """The network's prediction; it takes latents as tokens, and their places in seconds and pixels."""
        frames, height, width = noisy.shape[2:]
        with self._precision():
            (tokens,) = network(
                noisy.to(self.dtype).flatten(2).mT,
                timestep=timesteps,
                encoder_hidden_states=text_embeddings.to(self.dtype),
                encoder_attention_mask=text_embeddings.any(dim=-1),  # zeros are padding
                num_frames=frames,
                height=height,
                width=width,
                rope_interpolation_scale=(LTX_STRIDE / self.cfg.fps, SIDE, SIDE),
                return_dict=False,
            )
        return tokens.float().mT.unflatten(2, noisy.shape[2:])

    def time_embedding(self, network: Network) -> nn.Module:
        return network.time_embed.emb.timestep_embedder
