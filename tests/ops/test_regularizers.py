"""Losses on the render (values worked out by hand)."""

import math

import pytest
import torch

from fourdfy.ops.regularizers import REGULARIZERS
from tests.renders import render_output


def render(opacity=None, **given):
    return render_output(torch.zeros(1, 1, 2, 1) if opacity is None else opacity, **given)


def images(*values):
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1)


def test_sparsity_is_the_mean_of_a_softened_absolute_value():
    expected = (0.1 + math.sqrt(1.01)) / 2
    assert REGULARIZERS["sparsity"](render(images(0.0, 1.0))).item() == pytest.approx(expected)


def test_opaque_is_binary_entropy_clamped_away_from_0_and_1():
    clamped = -(0.999 * math.log(0.999) + 0.001 * math.log(0.001))
    loss = REGULARIZERS["opaque"](render(images(0.5, 1.0)))
    assert loss.item() == pytest.approx((math.log(2) + clamped) / 2, rel=1e-4)


def test_z_variance_counts_the_rays_that_hit_something():
    loss = REGULARIZERS["z_variance"](render(images(0.9, 0.1), z_variance=images(0.3, 100.0)))
    assert loss.item() == pytest.approx(0.3)


def orient_by_hand(rays):
    """``(opacity, [(weight, cosine)])`` for each ray: Ref-NeRF's sum, over the rays that hit anything."""
    total = sum(weight * max(cosine, 0) ** 2 for _, samples in rays for weight, cosine in samples)
    return total / sum(opacity > 0 for opacity, _ in rays)


def test_orient_is_averaged_over_the_pixels_with_opacity():
    rays = [(0.7, [(0.5, 0.8), (0.2, -0.6)]), (0.0, []), (0.4, [(0.4, 0.6)]), (0.0, [])]
    weights, cosines = zip(*(sample for _, samples in rays for sample in samples), strict=True)
    normals = torch.tensor([[c, (1 - c * c) ** 0.5, 0.0] for c in cosines])
    along = torch.tensor([[1.0, 0.0, 0.0]]).expand(3, 3)
    given = render(
        images(*(o for o, _ in rays)), normals=normals, t_dirs=along, weights=torch.tensor(weights)
    )
    assert REGULARIZERS["orient"](given).item() == pytest.approx(orient_by_hand(rays))


def test_orient_turns_the_normals_and_leaves_the_density_alone():
    along = torch.tensor([[1.0, 0.0, 0.0]])
    normals, weights = along.clone().requires_grad_(), torch.ones(1, requires_grad=True)
    REGULARIZERS["orient"](render(images(1.0), normals=normals, t_dirs=along, weights=weights)).backward()
    assert normals.grad.tolist() == [[2.0, 0.0, 0.0]]
    assert weights.grad is None


def test_orient_of_an_empty_picture_is_0():
    nothing = torch.zeros(0, 3)
    assert REGULARIZERS["orient"](render(normals=nothing, t_dirs=nothing, weights=nothing[:, 0])).item() == 0


def test_deformation_sums_squared_differences_along_frames_rows_and_columns():
    field = torch.zeros(2, 2, 2, 3)
    field[1, 0, 0, 0] = 2.0
    opacity = torch.zeros(2, 2, 2, 1)
    loss = REGULARIZERS["deformation"](render(opacity, deformation=field, group_size=2))
    assert loss.item() == pytest.approx(3 * 4.0)
    apart = REGULARIZERS["deformation"](render(opacity, deformation=field))
    assert apart.item() == pytest.approx(2 * 4.0), "frames of two clips are no neighbours"
