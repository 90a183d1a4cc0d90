"""The rays of a step, split into passes that bound how many samples there are at once.

R rays, N samples over all rays (packed, sorted by ray).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from fourdfy.ops.ranks import gathered, offset
from fourdfy.ops.ray_marching.rays import Rays
from fourdfy.types import RayBundle, RenderOutput, Samples, TensorRecord


@dataclass(frozen=True, kw_only=True)
class FlatRays(Rays):
    """A flat list of rays, each with the data of its frame."""

    light_positions: Float[Tensor, "R 3"]

    @classmethod
    def of(cls, rays: RayBundle) -> FlatRays:
        per_frame = rays.directions[0, ..., 0].numel()
        return cls(
            origins=rays.origins.reshape(-1, 3),
            directions=rays.directions.reshape(-1, 3),
            times=rays.times[:, None].expand(-1, per_frame).reshape(-1, 1),
            light_positions=rays.light_positions[:, None].expand(-1, per_frame, -1).reshape(-1, 3),
        )


@dataclass(frozen=True)
class Pass:
    """Neighbouring rays, and their samples."""

    rays: slice
    samples: slice


def split_rays(samples: Samples, n_rays: int, limit: int) -> list[Pass]:
    """Passes of whole rays with at most ``limit`` samples each; a ray that has more is a pass by itself.

    If there are more samples, where each ray's end is read back to the host once.
    """
    if len(samples) <= limit:
        return [Pass(rays=slice(0, n_rays), samples=slice(0, len(samples)))]
    rays = torch.arange(n_rays, device=samples.ray_indices.device)
    ends = torch.searchsorted(samples.ray_indices, rays, right=True).cpu()
    passes, ray, sample = [], 0, 0
    while ray < n_rays:
        stop = max(ray + 1, int(torch.searchsorted(ends, sample + limit, right=True)))
        last = int(ends[stop - 1])
        passes.append(Pass(rays=slice(ray, stop), samples=slice(sample, last)))
        ray, sample = stop, last
    return passes


def cut(rays: FlatRays, samples: Samples, part: Pass) -> tuple[FlatRays, Samples]:
    """The rays and samples of a pass; its ray indices count from its first ray."""
    some = Samples(
        ray_indices=samples.ray_indices[part.samples] - part.rays.start,
        t_starts=samples.t_starts[part.samples],
        t_ends=samples.t_ends[part.samples],
    )
    return rays[part.rays], some


@dataclass(frozen=True, kw_only=True)
class ShadedRays(TensorRecord):
    """Some rays' sums over their samples, without the background, and what their samples are."""

    rgb: Float[Tensor, "R 3"]
    opacity: Float[Tensor, "R 1"]
    depth: Float[Tensor, "R 1"]
    z_variance: Float[Tensor, "R 1"]
    normal: Float[Tensor, "R 3"] | None
    deformation: Float[Tensor, "R 3"] | None
    weights: Float[Tensor, "N"]
    normals: Float[Tensor, "N 3"] | None
    t_dirs: Float[Tensor, "N 3"] | None


PER_SAMPLE = ("weights", "normals", "t_dirs")
"""The fields of ``ShadedRays`` with a row for each sample; the others have one for each ray."""


def of_all_ranks(samples: Samples, shaded: ShadedRays, first: int, n_rays: int) -> tuple[Samples, ShadedRays]:
    """All ``n_rays`` rays, of which each rank has shaded its share, this one those from ``first`` on."""
    start, total = offset(len(samples))
    placed = replace(samples, ray_indices=samples.ray_indices + first)
    values = shaded.tensors()
    by_sample = [*placed.tensors().values(), *(values[name] for name in PER_SAMPLE if name in values)]
    by_ray = [value for name, value in values.items() if name not in PER_SAMPLE]
    indices, t_starts, t_ends, *of_samples = gathered(by_sample, start, total)
    of_rays, of_each = iter(gathered(by_ray, first, n_rays)), iter(of_samples)
    whole = {name: next(of_each) for name in PER_SAMPLE if name in values}
    whole |= {name: next(of_rays) for name in values if name not in PER_SAMPLE}
    return Samples(ray_indices=indices, t_starts=t_starts, t_ends=t_ends), replace(shaded, **whole)


def assemble(
    rays: RayBundle, background: Float[Tensor, "F H W 3"], samples: Samples, shaded: ShadedRays
) -> RenderOutput:
    """All rays as images, over the background."""
    shape = rays.directions.shape[:3]

    def image(pixels: Tensor) -> Tensor:
        return pixels.view(*shape, -1)

    foreground, opacity, normal = image(shaded.rgb), image(shaded.opacity), None
    if shaded.normal is not None:
        normal = (normalize(image(shaded.normal), dim=-1) + 1) / 2 * opacity
    return RenderOutput(
        comp_rgb=foreground + background * (1 - opacity),
        comp_rgb_fg=foreground,
        opacity=opacity,
        depth=image(shaded.depth),
        z_variance=image(shaded.z_variance),
        samples=samples,
        weights=shaded.weights,
        comp_normal=normal,
        deformation=None if shaded.deformation is None else image(shaded.deformation),
        normals=shaded.normals,
        t_dirs=shaded.t_dirs,
    )


def chunks(positions: Tensor, times: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of both; one empty piece if there are no points."""
    return zip(positions.split(size), times.split(size), strict=True)
