"""How much GPU memory a sample takes that has a graph, measured where and as it is rendered.

It depends on the back ends, the material, normals and the card, so no table of numbers could tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fourdfy.scenes.nerf.passes import FlatRays, ShadedRays
from fourdfy.types import Samples

SAMPLES_PER_RAY = 64
COUNTS = (1 << 18, 1 << 20)
"""Samples of the two measurements, so many that whatever is made for many samples alone exists in both."""


def bytes_per_sample(
    shade: Callable[[FlatRays, Samples], ShadedRays], parameters: Sequence[Tensor], radius: float
) -> float:
    """Bytes by which one more sample raises the peak, forward and backward; ``parameters`` are on a GPU.

    Args:
        shade: renders samples, with a graph.
        parameters: what gets gradients; not frozen.
        radius: half side of the box that the samples are drawn in.
    """
    few, many = COUNTS
    _peak(shade, parameters, radius, few)  # compiles kernels and fills caches
    peaks = [_peak(shade, parameters, radius, count) for count in COUNTS]
    return (peaks[1] - peaks[0]) / (many - few)


def _peak(
    shade: Callable[[FlatRays, Samples], ShadedRays], parameters: Sequence[Tensor], radius: float, count: int
) -> int:
    device = parameters[0].device
    rays, samples = through_the_box(count, radius, device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    values = [value for value in shade(rays, samples).tensors().values() if value.requires_grad]
    torch.autograd.grad(values, parameters, [torch.ones_like(v) for v in values], allow_unused=True)
    return torch.cuda.max_memory_allocated(device) - before


def through_the_box(count: int, radius: float, device: torch.device) -> tuple[FlatRays, Samples]:
    """``count`` samples on random rays through the middle of the box."""
    generator = torch.Generator().manual_seed(0)
    n_rays = count // SAMPLES_PER_RAY
    directions = normalize(torch.randn(n_rays, 3, generator=generator), dim=-1)
    rays = FlatRays(
        origins=-radius * directions,
        directions=directions,
        times=torch.rand(n_rays, 1, generator=generator),
        light_positions=-radius * directions,
    )
    starts = torch.linspace(0, 2 * radius, SAMPLES_PER_RAY + 1)[:-1].repeat(n_rays)
    samples = Samples(
        ray_indices=torch.arange(n_rays).repeat_interleave(SAMPLES_PER_RAY),
        t_starts=starts,
        t_ends=starts + 2 * radius / SAMPLES_PER_RAY,
    )
    return rays.to(device), samples.to(device)
