"""Where an object of the shapes world is at each moment, by comparison with the truth's own renderings.

The prompt's motion changes one coordinate of the object: its height, its offset to the side, its scale or
its angle. The true object is rendered at every value of it, from the same cameras as the scene; the value
of a moment is that of the rendering that matches best. Images are compared by silhouette and by how grey
their pixels are (``marks.greyness``), so that a mark whose pupil has washed out, or that has lost its edge
or half of its contrast, still tells where the front is.

T moments, A azimuths, K values of the coordinate, H x W pixels, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.evaluation.frames import Frames, Render, look_from
from fourdfy.evaluation.marks import wrap
from fourdfy.types import Cameras

OVERLAP = 0.5
"""A moment is untracked where the best match shares less of its silhouette than this (intersection over
union): nothing is seen, fog, or not the object."""

CONTRAST = 0.15
"""A moment's angle is untracked where the match of the best one rises above the mean over all by less
than this share of what the truth's does."""

ALTERNATIVE = 0.5
"""Other angles are considered from this share of the best one's contrast on: a cube without its mark
matches itself every 90 degrees, and a ghost of the mark beside the mark may match as well."""

WORSE_DEG = 360.0
"""Degrees of turning that a match without any contrast is worth, less for better ones."""

SKIP_DEG = 75.0
"""A moment is left out of a track if that shortens it by more than this: an angle that is wrong by
less can not make ``wrap`` miss a turn, as the truth moves 30 degrees between moments."""


@dataclass(frozen=True)
class Coordinate:
    """What a motion changes."""

    values: Float[Tensor, "K"]
    """Evenly spaced: beyond what the truth reaches, so that a gain of 1.5 is measured."""
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Direction in which the object moves for each unit."""
    scales: bool = False
    turns: bool = False


COORDINATES = {
    "bouncing": Coordinate(torch.arange(-6, 15) * 0.05, offset=(0.0, 0.0, 1.0)),
    "sliding": Coordinate(torch.arange(-14, 15) * 0.05, offset=(0.0, 1.0, 0.0)),
    "pulsing": Coordinate(torch.arange(8, 35) * 0.05, scales=True),
    "spinning": Coordinate(torch.arange(0, 36) * 10.0, turns=True),
}
"""By motion; scene units, factors, or degrees."""


def poses(motion: str, still: Render, cameras: Cameras) -> Float[Tensor, "K A H W C"]:
    """What ``track`` compares with: the true object, ``still``, at every value of what a motion changes."""
    coordinate = COORDINATES[motion]
    posed = [posed_cameras(cameras, coordinate, float(value)) for value in coordinate.values]
    return torch.stack([_features(look_from(still, views)) for views in posed])


def track(motion: str, seen: Frames, bank: Float[Tensor, "K A H W C"]) -> Float[Tensor, "T"]:
    """The coordinate that a motion changes at each moment; NaN where it is untracked.

    Args:
        seen: T moments of A azimuths each, times slowest.
        bank: ``poses`` from the A cameras of the first moment.
    """
    coordinate = COORDINATES[motion]
    ours = _features(seen).unflatten(0, (-1, bank.shape[1]))
    costs = torch.stack([(bank - moment).square().flatten(1).sum(dim=1) for moment in ours])
    costs[_overlap(ours[..., 0], bank[costs.argmin(dim=1), ..., 0]) < OVERLAP] = math.nan
    if coordinate.turns:
        itself = (bank - bank[0]).square().flatten(1).sum(dim=1)
        return angle_track([_angles(row, float(itself.mean())) for row in costs])
    return torch.stack([_lowest(row, coordinate.values) for row in costs])


def posed_cameras(cameras: Cameras, coordinate: Coordinate, value: float) -> Cameras:
    """Cameras that see an object at rest as ``cameras`` would see it at a value of the coordinate."""
    c2w = cameras.c2w.clone()
    c2w[:, :3, 3] -= value * c2w.new_tensor(coordinate.offset)
    if coordinate.scales:
        c2w[:, :3, 3] /= value
    if coordinate.turns:
        cos, sin = math.cos(math.radians(value)), math.sin(math.radians(value))
        c2w[:, :3] = c2w.new_tensor([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]]) @ c2w[:, :3]
    return replace(cameras, c2w=c2w)


def angle_track(candidates: Sequence[Sequence[tuple[float, float]]]) -> Float[Tensor, "T"]:
    """Unwrapped angle (degrees) over T moments; NaN where there is no candidate, or they were left out.

    The shortest way through one candidate per moment, where leaving a moment out costs ``SKIP_DEG``:
    a cube without its mark is followed by continuity, and a single wrong match, which would add a
    whole turn to all that follows, is left out.

    Args:
        candidates: for each moment the angles that match, and what each adds to the way's length.
    """
    seen = [(moment, angles) for moment, angles in enumerate(candidates) if angles]
    nodes = [(place, moment, *angle) for place, (moment, angles) in enumerate(seen) for angle in angles]
    ways: list[tuple[float, list[tuple[int, float]]]] = []  # the shortest to each node: its cost and steps
    for place, moment, angle, extra in nodes:
        costs: list[tuple[float, list[tuple[int, float]]]] = [(SKIP_DEG * place, [])] + [
            (cost + abs(wrap(angle - other)) + SKIP_DEG * (place - before - 1), steps)
            for (before, _, other, _), (cost, steps) in zip(nodes, ways, strict=False)
            if before < place
        ]
        cost, steps = min(costs, key=itemgetter(0))
        ways.append((cost + extra, [*steps, (moment, angle)]))
    ends = [
        (cost + SKIP_DEG * (len(seen) - place - 1), steps)
        for (place, *_), (cost, steps) in zip(nodes, ways, strict=True)
    ]
    track = torch.full((len(candidates),), math.nan)
    previous = None
    for moment, angle in min(ends, key=itemgetter(0), default=(0, []))[1]:
        track[moment] = wrap(angle) if previous is None else previous + wrap(angle - previous)
        previous = float(track[moment])
    return track


def _features(frames: Frames) -> Float[Tensor, "F H W C"]:
    return torch.stack([frames.smooth.opacity[..., 0], frames.smooth.greyness], dim=-1)


def _overlap(ours: Float[Tensor, "T A H W"], theirs: Float[Tensor, "T A H W"]) -> Float[Tensor, "T"]:
    """Intersection over union of opacities, over all azimuths."""
    shared, union = (pick(ours, theirs).flatten(1).sum(dim=1) for pick in (torch.minimum, torch.maximum))
    return shared / union.clamp_min(1e-6)


def _angles(costs: Float[Tensor, "K"], of_truth: float) -> list[tuple[float, float]]:
    """The angles that match, each with its ``extra`` for ``angle_track``; none if untracked."""
    depths = costs.mean() - costs
    best = float(depths.max())
    if not best > CONTRAST * of_truth:
        return []
    values = COORDINATES["spinning"].values
    peaks = (depths >= depths.roll(1)) & (depths > depths.roll(-1)) & (depths >= ALTERNATIVE * best)
    return [
        (
            float(values[k] + values[1] * _vertex(*(costs[(k + j) % len(costs)] for j in (-1, 0, 1)))),
            WORSE_DEG * (1 - float(depths[k]) / best),
        )
        for k in peaks.nonzero()[:, 0].tolist()
    ]


def _lowest(costs: Float[Tensor, "K"], values: Float[Tensor, "K"]) -> Float[Tensor, ""]:
    """The value of least cost, finer than their spacing; NaN if the costs are."""
    if costs.isnan().any():
        return costs[0]
    k = int(costs.argmin())
    if k in (0, len(values) - 1):
        return values[k]
    return values[k] + (values[1] - values[0]) * _vertex(*costs[k - 1 : k + 2])


def _vertex(before: Tensor, at: Tensor, after: Tensor) -> Tensor:
    """Where the parabola through three points is lowest, in steps from the middle one."""
    return 0.5 * (before - after) / (before - 2 * at + after).clamp_min(1e-9)
