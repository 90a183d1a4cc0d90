"""Clips through the encoder of ``AutoencoderKLWan``, in bounded memory and with exact gradients.

The encoder is causal: a chunk of frames needs nothing but what its convolutions have kept of the frames
before. ``vae.encode`` feeds it one frame and then four at a time, and keeps all of their activations. Here
these caches are inputs and outputs of checkpoints, so that one chunk's activations exist at a time.

B clips of F = 1 + 4 k frames, H x W pixels, K = 2 x latent channels, f = 1 + k latents in time of h x w.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fourdfy.priors.base import Network

STRIDE = 4
"""Frames that each latent but the first one holds."""


def check_frames(frames: int, key: str, stride: int = STRIDE) -> None:
    """Refuse clips whose last frames ``vae.encode`` would drop without a word.

    Raises:
        ValueError: starts with ``key``; says the nearest number.
    """
    if frames % stride != 1:
        nearest = max(1, round((frames - 1) / stride)) * stride + 1
        raise ValueError(f"{key}={frames}: this model takes 1 + {stride} k frames; use {nearest}")


def moments(
    vae: Network, clips: Float[Tensor, "B C F H W"], frames_at_once: int = 0
) -> Float[Tensor, "B K f h w"]:
    """The parameters of ``vae.encode(clips).latent_dist``, means first; gradients reach ``clips``.

    Args:
        clips: in -1..1.
        frames_at_once: whose activations exist at a time, rounded to whole latents; they are encoded again in
            the backward pass. Below 1: all, once.

    Raises:
        ValueError: no 1 + 4 k frames, or no three colours where they belong.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    if clips.shape[1] != 3:
        raise ValueError(
            f"clips of shape {list(clips.shape)}; expected [B, 3, F, H, W]: colours before frames"
        )
    check_frames(clips.shape[2], "frames")
    clips = patchify(clips, vae.config.patch_size or 1)
    chunks = (clips[:, :, :1], *clips[:, :, 1:].split(STRIDE, dim=2))
    count = len(chunks) if frames_at_once < 1 else max(1, frames_at_once // STRIDE)
    encode = partial(_encode, vae)
    if count < len(chunks):
        encode = partial(checkpoint, encode, use_reentrant=False, preserve_rng_state=False)
    caches: Sequence[Tensor | None] = [None] * vae._cached_conv_counts["encoder"]
    latents: list[Tensor] = []
    for start in range(0, len(chunks), count):
        part, *caches = encode(chunks[start : start + count], *caches)
        latents.append(part)
    return vae.quant_conv(torch.cat(latents, dim=2))


def _encode(vae: Network, chunks: Sequence[Tensor], *caches: Tensor | None) -> tuple[Any, ...]:
    """The latents of frames that follow on those which left ``caches``, and what they leave themselves."""
    kept = [*caches]  # each convolution replaces its own
    latents = [vae.encoder(chunk, feat_cache=kept, feat_idx=[0]) for chunk in chunks]
    return torch.cat(latents, dim=2), *kept
