"""Losses on the render itself (behaviour of threestudio and 4D-fy). F frames of H x W pixels.

``system.loss.lambda_sparsity`` weighs ``REGULARIZERS["sparsity"]``. A plugin's own has a decorator:
``@regularizer("depth", needs=("samples",))``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.types import RenderOutput

Loss = Callable[[RenderOutput], Float[Tensor, ""]]


@dataclass(frozen=True)
class Regularizer:
    """A loss on a render, and what only some scenes render that it reads."""

    function: Loss
    needs: tuple[str, ...]
    """Optional fields of ``RenderOutput``; a scene that lacks one is refused when the config is parsed."""
    advice: str
    """The settings that give them, for messages."""

    def __call__(self, render: RenderOutput) -> Float[Tensor, ""]:
        return self.function(render)


REGULARIZERS: dict[str, Regularizer] = {}


def regularizer(name: str, needs: tuple[str, ...] = (), advice: str = "") -> Callable[[Loss], Loss]:
    """Function decorator: ``lambda_NAME`` weighs the loss.

    Raises:
        ValueError: another function has the name.
    """

    def wrap(function: Loss) -> Loss:
        known = REGULARIZERS.get(name, Regularizer(function, needs, advice)).function
        if (known.__module__, known.__qualname__) != (function.__module__, function.__qualname__):
            raise ValueError(f"regularizer {name!r} is already {known.__module__}.{known.__qualname__}")
        REGULARIZERS[name] = Regularizer(function, needs, advice)
        return function

    return wrap


@regularizer("sparsity")
def sparsity(render: RenderOutput) -> Float[Tensor, ""]:
    """Mean of sqrt(opacity^2 + 0.01), which removes thin fog."""
    return (render.opacity**2 + 0.01).sqrt().mean()


@regularizer("opaque")
def opaque(render: RenderOutput) -> Float[Tensor, ""]:
    """Mean binary entropy of the opacity, clamped to [0.001, 0.999]: pushes it to 0 or 1."""
    opacity = render.opacity.clamp(1e-3, 1 - 1e-3)
    return -(opacity * opacity.log() + (1 - opacity) * (1 - opacity).log()).mean()


@regularizer(
    "orient",
    needs=("normals", "t_dirs", "weights"),
    advice="system.material_type=diffuse-with-point-light-material or "
    "system.renderer.return_comp_normal=true",
)
def orient(render: RenderOutput) -> Float[Tensor, ""]:
    """Weighted squared cosine of normals that face away (Verbin et al. 2022, eq. 11), of a pixel's ray.

    The mean is over the pixels with any opacity. Gradients turn the normals and leave the weights alone.
    """
    assert render.normals is not None and render.t_dirs is not None and render.weights is not None
    facing_away = (render.normals * render.t_dirs).sum(-1).clamp(min=0.0)
    return (render.weights.detach() * facing_away**2).sum() / (render.opacity > 0).sum().clamp(min=1)


@regularizer("z_variance", needs=("z_variance",), advice="a scene that is composited from samples")
def z_variance(render: RenderOutput) -> Float[Tensor, ""]:
    """Mean variance of depth along the rays that hit something (opacity > 0.5)."""
    assert render.z_variance is not None
    hit = (render.opacity > 0.5).to(render.z_variance)
    return (render.z_variance * hit).sum() / hit.sum().clamp(min=1)


@regularizer(
    "deformation",
    needs=("deformation",),
    advice="pos_encoding_config.otype=HashGridSpatialTimeDeform in a dynamic stage",
)
def deformation(render: RenderOutput) -> Float[Tensor, ""]:
    """Sum of squared differences of the displacement over the frames of a clip, rows and columns (a sum)."""
    assert render.deformation is not None
    clips = render.deformation.unflatten(0, (-1, render.group_size))
    over_time, over_rows, over_columns = ((torch.diff(clips, dim=axis) ** 2).sum() for axis in (1, 2, 3))
    return over_time + over_rows + over_columns
