"""Smooth bodies by sphere tracing: ellipsoids and rounded boxes that melt into each other.

F frames, P parts of a body (ellipsoids first), H x W pixels, N rays near the body. Parts are joined by the
exponential smooth minimum of their signed distances (Quilez, "smooth minimum"), which does not depend on
their order; its weights also mix the colours of parts that melt, far more sharply than the shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool2d

from fourdfy.ops.cameras import cast_rays
from fourdfy.types import Cameras, TensorRecord

BLEND = 0.022
"""Scene units over which shapes melt."""
COLOUR_BLEND = 0.0015
ROUNDS, STEPS = 6, 8
"""Rays that are still on their way go on in the next round, alone; few do, along edges."""
STEP_SHARE = 0.9
"""Of the distance: that to an ellipsoid is a bound only near it."""
SURFACE = 0.003
"""A ray this near to the surface has arrived."""
CREASE = 0.12
"""Creases darken the surface where it comes so near to another part."""


@dataclass(frozen=True, kw_only=True)
class Bodies(TensorRecord):
    """A body in F poses."""

    centres: Float[Tensor, "F P 3"]
    axes: Float[Tensor, "F P 3 3"]
    """Columns: the part's own axes in the world."""
    sizes: Float[Tensor, "P 3"]
    """Radii of an ellipsoid; half extents of a box before rounding, (0, 0, h) for a capsule."""
    rounding: Float[Tensor, "P"]
    """Radius of a box's edges, 0 for ellipsoids."""
    colours: Float[Tensor, "F P 3"]
    ellipsoids: int

    @property
    def reach(self) -> Float[Tensor, "P"]:
        """Radius of a sphere around a part that its melted surface stays in."""
        boxes = self.sizes.norm(dim=-1) + self.rounding
        first = torch.arange(len(boxes), device=boxes.device) < self.ellipsoids
        return torch.where(first, self.sizes.amax(dim=-1), boxes) + 2 * BLEND


def joined_bodies(several: Sequence[Bodies]) -> Bodies:
    """The poses of one body, one after the other."""
    return replace(
        several[0],
        centres=torch.cat([one.centres for one in several]),
        axes=torch.cat([one.axes for one in several]),
        colours=torch.cat([one.colours for one in several]),
    )


def render_bodies(
    bodies: Bodies, cameras: Cameras, background: Float[Tensor, "F 3"], *, supersample: int = 2
) -> tuple[Float[Tensor, "F H W 3"], Float[Tensor, "F H W 1"], Int[Tensor, "F H W"]]:
    """Images (0..1, over ``background``), opacity, and the part seen in each pixel's middle (-1: none).

    Shading is baked: it depends on the surface's height towards the sky and on creases, not on the view.
    """
    fine = replace(cameras, height=cameras.height * supersample, width=cameras.width * supersample)
    colour, alpha, part = _trace(bodies, fine)
    colour = colour + (1 - alpha) * background[:, None, None, :]
    middle = supersample // 2
    return (
        _shrink(colour, supersample),
        _shrink(alpha, supersample),
        part[:, middle::supersample, middle::supersample],
    )


def _trace(
    bodies: Bodies, cameras: Cameras
) -> tuple[Float[Tensor, "F H W 3"], Float[Tensor, "F H W 1"], Int[Tensor, "F H W"]]:
    """Premultiplied colour, opacity and part, one ray per pixel."""
    rays = cast_rays(cameras)
    directions = rays.directions.flatten(1, 2)
    origins = cameras.c2w[:, :3, 3]
    t_near, t_far = _entries(bodies, origins, directions)
    frame, ray = (t_near < t_far).nonzero(as_tuple=True)
    t, t_far = t_near[frame, ray], t_far[frame, ray]
    local = _LocalRays.of(bodies, origins, directions[frame, ray], frame)
    inside, active = torch.zeros_like(t, dtype=torch.bool), torch.arange(len(t), device=t.device)
    for _ in range(ROUNDS):
        rest = local[active]
        for _ in range(STEPS):
            distance = _union(bodies, rest.at(t[active]))
            inside[active] |= distance < SURFACE
            t[active] += torch.where(inside[active], 0.0, STEP_SHARE * distance)
        active = active[~inside[active] & (t[active] < t_far[active])]
    hit = inside.nonzero()[:, 0]
    frame, ray = frame[hit], ray[hit]
    shaded, seen = _shade(bodies, local[hit].at(t[hit]), frame)
    size = (len(cameras), cameras.height * cameras.width)
    rgb, alpha = directions.new_zeros(*size, 3), directions.new_zeros(*size, 1)
    part = torch.full(size, -1, device=directions.device)
    rgb[frame, ray], alpha[frame, ray], part[frame, ray] = shaded, 1.0, seen
    image = (len(cameras), cameras.height, cameras.width)
    return rgb.view(*image, 3), alpha.view(*image, 1), part.view(image)


def _entries(
    bodies: Bodies, origins: Float[Tensor, "F 3"], directions: Float[Tensor, "F R 3"]
) -> tuple[Float[Tensor, "F R"], Float[Tensor, "F R"]]:
    """Where rays enter the first sphere around a part and leave the last; in order if they meet any."""
    towards = bodies.centres - origins[:, None]
    middle = directions @ towards.mT
    squared = bodies.reach.square() - (towards.square().sum(-1)[:, None] - middle.square())
    half = squared.clamp_min(0).sqrt()
    near = torch.where(squared > 0, middle - half, torch.inf).amin(dim=-1)
    far = torch.where(squared > 0, middle + half, -torch.inf).amax(dim=-1)
    return near, far


@dataclass(frozen=True)
class _LocalRays:
    """Rays in the axes of every part; x, y and z apart, since sums over three neighbours are slow."""

    origins: Float[Tensor, "3 N P"]
    directions: Float[Tensor, "3 N P"]

    @classmethod
    def of(
        cls,
        bodies: Bodies,
        origins: Float[Tensor, "F 3"],
        directions: Float[Tensor, "N 3"],
        frame: Int[Tensor, "N"],
    ) -> _LocalRays:
        starts = torch.einsum("fpji,fpj->ifp", bodies.axes, origins[:, None] - bodies.centres)
        return cls(starts[:, frame], _local(bodies, directions, frame))

    def __getitem__(self, rays: Int[Tensor, "M"]) -> _LocalRays:
        return _LocalRays(self.origins[:, rays], self.directions[:, rays])

    def at(self, t: Float[Tensor, "N"]) -> Float[Tensor, "3 N P"]:
        return torch.addcmul(self.origins, t[:, None], self.directions)


def _local(bodies: Bodies, vectors: Float[Tensor, "N 3"], frame: Int[Tensor, "N"]) -> Float[Tensor, "3 N P"]:
    """The world's vectors in the axes of every part."""
    x, y, z = (bodies.axes[:, :, k].movedim(-1, 0)[:, frame] for k in range(3))
    return torch.addcmul(torch.addcmul(x * vectors[:, :1], y, vectors[:, 1:2]), z, vectors[:, 2:])


def _length(vectors: Float[Tensor, "3 N P"]) -> Float[Tensor, "N P"]:
    x, y, z = vectors
    return torch.addcmul(torch.addcmul(x * x, y, y), z, z).sqrt()


def _distances(bodies: Bodies, points: Float[Tensor, "3 N P"]) -> Float[Tensor, "N P"]:
    """Signed distance to each part; to ellipsoids, a first-order one."""
    number, sizes = bodies.ellipsoids, bodies.sizes.T[:, None]
    scaled = points[..., :number] / sizes[..., :number]
    length = _length(scaled)
    ellipsoids = length * (length - 1) / _length(scaled / sizes[..., :number]).clamp_min(1e-6)
    outside = points[..., number:].abs() - sizes[..., number:]
    x, y, z = outside
    inside = torch.maximum(torch.maximum(x, y), z).clamp_max(0)
    boxes = _length(outside.clamp_min(0)) + inside - bodies.rounding[number:]
    return torch.cat([ellipsoids, boxes], dim=-1)


def _union(bodies: Bodies, points: Float[Tensor, "3 N P"]) -> Float[Tensor, "N"]:
    return -BLEND * torch.logsumexp(_distances(bodies, points) / -BLEND, dim=-1)


def _shade(
    bodies: Bodies, points: Float[Tensor, "3 N P"], frame: Int[Tensor, "N"]
) -> tuple[Float[Tensor, "N 3"], Int[Tensor, "N"]]:
    """Colour and nearest part of points on the surface."""
    distances = _distances(bodies, points)
    colour = (distances / -COLOUR_BLEND).softmax(dim=-1)[:, None] @ bodies.colours[frame]
    corners = points.new_tensor([[1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]])
    normal = sum(  # four distances around a point give its gradient
        corner
        * _union(bodies, points + SURFACE * _local(bodies, corner.expand(len(frame), 3), frame))[:, None]
        for corner in corners
    )
    normal = torch.nn.functional.normalize(normal, dim=-1)
    above = points + CREASE * _local(bodies, normal, frame)
    open_sky = (_union(bodies, above) / CREASE).clamp(0, 1)
    light = 0.58 + 0.42 * (0.5 + 0.5 * normal[:, 2:])
    shaded = colour[:, 0] * light * (0.72 + 0.28 * open_sky[:, None])
    return shaded.clamp(0, 1), distances.argmin(dim=-1)


def _shrink(images: Float[Tensor, "F H W C"], factor: int) -> Float[Tensor, "F h w C"]:
    return avg_pool2d(images.movedim(-1, 1), factor).movedim(1, -1) if factor > 1 else images
