"""What every back end of ``ops.compositing`` gives."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from fourdfy.types import TensorRecord


@dataclass(frozen=True, kw_only=True)
class Composite(TensorRecord):
    """What R rays see of N samples, before any background."""

    weights: Float[Tensor, "N"]
    """w: alpha times transmittance."""
    opacity: Float[Tensor, "R 1"]
    """Sum of w."""
    depth: Float[Tensor, "R 1"]
    """Sum of w t, in scene units and not divided by the opacity. Losses use it, as in threestudio; images and
    files show ``expected_depth``."""
    z_variance: Float[Tensor, "R 1"]
    """Sum of w (t - depth)^2: how thick the surface looks. Scene units squared."""
    values: Float[Tensor, "R C"]
    """Sum of w v."""
