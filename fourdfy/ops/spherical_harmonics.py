"""Real spherical harmonics of a direction, in tiny-cuda-nn's order and signs.

N directions; degree k gives k^2 numbers, so degree 3 the bands 0, 1 and 2.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

MAX_DEGREE = 3


def spherical_harmonics(directions: Float[Tensor, "N 3"], degree: int) -> Float[Tensor, "N K"]:
    """The first ``degree ** 2`` harmonics of unit ``directions``.

    Raises:
        ValueError: a degree that is not 1, 2 or 3.
    """
    if not 1 <= degree <= MAX_DEGREE:
        raise ValueError(f"spherical harmonics of degree {degree}: expected 1 to {MAX_DEGREE}")
    x, y, z = directions.unbind(-1)
    harmonics = [torch.full_like(x, 0.28209479177387814)]
    if degree > 1:
        harmonics += [-0.48860251190291987 * y, 0.48860251190291987 * z, -0.48860251190291987 * x]
    if degree > 2:
        harmonics += [
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.94617469575755997 * z**2 - 0.31539156525251999,
            -1.0925484305920792 * x * z,
            0.54627421529603959 * (x**2 - y**2),
        ]
    return torch.stack(harmonics, dim=-1)
