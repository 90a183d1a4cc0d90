"""Priors that are a diffusers network on the latents of a VAE, by default a U-Net: settings, loading, calls.

N rendered frames of H x W pixels, B latents of h x w (images, or clips with a frame axis behind the
channels), C channels, L tokens, E text channels, K numbers of a camera.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor, nn

from fourdfy.bounds import number
from fourdfy.config import file_path
from fourdfy.ops.ranks import ranks
from fourdfy.ops.replay import Replay
from fourdfy.priors.acceleration import compiled
from fourdfy.priors.base import Denoiser, Network, NoiseSchedule, Prior
from fourdfy.priors.distilled import check_not_distilled
from fourdfy.priors.frozen import (
    Gradient,
    MemoryOptions,
    apply_memory_options,
    check_part,
    encode_images,
    load_noise_schedule,
    load_part,
    sharded,
    to_channels_last,
    vae_factor,
)
from fourdfy.priors.hub import resolve_model, stored_description, stored_folder
from fourdfy.priors.prefix import compute_prefix_once
from fourdfy.priors.vae_encoder import posterior

logger = logging.getLogger(__name__)

VAE_BYTES_PER_PIXEL = 2_500
"""What ``vae_encoder.VAEEncoder`` takes at its peak in 16 bits, per pixel of its input, of Stable Diffusion's
VAE; diffusers' own encoder takes 6,100."""


RECORDED_PIXELS = 2**20
"""Images with more pixels in all keep a GPU busy for longer than launching takes, and what a recording keeps
for its backward pass is reserved for good."""


class LatentPrior(Prior):
    """A latent diffusion model in diffusers layout."""

    patch: ClassVar[int] = 1
    """Latents along each side of what a transformer takes as one token."""
    follows_autocast: ClassVar[bool] = False
    """Whether the networks run in the trainer's mixed precision, or in the type of their weights."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MemoryOptions, Prior.Config):
        decodes_all: ClassVar[bool] = True
        networks: ClassVar[dict[str, str]] = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
        """Parts of the model, the one that denoises first, with their classes in diffusers."""
        parts: ClassVar[tuple[str, ...]] = ("unet", "vae", "scheduler")
        text_keys: ClassVar[tuple[str, str]] = ("hidden_size", "cross_attention_dim")
        """Where the descriptions of the text encoder and of the denoiser say how many channels a text has."""
        float32_vae: ClassVar[bool] = False
        """Whether 16 bits are too few for the VAE, whatever the denoiser has."""

        pretrained_model_name_or_path: str = file_path("stabilityai/stable-diffusion-2-1-base")
        """Folder, embedded name or hub id of the model."""
        height: int | None = number(None, 1, 8192)
        """Pixels that images are resized to before the VAE; null: the model's own size."""
        width: int | None = number(None, 1, 8192)
        """Pixels, as ``height``."""
        view_dependent_prompting: bool = True
        """Use the text of each frame's view (for a video, of its first frame) instead of the plain prompt."""
        low_ram_vae: int = number(0, -1, 1024)
        """Number of frames in the VAE at once; fewer than all are encoded again in the backward pass. 0 or
        -1: all."""
        token_merging: bool = False
        """Merge tokens in the self-attention of U-Nets for images with the package tomesd (Bolya & Hoffman
        2023), which is faster but changes the prior a little."""
        token_merging_params: dict[str, Any] | None = None
        """Arguments of ``tomesd.apply_patch``; ``use_rand`` is false unless given here."""

        def models(self) -> list[tuple[str, tuple[str, ...]]]:
            return [(self.pretrained_model_name_or_path, self.parts)]

        def activation_bytes(self, frames: int, height: int, width: int) -> int:
            pixels = self.frames_at_once(frames) * (self.height or height) * (self.width or width)
            wide = self.float32_vae or self.half_precision_weights is False
            return pixels * VAE_BYTES_PER_PIXEL * (2 if wide else 1)

        def frames_at_once(self, frames: int) -> int:
            """How many of the ``frames`` of a step are in the VAE at once."""
            return min(frames, self.low_ram_vae) if self.low_ram_vae > 0 else frames

        def check_models(self) -> None:
            for name, parts in self.models():
                check_not_distilled(name, parts[0])
                if folder := stored_folder(name, parts):
                    for part in parts:
                        check_part(folder, part, self.networks.get(part, ""))
            (name, _), *_ = self.models()
            denoiser, vae, *_ = (stored_description(name, part) for part in self.networks)
            self.check_size(self.multiple(vae, denoiser))

        @staticmethod
        def multiple(vae: Mapping[str, Any], denoiser: Mapping[str, Any]) -> int:
            """Pixels along each side of what the denoiser takes as one.

            Args:
                vae, denoiser: their descriptions; empty if they are not known yet.
            """
            return 2 ** (len(vae.get("block_out_channels", range(4))) - 1)

        def check_size(self, multiple: int) -> None:
            """Refuse frames whose margin the networks would cut.

            Raises:
                ValueError: says the nearest size.
            """
            given = {side: pixels for side in ("height", "width") if (pixels := getattr(self, side))}
            nearest = {side: max(1, round(pixels / multiple)) * multiple for side, pixels in given.items()}
            if nearest != given:
                ours, theirs = (
                    ", ".join(f"{side}={pixels}" for side, pixels in sizes.items())
                    for sizes in (given, nearest)
                )
                raise ValueError(
                    f"{ours}: {self.pretrained_model_name_or_path} takes multiples of {multiple} pixels; "
                    f"set {theirs}"
                )

        def text_channels(self, name: str) -> int | None:
            """How many channels the texts of the model ``name`` have; None if it is not on this disk."""
            return stored_description(name, "text_encoder").get(self.text_keys[0])

        def check_text_encoder(self, name: str) -> None:
            denoiser, (_, reads) = next(iter(self.networks)), self.text_keys
            given = self.text_channels(name)
            for model in [model for model, parts in self.models() if denoiser in parts]:
                read = stored_description(model, denoiser).get(reads)
                if given and isinstance(read, int) and read != given:
                    raise ValueError(
                        f"pretrained_model_name_or_path: {model} reads texts of {read} channels, and the "
                        f"prompt processor's pretrained_model_name_or_path={name} gives {given}; set the "
                        f"latter to the model whose text encoder this prior was trained with"
                    )

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.half_precision_weights not in (True, False, "bf16"):
                raise ValueError(
                    f'half_precision_weights={self.half_precision_weights!r}; expected true, false or "bf16"'
                )
            denoiser = next(iter(self.networks.values()))
            if self.token_merging and (self.is_video or denoiser != "UNet2DConditionModel"):
                raise ValueError("token_merging=true is for U-Nets of images; set token_merging=false")
            if self.token_merging and find_spec("tomesd") is None:
                raise ValueError("token_merging=true needs tomesd: pip install tomesd, or set it to false")

    cfg: Config

    def __init__(self, cfg: Config, *, device: torch.device) -> None:
        super().__init__(cfg, device=device)
        self.view_dependent = cfg.view_dependent_prompting
        self.dtype = cfg.dtype(self.device)
        self.denoiser, self.vae = self.load()
        self.image_size = self._image_size()
        self.recorded_vae: Replay | None = None

    def load(self) -> tuple[Denoiser, Network]:
        """The frozen networks: (denoiser, VAE)."""
        folder = resolve_model(*self.cfg.models()[0])
        unet, vae = self.load_unet(folder), self.load_network(folder, "vae", self.dtype)
        return Denoiser(unet, self.load_schedule(folder)), vae

    def load_denoiser(self, name: str) -> Denoiser:
        (own, parts), *_ = self.cfg.models()
        parts = tuple(part for part in parts if part != "vae")
        folder = resolve_model(name, parts)
        if folder.resolve() == resolve_model(own, parts).resolve():
            return self.denoiser
        return Denoiser(self.load_unet(folder), self.load_schedule(folder))

    def load_unet(self, folder: Path) -> nn.Module:
        unet = self.load_network(folder, next(iter(self.cfg.networks)), self.dtype)
        if self.cfg.token_merging:
            import tomesd

            # Its random choices come from its own generator, which no checkpoint would hold.
            tomesd.apply_patch(unet, **{"use_rand": False} | (self.cfg.token_merging_params or {}))
        return unet

    def load_schedule(self, folder: Path) -> NoiseSchedule:
        return load_noise_schedule(folder, self.device)

    def load_network(self, folder: Path, part: str, dtype: torch.dtype) -> nn.Module:
        """A frozen part of the model, with this prior's options, where it computes."""
        dtype = torch.float32 if part == "vae" and self.cfg.float32_vae else dtype
        shard = self.is_sharded and part == next(iter(self.cfg.networks))
        device = torch.device("cpu") if shard else self.device  # one GPU may not hold it
        network = self.read_network(folder, part, dtype, device)
        apply_memory_options(network, self.cfg, self.device)
        if shard:
            return sharded(network, self.device)
        if self.device.type == "cpu" and part == "vae":
            to_channels_last(network)  # a seventh faster there; U-Nets are not
        elif self.device.type == "cpu":
            compute_prefix_once(network)
        return network

    def read_network(self, folder: Path, part: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """A frozen part of the model, as its files have it."""
        return load_part(folder, part, self.cfg.networks[part], dtype=dtype, device=device)

    @property
    def is_sharded(self) -> bool:
        return self.cfg.shard_over_ranks and ranks().count > 1

    @property
    def can_be_recorded(self) -> bool:
        # Both copy weights in each call.
        return not (self.cfg.enable_sequential_cpu_offload or self.is_sharded)

    def accelerate(self, compile_small: bool) -> None:
        name, _ = self.cfg.models()[0]
        if not self.can_be_recorded:
            logger.warning(
                "%s is neither compiled nor replayed as CUDA graphs; its code copies tensors", name
            )
            return
        network = f"the {next(iter(self.cfg.networks))} of {name}"
        denoise = compiled(self.denoise, self.denoiser.network, network, small_too=compile_small)
        self.denoise = Replay(denoise, network)  # type: ignore[method-assign]
        self.recorded_vae = Replay(partial(posterior, self.vae), f"the VAE of {name}")

    def halve_chunks(self, frames: int) -> dict[str, int]:
        at_once = self.cfg.frames_at_once(frames)
        halved: dict[str, Any] = {"low_ram_vae": at_once // 2} if at_once > 1 else {}
        self.cfg = replace(self.cfg, **halved)
        return halved

    def encode(
        self, rgb: Float[Tensor, "N H W 3"], group_size: int, generator: torch.Generator
    ) -> Float[Tensor, "B C *S"]:
        return self.encode_images(rgb, generator)

    def encode_images(
        self,
        rgb: Float[Tensor, "N H W 3"],
        generator: torch.Generator,
        gradient: Gradient = "exact",
    ) -> Float[Tensor, "N C h w"]:
        """Each image's latents, at the size that the model works at; see ``frozen.encode_images``."""
        images = self.resized(rgb)
        with self._precision():
            return encode_images(self.vae, images, generator, self.cfg.low_ram_vae, gradient, self._posterior)

    def decode(self, latents: Float[Tensor, "B C *S"], most: int) -> Float[Tensor, "N H W 3"]:
        """Of the first images."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        some = latents[:most] / self.vae.config.scaling_factor + shift
        parts = some.split(self.cfg.frames_at_once(len(some)))
        return torch.cat([self._images(part) for part in parts]).movedim(1, -1)

    def _images(self, latents: Float[Tensor, "B C *S"]) -> Float[Tensor, "B 3 *S2"]:
        """What the VAE decodes, in 0..1."""
        with self._precision():
            return (self.vae.decode(latents.to(self.vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    def resized(self, rgb: Float[Tensor, "N H W 3"]) -> Float[Tensor, "N 3 H2 W2"]:
        """Images at the size that the model works at."""
        images = rgb.movedim(-1, 1)
        if images.shape[-2:] == self.image_size:
            return images
        return F.interpolate(images, self.image_size, mode="bilinear", align_corners=False)

    def levels(self, schedule: NoiseSchedule, latents: Float[Tensor, "B C *S"]) -> NoiseSchedule:
        return schedule.for_tokens(latents[0, 0].numel() // self.patch**2)

    def predict(
        self,
        network: nn.Module,
        noisy: Float[Tensor, "B C *S"],
        timesteps: Real[Tensor, "B"],
        text_embeddings: Float[Tensor, "B L E"],
        cameras: Float[Tensor, "B K"] | None = None,
    ) -> Float[Tensor, "B C *S"]:
        """One call of a diffusers network."""
        noisy, texts = noisy.to(self.dtype), text_embeddings.to(self.dtype)
        with self._precision():
            (prediction,) = network(
                noisy, timestep=timesteps, return_dict=False, **self.told(network, noisy, texts, cameras)
            )
        return prediction.float()

    def told(
        self,
        network: Network,
        noisy: Float[Tensor, "B C *S"],
        text_embeddings: Float[Tensor, "B L E"],
        cameras: Float[Tensor, "B K"] | None,
    ) -> dict[str, Any]:
        """What ``network`` is told besides the noisy latents and their noise levels, by its arguments' names.

        Cameras are its class labels.
        """
        labels = {} if cameras is None else {"class_labels": cameras}
        return {"encoder_hidden_states": text_embeddings, **labels}

    def _posterior(self, images: Float[Tensor, "N 3 H W"]) -> tuple[Tensor, Tensor]:
        if self.recorded_vae is None or images[:, 0].numel() > RECORDED_PIXELS:
            return posterior(self.vae, images)
        return self.recorded_vae(images)

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.follows_autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, enabled=False)

    def _image_size(self) -> tuple[int, int]:
        self.cfg.check_size(self.cfg.multiple(self.vae.config, self.denoiser.network.config))
        factor = vae_factor(self.vae)
        own = self.denoiser.network.config.sample_size or 0
        own_height, own_width = (own, own) if isinstance(own, int) else own
        size = (self.cfg.height or own_height * factor, self.cfg.width or own_width * factor)
        if not all(size):
            raise ValueError("height, width: the U-Net's config.json has no sample_size, so set both")
        return size
