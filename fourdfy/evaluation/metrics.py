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

TRACKED_SHARE = 0.75
"""Nothing is said of a track with fewer of its moments known than this share."""


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


def pearson(track: Float[Tensor, "T"], truth: Float[Tensor, "T"]) -> float | None:
    """Correlation of two tracks over the moments where both are finite.

    None where less than ``TRACKED_SHARE`` of the moments is known; 0, never NaN, where ``track`` moves
    less than ``STILL_SHARE`` of what ``truth`` moves.
    """
    known = _known(track, truth)
    if known is None:
        return None
    ours, theirs = known
    if _stands_still(ours, theirs):
        return 0.0
    return float(((ours * theirs).sum() / (ours.norm() * theirs.norm())).clamp(-1, 1))


def gain(track: Float[Tensor, "T"], truth: Float[Tensor, "T"]) -> float | None:
    """How far ``track`` moves for each unit of ``truth`` (least squares); None or 0 where ``pearson`` is."""
    known = _known(track, truth)
    if known is None:
        return None
    ours, theirs = known
    return 0.0 if _stands_still(ours, theirs) else float((ours * theirs).sum() / theirs.square().sum())


def _known(track: Tensor, truth: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both tracks less their means where both are finite; None if too few moments are."""
    finite = track.isfinite() & truth.isfinite()
    if int(finite.sum()) < TRACKED_SHARE * len(track):
        return None
    ours, theirs = track[finite].double(), truth[finite].double()
    return ours - ours.mean(), theirs - theirs.mean()


def _stands_still(ours: Tensor, theirs: Tensor) -> bool:
    return bool(theirs.norm() == 0 or ours.norm() < STILL_SHARE * theirs.norm())
