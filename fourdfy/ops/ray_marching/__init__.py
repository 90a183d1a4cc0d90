"""Fixed steps along rays through the scene's box, skipping what is known to be empty or hidden.

R rays, N samples over all rays (packed, sorted by ray). Nothing here carries a gradient.
"""

from __future__ import annotations

from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.ops.backends import Operation
from fourdfy.ops.ray_marching.rays import Density, Rays, SteppedRays
from fourdfy.types import Samples


@torch.no_grad()
def march(stepped: SteppedRays, backend: str = "auto") -> Samples:
    """All candidates of all rays."""
    return OPERATION.select(backend, stepped.jitter).march(stepped)


@torch.no_grad()
def find_visible(
    stepped: SteppedRays,
    density: Density,
    *,
    alpha_threshold: float | Float[Tensor, ""],
    transmittance_threshold: float = 1e-4,
    max_samples: int = 1 << 22,
    backend: str = "auto",
) -> Samples:
    """The candidates that are seen: dense enough themselves, and not hidden behind others of their ray.

    A fast back end evaluates the density from near to far, a few candidates of each ray at a time, and of a
    ray that nothing passes any more no further one. It may decide otherwise than the reference where a
    midpoint lies within rounding of a cell's border, or a value within 1e-4 of its threshold.

    Args:
        alpha_threshold: least share of the light that a sample stops.
        transmittance_threshold: least share of the light that reaches a sample.
        max_samples: bound on candidates that are evaluated at once, if no ray alone has more.
    """
    return OPERATION.select(backend, stepped.jitter).find_visible(
        stepped,
        density,
        alpha_threshold=torch.as_tensor(alpha_threshold).to(stepped.jitter),
        transmittance_threshold=transmittance_threshold,
        max_samples=max_samples,
    )


def _sample(module: ModuleType, device: torch.device, family: None) -> tuple[Tensor, ...]:
    """Number, sum of distances and of their squares of each ray's samples in a half full box."""
    generator = torch.Generator().manual_seed(0)
    origins = 4 * torch.rand(64, 3, generator=generator) - 2
    targets = torch.rand(64, 3, generator=generator) - 0.5
    rays = Rays(
        origins=origins,
        directions=torch.nn.functional.normalize(targets - origins, dim=-1),
        times=torch.rand(64, 1, generator=generator),
    )
    stepped = SteppedRays(
        rays=rays.to(device),
        jitter=torch.rand(64, generator=generator).to(device),
        radius=1.0,
        step_size=0.1,
        occupied=(torch.rand(8, 8, 8, generator=generator) < 0.5).to(device),
    )

    def density(positions: Tensor, times: Tensor) -> Tensor:
        return 8 * (1 + torch.sin(9 * positions + times).sum(-1)).clamp(min=0)

    limits = {"transmittance_threshold": 0.1, "max_samples": 1 << 20}
    found = (
        module.march(stepped),
        module.find_visible(stepped, density, alpha_threshold=torch.full((), 0.02, device=device), **limits),
    )
    return tuple(
        torch.zeros(64, device=device).index_add(0, samples.ray_indices, samples.t_starts**power)
        for samples in found
        for power in range(3)
    )


OPERATION = Operation(
    name="ray marching",
    package=__name__,
    modules={"torch": ".reference", "numba": ".numba_cpu", "triton": ".triton_gpu"},
    fastest={"cpu": "numba", "cuda": "triton"},
    sample=_sample,
)
