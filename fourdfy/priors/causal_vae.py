"""Clips through the encoders of Wan, CogVideoX and LTX-Video, in bounded memory and with exact gradients.

The encoders are causal: a chunk of frames needs nothing but what its convolutions have kept of the frames
before. ``vae.encode`` feeds those of the former two in chunks, and keeps all of their activations. Here these
caches are inputs and outputs of checkpoints, so that one chunk's activations exist at a time.

B clips of F = 1 + 4 k frames (LTX-Video: 1 + 8 k), H x W pixels, K = 2 x latent channels, f = 1 + k latents
in time of h x w.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fourdfy.priors.base import Network

STRIDE, LTX_STRIDE = 4, 8
"""Frames that each latent but the first one holds, and that of LTX-Video."""


def check_frames(frames: int, key: str, stride: int = STRIDE) -> None:
    """Refuse clips whose last frames ``vae.encode`` would drop without a word.

    Raises:
        ValueError: starts with ``key``; says the nearest number.
    """
    if frames % stride != 1:
        nearest = max(1, round((frames - 1) / stride)) * stride + 1
        raise ValueError(f"{key}={frames}: this model takes 1 + {stride} k frames; use {nearest}")


def wan_moments(
    vae: Network, clips: Float[Tensor, "B C F H W"], frames_at_once: int = 0
) -> Float[Tensor, "B K f h w"]:
    """The parameters of Wan's ``vae.encode(clips).latent_dist``, means first; gradients reach ``clips``.

    Its chunks are the first frame, and then four frames each.

    Args:
        clips: in -1..1.
        frames_at_once: whose activations exist at a time, rounded to whole chunks; they are encoded again in
            the backward pass. Below 1: all, once.

    Raises:
        ValueError: no 1 + 4 k frames, or no three colours where they belong.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    _check_axes(clips)
    clips = patchify(clips, vae.config.patch_size or 1)
    chunks = (clips[:, :, :1], *clips[:, :, 1:].split(STRIDE, dim=2))
    caches = [None] * vae._cached_conv_counts["encoder"]
    return vae.quant_conv(_encoded(partial(_encode_wan, vae), chunks, caches, frames_at_once / STRIDE))


def cogvideox_moments(
    vae: Network, clips: Float[Tensor, "B C F H W"], frames_at_once: int = 0
) -> Float[Tensor, "B K f h w"]:
    """The same of CogVideoX.

    Its norms look at all frames of a chunk, so that the chunks must be those of ``vae.encode``: eight frames
    each, the first one with what is left over. For 1 to 7 ``frames_at_once``, the activations of one residual
    block of a chunk exist at a time, and are computed a third time.
    """
    _check_axes(clips)
    size = vae.num_sample_frames_batch_size
    later = max(0, clips.shape[2] // size - 1)
    chunks = clips.split([clips.shape[2] - later * size, *[size] * later], dim=2)
    if 0 < frames_at_once < size:
        _checkpoint_blocks(vae)
    return _encoded(partial(_encode_cogvideox, vae), chunks, [None], frames_at_once / size)


def ltx_moments(
    vae: Network, clips: Float[Tensor, "B C F H W"], frames_at_once: int = 0
) -> Float[Tensor, "B K f h w"]:
    """The same of LTX-Video, which has no caches: all frames are in it together.

    From 1 on for ``frames_at_once``, the activations of one residual block exist at a time.
    """
    _check_axes(clips, LTX_STRIDE)
    if frames_at_once > 0:
        _checkpoint_blocks(vae)
    return vae.encode(clips).latent_dist.parameters


def _checkpoint_blocks(vae: Network) -> None:
    vae.enable_gradient_checkpointing()
    vae.encoder.gradient_checkpointing = False  # that of whole levels, around those of their blocks


def _check_axes(clips: Tensor, stride: int = STRIDE) -> None:
    if clips.shape[1] != 3:
        raise ValueError(
            f"clips of shape {list(clips.shape)}; expected [B, 3, F, H, W]: colours before frames"
        )
    check_frames(clips.shape[2], "frames", stride)


def _encoded(
    encode: Callable[..., tuple[Any, ...]], chunks: Sequence[Tensor], caches: Sequence[Any], at_once: float
) -> Tensor:
    """All latents, ``at_once`` chunks in a call of ``encode``, which takes and gives caches."""
    count = max(1, int(at_once)) if at_once > 0 else len(chunks)
    if count < len(chunks):
        encode = partial(checkpoint, encode, use_reentrant=False, preserve_rng_state=False)
    latents: list[Tensor] = []
    for start in range(0, len(chunks), count):
        part, *caches = encode(chunks[start : start + count], *caches)
        latents.append(part)
    return torch.cat(latents, dim=2)


def _encode_wan(vae: Network, chunks: Sequence[Tensor], *caches: Tensor | None) -> tuple[Any, ...]:
    """The latents of frames that follow on those which left ``caches``, and what they leave themselves."""
    kept = [*caches]  # each convolution replaces its own
    latents = [vae.encoder(chunk, feat_cache=kept, feat_idx=[0]) for chunk in chunks]
    return torch.cat(latents, dim=2), *kept


def _encode_cogvideox(vae: Network, chunks: Sequence[Tensor], cache: Any) -> tuple[Any, ...]:
    """The same, with all caches in nested dictionaries."""
    assert vae.quant_conv is None
    latents: list[Tensor] = []
    for chunk in chunks:
        part, cache = vae.encoder(chunk, conv_cache=cache)
        latents.append(part)
    return torch.cat(latents, dim=2), cache
