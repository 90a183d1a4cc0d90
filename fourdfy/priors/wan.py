"""Wan 2.1 (Wan Team 2025), a text-to-video model, as a prior: a flow transformer behind a causal VAE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fourdfy.bounds import number
from fourdfy.config import file_path
from fourdfy.priors.base import Network
from fourdfy.priors.causal_vae import STRIDE, check_frames, moments
from fourdfy.priors.hub import stored_description, stored_folder
from fourdfy.priors.model_folder import read_mapping
from fourdfy.priors.video import VideoPrior
from fourdfy.registry import register

VAE_BYTES_PER_PIXEL, CACHE_BYTES_PER_PIXEL = 13_300, 5_600
"""What the VAE keeps in float32 for the backward pass: per pixel of the frames at once, and per pixel of one
frame for each latent in time."""

PATCH = 2
"""Latents along each side of what the transformer takes as one."""


@register("wan")
class Wan(VideoPrior):
    @dataclass(frozen=True, kw_only=True)
    class Config(VideoPrior.Config):
        networks: ClassVar[dict[str, str]] = {
            "transformer": "WanTransformer3DModel",
            "vae": "AutoencoderKLWan",
        }
        parts: ClassVar[tuple[str, ...]] = ("transformer", "vae", "scheduler")
        text_keys: ClassVar[tuple[str, str]] = ("d_model", "text_dim")

        pretrained_model_name_or_path: str = file_path("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
        height: int = number(320, 1, 8192)
        """Pixels that frames are resized to before the VAE; the model's own size is 480 x 832."""
        width: int = number(576, 1, 8192)
        """Pixels, as ``height``."""
        half_precision_weights: bool | str = "bf16"
        """"bf16" or false: float16 is too narrow for this transformer. The VAE has float32 in any case."""
        low_ram_vae: int = number(STRIDE, -1, 1024)
        """Number of frames in the VAE at once, by fours; fewer than all are encoded again in the backward
        pass. 0 or -1: all."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.half_precision_weights is True:
                raise ValueError(
                    "half_precision_weights=true is float16, too narrow for this model; set it to bf16"
                )
            if self.gradient == "subset":
                raise ValueError("gradient=subset: this VAE takes frames together; set gradient=exact")

        def activation_bytes(self, frames: int, height: int, width: int) -> int:
            kept = (
                max(STRIDE, self.frames_at_once(frames)) * VAE_BYTES_PER_PIXEL
                + frames // STRIDE * CACHE_BYTES_PER_PIXEL
            )
            return self.height * self.width * kept

        def check_group_size(self, size: int, key: str) -> None:
            check_frames(size, f"num_frames is {key}")
            super().check_group_size(size, key)

        def check_models(self) -> None:
            super().check_models()
            name = self.pretrained_model_name_or_path
            self.check_size(stored_description(name, "vae").get("scale_factor_spatial", 8))
            folder = stored_folder(name, self.parts)
            index = folder / "model_index.json" if folder else Path()
            # Some files of Wan 2.1 name it too, with nothing behind the name.
            if index.is_file() and any(read_mapping(index).get("transformer_2") or ()):
                raise ValueError(
                    f"pretrained_model_name_or_path={name}: its transformer_2 denoises lower noise levels, "
                    "which is not supported; use a model of one transformer, such as Wan 2.1"
                )

        def check_size(self, factor: int) -> None:
            """Refuse frames whose margin the networks would cut.

            Args:
                factor: pixels per latent, along each side.

            Raises:
                ValueError: says the nearest size.
            """
            given, multiple = (self.height, self.width), factor * PATCH
            height, width = (max(1, round(pixels / multiple)) * multiple for pixels in given)
            if (height, width) != given:
                raise ValueError(
                    f"height={self.height}, width={self.width}: {self.pretrained_model_name_or_path} takes "
                    f"multiples of {multiple} pixels; set height={height}, width={width}"
                )

    cfg: Config

    def load_network(self, folder: Path, part: str, dtype: torch.dtype) -> nn.Module:
        return super().load_network(folder, part, torch.float32 if part == "vae" else dtype)

    def encode(
        self, rgb: Float[Tensor, "N H W 3"], group_size: int, generator: torch.Generator
    ) -> Float[Tensor, "B C f h w"]:
        """Latents of clips of ``group_size`` frames: the posterior's means, as the model was trained with."""
        clips = self.resized(rgb).unflatten(0, (-1, group_size)).movedim(1, 2)
        with self._precision():
            mean, _ = moments(self.vae, clips.float() * 2 - 1, self.cfg.low_ram_vae).chunk(2, dim=1)
        scales = self.vae.config.latents_mean, self.vae.config.latents_std
        centre, spread = (mean.new_tensor(numbers).reshape(-1, 1, 1, 1) for numbers in scales)
        return (mean - centre) / spread

    def halve_chunks(self, frames: int) -> dict[str, int]:
        return super().halve_chunks(frames) if self.cfg.frames_at_once(frames) > STRIDE else {}

    def time_embedding(self, network: Network) -> nn.Module:
        return network.condition_embedder.time_embedder

    def _image_size(self) -> tuple[int, int]:
        self.cfg.check_size(self.vae.config.scale_factor_spatial)
        return self.cfg.height, self.cfg.width
