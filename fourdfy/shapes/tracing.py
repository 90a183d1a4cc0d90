"""Smooth bodies by sphere tracing: ellipsoids and rounded boxes that melt into each other.

F frames, P parts of a body (ellipsoids first), H x W pixels, R rays of all frames, N near the body, M pairs
of a ray and a part that is near it. Parts are joined by the exponential smooth minimum of their signed
distances (Quilez, "smooth minimum"), which does not depend on their order; its weights also mix the colours
of parts that melt, far more sharply than the shapes.

Of many vectors, x, y and z stand apart, and ``index_select`` takes some of them: both are several times as
fast as the shorter way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize

from fourdfy.ops.cameras import cast_rays
from fourdfy.types import Cameras, TensorRecord

BLEND = 0.022
"""Scene units over which shapes melt."""
COLOUR_BLEND = 0.0015
NEGLIGIBLE = 6 * BLEND
"""A part this far away changes the distance to the others by a hundredth of ``BLEND`` at most."""
ROUNDS, STEPS = 12, 4
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
        return self._of_kind(self.sizes.amax(dim=-1), self.sizes.norm(dim=-1) + self.rounding) + 2 * BLEND

    def farther(self, distance: float) -> Float[Tensor, "P"]:
        """Radius of a sphere around a part outside of which its ``distances`` are at least 0.8 of this one.

        Beyond the rim of a flat ellipsoid they are far too short.
        """
        shortest, longest = self.sizes.aminmax(dim=-1)
        rim = longest * (0.5**0.5 + distance / (2 * shortest))
        boxes = self.sizes.norm(dim=-1) + self.rounding + distance
        return self._of_kind(torch.maximum(rim, longest + distance), boxes)

    def _of_kind(self, ellipsoids: Float[Tensor, "P"], boxes: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
        return torch.cat([ellipsoids[: self.ellipsoids], boxes[self.ellipsoids :]])


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
    size = (len(cameras), fine.height, fine.width)
    origins, directions = cameras.c2w[:, :3, 3].T, cast_rays(fine).directions.flatten(0, 2).T.contiguous()
    meets, near = _meetings(bodies, origins, directions)
    ray = meets.nonzero()[:, 0]
    frame = ray // (fine.height * fine.width)
    origins, directions = origins.index_select(1, frame), directions.index_select(1, ray)
    pairs = _Pairs.of(bodies, near.index_select(1, ray), frame, origins, directions)
    t, hit = _trace(bodies, pairs)
    where = hit.nonzero()[:, 0]
    points = torch.addcmul(origins, t, directions).index_select(1, where)
    shaded, seen = _shade(bodies, pairs[hit], t[hit], points, frame[hit])
    image = directions.new_zeros(4, len(meets))  # premultiplied colour, opacity
    image[:3, ray[hit]], image[3, ray[hit]] = shaded, 1.0
    part = torch.full_like(meets, -1, dtype=torch.long)
    part[ray[hit]] = seen
    rgb, alpha = avg_pool2d(image.view(4, *size), supersample).movedim(0, -1).split((3, 1), dim=-1)
    middle = slice(supersample // 2, None, supersample)
    return rgb + (1 - alpha) * background[:, None, None], alpha, part.view(size)[:, middle, middle]


def _meetings(
    bodies: Bodies, origins: Float[Tensor, "3 F"], directions: Float[Tensor, "3 R"]
) -> tuple[Bool[Tensor, "R"], Bool[Tensor, "P R"]]:
    """The rays that meet a sphere around a part, and the parts that are near enough to a ray to matter."""
    towards = bodies.centres.permute(2, 1, 0) - origins[:, None]
    along = _dot(towards[..., None], directions.unflatten(1, (origins.shape[1], -1))[:, None]).square_()
    meets, near = (
        along > (_dot(towards, towards) - radius.square()[:, None])[..., None]
        for radius in (bodies.reach, bodies.farther(NEGLIGIBLE))
    )
    return meets.any(dim=0).flatten(), near.flatten(1)


@dataclass(frozen=True, kw_only=True)
class _Pairs(TensorRecord):
    """N rays, each with the parts that are near it: M pairs, those with ellipsoids first."""

    ray: Int[Tensor, "M"]
    part: Int[Tensor, "M"]
    origins: Float[Tensor, "3 M"]
    """In the axes of the part, as the directions are."""
    directions: Float[Tensor, "3 M"]
    sizes: Float[Tensor, "3 M"]
    rounding: Float[Tensor, "M"]
    ellipsoids: int
    rays: int
    """N."""

    @classmethod
    def of(
        cls,
        bodies: Bodies,
        near: Bool[Tensor, "P N"],
        frame: Int[Tensor, "N"],
        origins: Float[Tensor, "3 N"],
        directions: Float[Tensor, "3 N"],
    ) -> _Pairs:
        part, ray = near.nonzero().T.contiguous()
        row = _rows(bodies, frame, ray, part)
        axes = _axes(bodies, row)
        centres = bodies.centres.flatten(0, 1).T.contiguous().index_select(1, row)
        return cls(
            ray=ray,
            part=part,
            origins=_dot(axes, origins.index_select(1, ray) - centres),
            directions=_dot(axes, directions.index_select(1, ray)),
            sizes=bodies.sizes.T.contiguous().index_select(1, part),
            rounding=bodies.rounding.index_select(0, part),
            ellipsoids=int((part < bodies.ellipsoids).sum()),
            rays=len(frame),
        )

    def __getitem__(self, rays: Bool[Tensor, "N"]) -> _Pairs:
        mine = rays.index_select(0, self.ray).nonzero()[:, 0]
        some = self.mapped(lambda value: value.index_select(-1, mine))
        ray = (rays.cumsum(dim=0) - 1).index_select(0, some.ray)
        return replace(some, ray=ray, ellipsoids=int((mine < self.ellipsoids).sum()), rays=int(rays.sum()))

    def points(self, t: Float[Tensor, "N"]) -> Float[Tensor, "3 M"]:
        return torch.addcmul(self.origins, t.index_select(0, self.ray), self.directions)

    def distances(self, points: Float[Tensor, "3 M"]) -> Float[Tensor, "M"]:
        """Signed distance to each part; to ellipsoids, a first-order one."""
        number = self.ellipsoids
        scaled = points[:, :number] / self.sizes[:, :number]
        length = _length(scaled)
        ellipsoids = length * (length - 1) / _length(scaled / self.sizes[:, :number]).clamp_min(1e-6)
        outside = points[:, number:].abs() - self.sizes[:, number:]
        inside = outside.amax(dim=0).clamp_max(0)
        boxes = _length(outside.clamp_min(0)) + inside - self.rounding[number:]
        return torch.cat([ellipsoids, boxes])

    def union(self, points: Float[Tensor, "3 M"]) -> Float[Tensor, "N"]:
        """Signed distance to the melted body."""
        return -BLEND * self.sums((self.distances(points) / -BLEND).exp()).log()

    def sums(self, values: Float[Tensor, "*C M"]) -> Float[Tensor, "*C N"]:
        return values.new_zeros(*values.shape[:-1], self.rays).index_add_(-1, self.ray, values)

    def least(self, values: Float[Tensor, "M"]) -> Float[Tensor, "N"]:
        return values.new_full((self.rays,), torch.inf).scatter_reduce_(0, self.ray, values, "amin")


def _trace(bodies: Bodies, pairs: _Pairs) -> tuple[Float[Tensor, "N"], Bool[Tensor, "N"]]:
    """How far rays go until they meet the surface, and whether they do."""
    t, t_far = _entries(bodies, pairs)
    hit, going = torch.zeros_like(t, dtype=torch.bool), torch.arange(len(t), device=t.device)
    for _ in range(ROUNDS):
        now, inside = t[going], hit[going]
        for _ in range(STEPS):
            distance = pairs.union(pairs.points(now))
            inside = inside | (distance < SURFACE)
            now = torch.where(inside, now, now + STEP_SHARE * distance)
        t[going], hit[going] = now, inside
        rest = ~inside & (now < t_far[going])
        pairs, going = pairs[rest], going[rest]
    return t, hit


def _entries(bodies: Bodies, pairs: _Pairs) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """Where rays enter the first sphere around a part, or begin, and leave the last."""
    middle = -_dot(pairs.origins, pairs.directions)
    reach = bodies.reach.index_select(0, pairs.part)
    half = (reach.square() - (_dot(pairs.origins, pairs.origins) - middle.square())).sqrt()  # NaN: it misses
    near, far = ((sign * middle - half).nan_to_num(torch.inf) for sign in (1, -1))
    return pairs.least(near).clamp_min(0), -pairs.least(far)


def _shade(
    bodies: Bodies,
    pairs: _Pairs,
    t: Float[Tensor, "N"],
    points: Float[Tensor, "3 N"],
    frame: Int[Tensor, "N"],
) -> tuple[Float[Tensor, "3 N"], Int[Tensor, "N"]]:
    """Colour and nearest part of points on the surface."""
    local, row = pairs.points(t), _rows(bodies, frame, pairs.ray, pairs.part)
    distances = pairs.distances(local)
    away = distances - pairs.least(distances).index_select(0, pairs.ray)
    seen = torch.empty_like(frame)
    seen[pairs.ray[away == 0]] = pairs.part[away == 0]
    weights = (away / -COLOUR_BLEND).exp()
    colours = bodies.colours.flatten(0, 1).T.contiguous().index_select(1, row)
    colour = pairs.sums(weights * colours) / pairs.sums(weights)
    axes, corners = _axes(bodies, row), points.new_tensor([[1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]])
    # Four distances around a point give their gradient.
    around = torch.stack([pairs.union(local + SURFACE * _dot(axes, corner)) for corner in corners])
    normal = normalize(corners.T @ around, dim=0)
    above = points + CREASE * normal
    towards = bodies.centres.permute(2, 1, 0).index_select(2, frame) - above[:, None]
    near = _dot(towards, towards) < bodies.farther(CREASE + NEGLIGIBLE).square()[:, None]
    sky = _Pairs.of(bodies, near, frame, above, normal)
    open_sky = (sky.union(sky.origins) / CREASE).clamp(0, 1)
    light = 0.58 + 0.42 * (0.5 + 0.5 * normal[2])
    return (colour * light * (0.72 + 0.28 * open_sky)).clamp(0, 1), seen


def _rows(
    bodies: Bodies, frame: Int[Tensor, "N"], ray: Int[Tensor, "M"], part: Int[Tensor, "M"]
) -> Int[Tensor, "M"]:
    """Which of the F * P parts of all poses."""
    return frame.index_select(0, ray) * bodies.centres.shape[1] + part


def _axes(bodies: Bodies, row: Int[Tensor, "M"]) -> Float[Tensor, "3 3 M"]:
    """[k, i]: how far the world's k-th axis goes along the i-th of the part."""
    return bodies.axes.flatten(0, 1).flatten(1).T.contiguous().index_select(1, row).unflatten(0, (3, 3))


def _dot(a: Float[Tensor, "3 *A"], b: Float[Tensor, "3 *B"]) -> Tensor:
    """Sum over the first axis; of axes and vectors, the vectors in those axes."""
    return torch.addcmul(torch.addcmul(a[0] * b[0], a[1], b[1]), a[2], b[2])


def _length(vectors: Float[Tensor, "3 M"]) -> Float[Tensor, "M"]:
    return _dot(vectors, vectors).sqrt()
