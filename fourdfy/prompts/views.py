"""The texts of views and times: which one a camera gets, and Perp-Neg's mixtures (Armandpour et al. 2023).

B cameras, M moments, D view directions (in the order of ``DIRECTIONS``), L tokens, C channels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fourdfy.types import Cameras, Conditions, MomentsBetween, TextEmbeddings

DIRECTIONS = ("side", "front", "back", "overhead")


def for_views(text: TextEmbeddings, cameras: Cameras, view_dependent: bool) -> Conditions:
    """The embeddings for the views and times of B cameras."""
    uncond = text.uncond.expand(len(cameras), -1, -1)
    if not view_dependent:
        return Conditions(at_times(text.text, cameras.times, text.moments_between), uncond)
    directions = at_times(text.text_directions, cameras.times, text.moments_between)
    if text.perp_neg is not None:
        return perp_neg_texts(text, cameras, directions)
    thresholds = (text.front_threshold, text.back_threshold, text.overhead_threshold)
    index = direction_indices(cameras.elevation_deg, cameras.azimuth_deg, *thresholds)
    return Conditions(directions[torch.arange(len(index), device=index.device), index], uncond)


def at_times(
    embeddings: Float[Tensor, "M *S"], times: Float[Tensor, "B"], between: MomentsBetween
) -> Float[Tensor, "B *S"]:
    """The embeddings for B times in 0..1; the M moments are equal parts of it.

    Between the middles of two moments they are mixed linearly, unless ``between`` is "step". Before the first
    middle and behind the last, "linear" takes the nearest one, and "loop" mixes these two.
    """
    count = len(embeddings)
    if between == "step":
        return embeddings[(times * count).long().clamp(max=count - 1)]
    nearest, share = nearest_moments(times, count)
    before, after = (nearest % count if between == "loop" else nearest.clamp(0, count - 1)).unbind(-1)
    share = share.to(embeddings.dtype).reshape(-1, *[1] * (embeddings.ndim - 1))
    return embeddings[before].lerp(embeddings[after], share)


def nearest_moments(times: Float[Tensor, "B"], count: int) -> tuple[Int[Tensor, "B 2"], Float[Tensor, "B"]]:
    """The two of ``count`` moments, from -1 to ``count``, between whose middles each time lies, and the share
    of the second, by how near it is."""
    place = times * count - 0.5
    below = place.floor()
    return torch.stack([below, below + 1], dim=-1).long(), place - below


def direction_indices(
    elevation_deg: Float[Tensor, "B"],
    azimuth_deg: Float[Tensor, "B"],
    front_threshold: float,
    back_threshold: float,
    overhead_threshold: float,
) -> Int[Tensor, "B"]:
    """Indices into ``DIRECTIONS``; thresholds in degrees, strict; a later match overrides."""
    azimuth = _wrapped(azimuth_deg)
    index = torch.zeros_like(azimuth, dtype=torch.long)
    index = torch.where(azimuth.abs() < front_threshold, 1, index)
    index = torch.where(azimuth.abs() > 180 - back_threshold, 2, index)
    return torch.where(elevation_deg > overhead_threshold, 3, index)


def perp_neg_texts(
    text: TextEmbeddings, cameras: Cameras, directions: Float[Tensor, "B D L C"]
) -> Conditions:
    """Perp-Neg: texts mixed by azimuth, with negative texts that steer away from front and side.

    Between front (0 degrees), side (90) and back (180) the text is the linear mix of the two
    nearest views', independent of the thresholds; overhead views have their own text, and their
    negatives weigh nothing.

    Args:
        directions: the embeddings of all views, at each camera's moment.
    """
    assert text.perp_neg is not None
    side, front, back, overhead = directions.unbind(1)
    turn = _wrapped(cameras.azimuth_deg).abs() / 90
    in_front, above = turn < 1, cameras.elevation_deg > text.overhead_threshold
    # The share of the view that is nearer to the front.
    share = torch.where(in_front, 1 - turn, 2 - turn)
    fs, sf, fsb, sb = (
        a * torch.exp(-b * r) + c
        for (a, b, c), r in zip(text.perp_neg, (share, 1 - share, share, share), strict=True)
    )
    away_from_front, away_from_side = (
        -torch.where(above, 0, torch.where(in_front, *weights)) for weights in ((fs, fsb), (sf, sb))
    )
    share, in_front, above = (x[:, None, None] for x in (share, in_front, above))
    near, far = torch.where(in_front, front, side), torch.where(in_front, side, back)
    mixed = torch.where(above, overhead, share * near + (1 - share) * far)
    return Conditions(mixed, text.uncond.expand_as(mixed), (front, side), (away_from_front, away_from_side))


def _wrapped(azimuth_deg: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """The same angles in [-180, 180)."""
    return (azimuth_deg + 180) % 360 - 180
