"""Metrics of shape, which need no network: whether the views show one object, and whether sides repeat.

N azimuths, H x W pixels, P points.
"""

from __future__ import annotations

from statistics import fmean

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from fourdfy.evaluation.registry import metric
from fourdfy.evaluation.views import Sequence, Views
from fourdfy.ops.cameras import cast_rays
from fourdfy.types import Cameras

DEPTH_TOLERANCE = 0.02
"""Of the camera's distance, by which two views' depths of a point may differ."""
THUMBNAIL = 32
"""Pixels per side of the images by which sides are compared."""
ALIKE = 0.02
"""Difference between the most different sides, of 0..1, below which an object has no sides to repeat."""


@metric("highest")
def view_consistency(views: Views) -> float | None:
    """Share of the points seen in one view that the next one confirms at the same depth, 0..1; 1 for a solid.

    Each pixel of the object is placed in space by its depth and projected into the next azimuth. Points that
    are hidden there do not count; those that it looks through do. Fog and floaters lower it.
    """
    count = len(views.around.rgb)
    shares = [confirmed_share(views.around, here, (here + 1) % count) for here in range(count)]
    known = [share for share in shares if share is not None]
    return fmean(known) if known else None


@metric("lowest")
def repeated_sides(views: Views) -> float | None:
    """How much the object looks the same again from another side, 0..1: near 1 for the Janus problem.

    Prominence of the highest peak of the views' similarity over the angle between them. It needs no network,
    so it can't tell a second face from the sides of a symmetric thing: 1 is right for a cube or a car's
    wheels. None for an object that looks the same from everywhere.
    """
    return peak_prominence(similarity_by_angle(views.around))


def confirmed_share(seen: Sequence, here: int, there: int) -> float | None:
    """Share of the points of view ``here`` that ``there`` shows at their depth, of those that it should show;
    None if there are none."""
    points = lifted(seen, here)
    camera = seen.cameras[there : there + 1]
    distance = (points - camera.c2w[0, :3, 3]).norm(dim=-1)
    pixels, is_in_image = projected(points, camera)
    depth, inside = seen.depth[there, ..., 0], seen.inside[there]
    # A point may come to lie between pixels: their neighbours count as well.
    nearest, farthest = (_in_window(depth, inside, sign)[pixels[1], pixels[0]] for sign in (-1, 1))
    tolerance = DEPTH_TOLERANCE * float(camera.distances)
    shown = is_in_image & (distance <= farthest + tolerance)
    agrees = distance >= nearest - tolerance
    return float((agrees & shown).sum() / shown.sum()) if shown.any() else None


def lifted(seen: Sequence, index: int) -> Float[Tensor, "P 3"]:
    """The object's pixels of a frame as points in space."""
    rays = cast_rays(seen.cameras[index : index + 1])
    points = rays.origins[0] + rays.directions[0] * seen.depth[index]
    return points[seen.inside[index]]


def projected(points: Float[Tensor, "P 3"], camera: Cameras) -> tuple[Tensor, Bool[Tensor, "P"]]:
    """(column, row) of the pixel that each point falls into, [2, P], and whether it falls into the image."""
    local = (points - camera.c2w[0, :3, 3]) @ camera.c2w[0, :3, :3]
    focal = 0.5 * camera.height / torch.tan(0.5 * torch.deg2rad(camera.fovy_deg))
    ahead = (-local[:, 2]).clamp(min=1e-6)
    column = camera.width / 2 + local[:, 0] / ahead * focal
    row = camera.height / 2 - local[:, 1] / ahead * focal
    pixels = torch.stack([column, row]).floor().long()
    size = torch.tensor([[camera.width], [camera.height]])
    is_in_image = ((pixels >= 0) & (pixels < size)).all(dim=0) & (local[:, 2] < 0)
    return pixels.clamp(min=torch.zeros_like(size), max=size - 1), is_in_image


def similarity_by_angle(seen: Sequence) -> Float[Tensor, "N"]:
    """Mean similarity, 0..1, of the views that lie 0, 1, 2, ... azimuths apart; the first is 1."""
    shown = seen.rgb * seen.inside[..., None]
    images = torch.cat([shown, seen.inside[..., None].float()], dim=-1).movedim(-1, 1)
    small = interpolate(images, size=(THUMBNAIL, THUMBNAIL), mode="area")
    similar = []
    for shift in range(len(small)):
        other = small.roll(-shift, 0)
        either = torch.maximum(small[:, 3], other[:, 3])
        difference = (small[:, :3] - other[:, :3]).abs().mean(dim=1)
        similar.append(1 - difference.sum() / either.sum().clamp_min(1e-6))
    return torch.stack(similar)


def peak_prominence(similarity: Float[Tensor, "N"]) -> float | None:
    """Of the best peak but the one at angle 0: its height above the lowest valley before it, as a share of
    what is left to 1; 0 without a peak, None if the valley is less than ``ALIKE`` deep."""
    half = similarity[: len(similarity) // 2 + 1].tolist()
    if 1 - min(half) < ALIKE:
        return None
    best, valley = 0.0, 1.0
    for value in half:
        valley = min(valley, value)
        best = max(best, (value - valley) / (1 - valley) if valley < 1 else 0.0)
    return best


def _in_window(depth: Float[Tensor, "H W"], inside: Bool[Tensor, "H W"], sign: int) -> Float[Tensor, "H W"]:
    """Least (-1) or most (1) depth of the object in the 3 x 3 pixels around each; infinite without any."""
    empty = torch.where(inside, sign * depth, -torch.inf)
    found = sign * max_pool2d(empty[None, None], 3, stride=1, padding=1)[0, 0]
    return torch.where(found.isinf(), torch.inf, found)
