"""Losses on the render itself (behaviour of threestudio and 4D-fy). F frames of H x W pixels.

``REGULARIZERS`` names them: ``system.loss.lambda_sparsity`` weighs ``REGULARIZERS["sparsity"]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.types import RenderOutput


def sparsity(render: RenderOutput) -> Float[Tensor, ""]:
    """Mean of sqrt(opacity^2 + 0.01): pulls thin fog to nothing."""
    return (render.opacity**2 + 0.01).sqrt().mean()


def opaque(render: RenderOutput) -> Float[Tensor, ""]:
    """Mean binary entropy of the opacity, clamped to [0.001, 0.999]: pushes it to 0 or 1."""
    opacity = render.opacity.clamp(1e-3, 1 - 1e-3)
    return -(opacity * opacity.log() + (1 - opacity) * (1 - opacity).log()).mean()


def orient(render: RenderOutput) -> Float[Tensor, ""]:
    """Weighted squared cosine of normals that face away (Verbin et al. 2022, eq. 11), of a pixel's ray.

    The mean is over the pixels with any opacity. Gradients turn the normals and leave the weights alone.
    """
    assert render.normals is not None and render.t_dirs is not None
    facing_away = (render.normals * render.t_dirs).sum(-1).clamp(min=0.0)
    return (render.weights.detach() * facing_away**2).sum() / (render.opacity > 0).sum().clamp(min=1)


def z_variance(render: RenderOutput) -> Float[Tensor, ""]:
    """Mean variance of depth along the rays that hit something (opacity > 0.5)."""
    hit = (render.opacity > 0.5).to(render.z_variance)
    return (render.z_variance * hit).sum() / hit.sum().clamp(min=1)


def deformation(render: RenderOutput) -> Float[Tensor, ""]:
    """Sum of squared differences of the displacement over the frames of a clip, rows and columns (a sum)."""
    field = render.deformation
    assert field is not None
    clips = field.unflatten(0, (-1, render.group_size))
    return sum((torch.diff(clips, dim=axis) ** 2).sum() for axis in (1, 2, 3))  # type: ignore[return-value]


REGULARIZERS: dict[str, Callable[[RenderOutput], Float[Tensor, ""]]] = {
    "sparsity": sparsity,
    "opaque": opaque,
    "orient": orient,
    "z_variance": z_variance,
    "deformation": deformation,
}

NEEDS = {
    "orient": (
        "normals",
        "system.material_type=diffuse-with-point-light-material or system.renderer.return_comp_normal=true",
    ),
    "deformation": ("deformation", "pos_encoding_config.otype=HashGridSpatialTimeDeform in a dynamic stage"),
}
"""What these losses read of a render and only some scenes have, and the settings that give it."""
