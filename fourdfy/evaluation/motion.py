"""Metrics of motion, which need no network: how much, how steady, and whether it closes into a loop.

F frames of a clip, S = F - 1 steps between them, H x W pixels.
"""

from __future__ import annotations

from statistics import fmean

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import grid_sample

from fourdfy.evaluation.registry import metric
from fourdfy.evaluation.views import Views


@metric("highest")
def flow(views: Views) -> float | None:
    """How far the object's pixels move over a clip, in heights of the image; 0 for a still, no upper bound.

    Mean length of the optical flow (TV-L1, Zach et al. 2007) over the object's pixels, times the steps of a
    clip. More is not better without end; see ``flicker``.
    """
    clips = zip(views.clips, views.flows, strict=True)
    lengths = [inside_mean(flows.norm(dim=-1) / flows.shape[1], clip.inside[:-1]) for clip, flows in clips]
    return _mean([length * (views.protocol.frames - 1) for length in lengths])


@metric("lowest")
def flicker(views: Views) -> float | None:
    """What changes from frame to frame and is no motion: 0 for a still or a steady motion, at most 1.

    Warping error (Lai et al. 2018): the mean colour difference between a frame and the next one, which is
    brought back along the optical flow.
    """
    clips = zip(views.clips, views.flows, strict=True)
    return _mean([inside_mean(warping_error(clip.rgb, flows), clip.inside[:-1]) for clip, flows in clips])


@metric("lowest")
def loop_closure(views: Views) -> float | None:
    """How much larger the step from the last frame to the first is than any other, in colours of 0..1.

    0 for a perfect loop, and for a still.
    """
    return _mean([loop_jump(clip.rgb, clip.inside) for clip in views.clips])


def warping_error(rgb: Float[Tensor, "F H W 3"], flows: Float[Tensor, "S H W 2"]) -> Float[Tensor, "S H W"]:
    """Mean difference of the channels between each frame and the next, brought back along the flow."""
    height, width = rgb.shape[1:3]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    to = torch.stack([columns, rows], dim=-1) + flows
    grid = 2 * (to + 0.5) / torch.tensor([width, height]) - 1
    back = grid_sample(rgb[1:].movedim(-1, 1), grid, padding_mode="border", align_corners=False)
    return (back.movedim(1, -1) - rgb[:-1]).abs().mean(dim=-1)


def loop_jump(rgb: Float[Tensor, "F H W 3"], inside: Bool[Tensor, "F H W"]) -> float:
    """Mean change where the object is, from the last frame to the first, less the largest between two others;
    at least 0."""
    change = (rgb.roll(-1, 0) - rgb).abs().mean(dim=-1)
    either = inside | inside.roll(-1, 0)
    *steps, seam = (inside_mean(change[k], either[k]) for k in range(len(rgb)))
    return max(0.0, seam - max(steps))


def inside_mean(values: Float[Tensor, "*N"], inside: Bool[Tensor, "*N"]) -> float:
    """Mean over what is inside; 0 if nothing is."""
    return float(values[inside].mean()) if inside.any() else 0.0


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None
