"""Real spherical harmonics of a direction, in tiny-cuda-nn's order and signs.

N directions; degree k gives k^2 numbers, so degree 3 the bands 0, 1 and 2.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

MAX_DEGREE = 8


def spherical_harmonics(directions: Float[Tensor, "N 3"], degree: int) -> Float[Tensor, "N K"]:
    """The first ``degree ** 2`` harmonics of unit ``directions``.

    Raises:
        ValueError: a degree that is not 1 to 8.
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
    for band in range(3, degree):
        harmonics += _band(band, x, y, z)
    return torch.stack(harmonics, dim=-1)


def _band(band: int, x: Float[Tensor, "N"], y: Float[Tensor, "N"], z: Float[Tensor, "N"]) -> list[Tensor]:
    """The harmonics of a band l, order m from -l to l: ``(-1)^m K P(l, m)(z)`` times cos or sin of m phi.

    Sloan, Stupid Spherical Harmonics Tricks (2008), appendix A1; the factor sin^m theta stands with cos
    and sin, which makes them polynomials of x and y.
    """
    cosine, sine, negative, positive = torch.ones_like(x), torch.zeros_like(x), [], []
    for m in range(band + 1):
        # The associated Legendre function over sin^m theta, by its recurrence in l.
        before, legendre = torch.zeros_like(z), torch.full_like(z, math.prod(range(1, 2 * m, 2)))
        for k in range(m + 1, band + 1):
            before, legendre = legendre, ((2 * k - 1) * z * legendre - (k + m - 1) * before) / (k - m)
        scale = (2 * band + 1) / (4 * math.pi) * math.factorial(band - m) / math.factorial(band + m)
        factor = (-1) ** m * math.sqrt(scale * (2 if m else 1))
        positive.append(factor * legendre * cosine)
        negative.append(factor * legendre * sine)
        cosine, sine = x * cosine - y * sine, x * sine + y * cosine
    return [*negative[:0:-1], *positive]
