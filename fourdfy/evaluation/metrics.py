"""Numbers that compare images, colours and tracks with the truth: plain functions of tensors.

F frames, H x W pixels, T moments of a track.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MAX_PSNR_DB = 100.0
"""Equal images have no finite PSNR; this keeps means and JSON files finite."""

STILL_SHARE = 0.15
"""A track that moves less than this share of the true one stands still. Below are what perspective
makes of another motion (a bouncing ball comes nearer and so grows, by 0.09 of what pulsing does) and
the jitter of a still, blurred and noisy object (0.004), either of which could correlate by chance. A
pulsing cone sinks by 0.23 of a bounce, but sinking correlates with -1."""


def silhouette_iou(
    opacity: Float[Tensor, "F H W 1"], truth: Float[Tensor, "F H W 1"], threshold: float = 0.5
) -> Float[Tensor, "F"]:
    """Intersection over union of what is more opaque than ``threshold``; 1 where both are empty."""
    ours, theirs = (opacity > threshold).flatten(1), (truth > threshold).flatten(1)
    union = (ours | theirs).sum(dim=1)
    shared = (ours & theirs).sum(dim=1)
    return torch.where(union == 0, 1.0, shared / union.clamp_min(1))


def psnr(rgb: Float[Tensor, "F H W 3"], truth: Float[Tensor, "F H W 3"]) -> Float[Tensor, "F"]:
    """Peak signal to noise ratio of each frame in dB, for colours in 0..1; at most ``MAX_PSNR_DB``."""
    mse = (rgb - truth).square().flatten(1).mean(dim=1)
    return -10 * mse.clamp_min(10 ** (-MAX_PSNR_DB / 10)).log10()


def colour_error(colour: Float[Tensor, "3"], truth: Float[Tensor, "3"]) -> float:
    """Root mean square difference of the channels, 0..1."""
    return float((colour - truth).square().mean().sqrt())


def mean_saturation(colours: Float[Tensor, "F H W 3"], inside: Bool[Tensor, "F H W"]) -> float:
    """Mean saturation (of HSV) of the pixels inside, 0..1; 0 if there are none."""
    pixels = colours[inside]
    highest = pixels.amax(-1)
    saturation = (highest - pixels.amin(-1)) / highest.clamp_min(1e-6)
    return float(saturation.mean()) if len(pixels) else 0.0


def pearson(track: Float[Tensor, "T"], truth: Float[Tensor, "T"]) -> float:
    """Correlation of two tracks over the moments where both are finite.

    0, never NaN, where there is nothing to correlate: fewer than half of the moments are known, or
    ``track`` moves less than ``STILL_SHARE`` of what ``truth`` moves.
    """
    known = _known(track, truth)
    if known is None:
        return 0.0
    ours, theirs = known
    return float(((ours * theirs).sum() / (ours.norm() * theirs.norm())).clamp(-1, 1))


def gain(track: Float[Tensor, "T"], truth: Float[Tensor, "T"]) -> float:
    """How far ``track`` moves for each unit of ``truth`` (least squares); 0 where ``pearson`` is."""
    known = _known(track, truth)
    if known is None:
        return 0.0
    ours, theirs = known
    return float((ours * theirs).sum() / theirs.square().sum())


def _known(track: Tensor, truth: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both tracks less their means where both are finite; None where nothing can be said."""
    finite = track.isfinite() & truth.isfinite()
    if 2 * int(finite.sum()) < len(track) or finite.sum() < 2:
        return None
    ours, theirs = track[finite].double(), truth[finite].double()
    ours, theirs = ours - ours.mean(), theirs - theirs.mean()
    still = theirs.norm() == 0 or ours.norm() < STILL_SHARE * theirs.norm()
    return None if still else (ours, theirs)
