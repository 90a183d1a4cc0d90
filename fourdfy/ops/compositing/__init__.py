"""Volume compositing along rays (Max 1995; Mildenhall et al. 2020, eq. 3): one definition, several speeds.

R rays, N samples over all rays (packed, sorted by ray), C channels.
"""

from __future__ import annotations

from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.ops.backends import Operation
from fourdfy.ops.compositing.composite import Composite
from fourdfy.types import Samples


def composite(
    sigmas: Float[Tensor, "N"],
    values: Float[Tensor, "N C"],
    samples: Samples,
    n_rays: int,
    backend: str = "auto",
) -> Composite:
    """What ``n_rays`` rays see of samples with these densities and values.

    Carries gradients to ``sigmas`` and ``values``, from the weights too; the distances have none.
    """
    return OPERATION.select(backend, sigmas, values.shape[1]).composite(
        sigmas, values.to(sigmas.dtype), samples, n_rays
    )


def expected_depth(
    opacity: Float[Tensor, "*F H W 1"], depth: Float[Tensor, "*F H W 1"]
) -> Float[Tensor, "*F H W 1"]:
    """``sum w t / sum w``, the mean distance at which light is stopped; 0 where the opacity is 0.5 or less.

    Args:
        opacity, depth: the sums of ``Composite``.
    """
    return torch.where(opacity > 0.5, depth / opacity, 0)


def _sample(module: ModuleType, device: torch.device, channels: int) -> tuple[Tensor, ...]:
    """Values and gradients for rays of 0 to 99 samples."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device)

    ray_indices = torch.arange(64, device=device).repeat_interleave((100 * random(64)).long())
    t_starts = 2 + torch.arange(len(ray_indices), device=device) % 100 / 100
    samples = Samples(ray_indices=ray_indices, t_starts=t_starts, t_ends=t_starts + 0.01)
    inputs = [(20 * random(len(samples))).requires_grad_(), random(len(samples), channels).requires_grad_()]
    outputs = list(module.composite(*inputs, samples, 64).tensors().values())
    gradients = torch.autograd.grad(outputs, inputs, [random(*output.shape) for output in outputs])
    return *(output.detach() for output in outputs), *gradients


OPERATION = Operation(
    name="compositing",
    package=__name__,
    modules={"torch": ".reference", "triton": ".triton_gpu"},
    fastest={"cuda": "triton"},
    sample=_sample,
)
