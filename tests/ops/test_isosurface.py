import math

import pytest
import torch
from scipy.special import expit

from fourdfy.ops.isosurface import (
    decimated,
    invert_warp,
    marching_cubes,
    sample_grid,
    silhouette_level,
    smoothed,
    vertex_normals,
    without_small_parts,
)


def grid_of(density, *, radius=1.0, resolution=40):
    return sample_grid(
        density, radius=radius, resolution=resolution, chunk_size=1000, device=torch.device("cpu")
    )


def ball(size, *, peak=50.0, sharpness=20.0, center=(0.0, 0.0, 0.0)):
    return lambda p: peak * torch.sigmoid(sharpness * (size - (p - torch.tensor(center)).norm(dim=-1)))


def signed_volume(positions, faces):
    a, b, c = positions[faces].unbind(1)
    return float((a * torch.linalg.cross(b, c, dim=-1)).sum() / 6)


def edges_of(faces):
    return torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])


def test_the_grid_has_the_axes_and_the_ends_of_the_cube():
    grid = grid_of(lambda p: p[:, 0] + 10 * p[:, 1] + 100 * p[:, 2], radius=2.0, resolution=5)
    assert grid[0, 0, 0] == -222 and grid[4, 0, 0] == 2 - 220 and grid[0, 0, 4] == 200 - 22


def test_a_balls_surface_is_where_its_density_is_and_faces_outwards():
    positions, faces = marching_cubes(grid_of(ball(0.6), radius=1.5), 25.0, 1.5)
    assert (positions.norm(dim=-1) - 0.6).abs().max() < 0.005  # linear between samples 0.077 apart
    assert signed_volume(positions, faces) == pytest.approx(4 / 3 * math.pi * 0.6**3, rel=0.02)
    normals = vertex_normals(positions, faces)
    assert ((normals * positions).sum(-1) / 0.6).min() > 0.97


def test_what_fills_the_cube_is_closed_by_the_cubes_sides():
    positions, faces = marching_cubes(grid_of(ball(1.2), resolution=24), 25.0, 1.0)
    assert positions.abs().max() == 1
    edges = {tuple(edge) for edge in edges_of(faces).tolist()}
    assert all((b, a) in edges for a, b in edges)


@pytest.mark.parametrize("level", [0.0, 60.0])
def test_no_surface_is_an_error_that_names_the_densities(level):
    with pytest.raises(ValueError, match=r"no surface at level .*: the density runs from .* to 49.99"):
        marching_cubes(grid_of(ball(0.6)), level, 1.0)


@pytest.mark.parametrize("sharpness", [10.0, 20.0, 80.0])
@pytest.mark.parametrize("peak", [4.0, 50.0])
def test_the_level_gives_the_silhouette_of_the_rendered_ball(peak, sharpness):
    grid = grid_of(ball(0.5, peak=peak, sharpness=sharpness), resolution=64)
    positions, _ = marching_cubes(grid, silhouette_level(grid, 1.0), 1.0)
    # The radius at which a ray's opacity passes 1/2, by a fine sum along it.
    offsets, depth = torch.linspace(0, 1, 400).double(), torch.linspace(-1, 1, 801).double()
    distances = (offsets[:, None] ** 2 + depth**2).sqrt()
    thickness = (peak * expit(sharpness * (0.5 - distances))).sum(1) * (depth[1] - depth[0])
    seen = offsets[thickness > math.log(2)].max()
    assert positions.norm(dim=-1).mean() == pytest.approx(float(seen), abs=1.2 * 2 / 63)  # a cell


def test_fog_that_hides_nothing_has_no_silhouette():
    assert silhouette_level(torch.full((8, 8, 8), 0.1), 1.0) is None


def test_a_smoothed_grid_is_measured_by_the_silhouettes_of_the_rendered_one():
    grid = grid_of(ball(0.5), resolution=48)
    fog = smoothed(grid, 1.0, 0.1)
    positions, _ = marching_cubes(fog, silhouette_level(fog, 1.0, grid), 1.0)
    sharp, _ = marching_cubes(grid, silhouette_level(grid, 1.0), 1.0)
    assert positions.norm(dim=-1).mean() == pytest.approx(float(sharp.norm(dim=-1).mean()), abs=0.04)


@pytest.mark.parametrize("resolution", [21, 61])
def test_smoothing_is_measured_in_scene_units(resolution):
    grid = torch.zeros(resolution, resolution, resolution)
    grid[resolution // 2] = 1.0  # a sheet
    profile = smoothed(grid, 2.0, 0.4)[:, 0, 0]
    x = torch.linspace(-2, 2, resolution)
    assert profile.sum() == pytest.approx(1)
    assert (profile * x**2).sum().sqrt() == pytest.approx(0.4, rel=0.02)


def test_small_parts_are_dropped_and_large_ones_kept():
    def density(p):
        return ball(0.5, center=(-0.4, 0, 0))(p) + ball(0.12, center=(0.7, 0, 0), sharpness=80.0)(p)

    positions, faces = marching_cubes(grid_of(density), 25.0, 1.0)
    assert positions[:, 0].max() > 0.7
    kept, kept_faces = without_small_parts(positions, faces, 0.2)
    assert kept[:, 0].max() < 0.2 and len(kept) == int(kept_faces.max()) + 1
    assert signed_volume(kept, kept_faces) == pytest.approx(4 / 3 * math.pi * 0.5**3, rel=0.03)
    assert len(without_small_parts(positions, faces, 0.001)[1]) == len(faces)


def test_what_may_be_decimated_keeps_its_shape_where_more_than_that_has_to_stay():
    positions, faces = marching_cubes(grid_of(ball(0.6), radius=1.0), 25.0, 1.0)
    stays = positions[faces].mean(1)[:, 2] < 0.2
    positions, few = decimated(positions, faces, int(stays.sum()) // 2, stays)
    assert int(stays.sum()) < len(few) < len(faces)
    assert positions[few].mean(1).norm(dim=-1).min() > 0.55, "no triangle cuts across the ball"


def test_of_very_few_triangles_all_may_stay():
    positions, faces = marching_cubes(grid_of(ball(0.6), radius=1.0), 25.0, 1.0)
    stays = torch.ones(len(faces), dtype=torch.bool)
    stays[:2] = False
    assert len(decimated(positions, faces, 10, stays)[1]) == len(faces)


def test_a_warp_is_inverted_where_plain_iteration_would_diverge():
    def displacement(p):  # its Jacobian reaches 1.5, so that p <- target - displacement(p) has no limit
        return torch.stack([1.5 * torch.sin(p[:, 1]) + 0.3, 0.2 * p[:, 2] ** 2, 0.9 * p[:, 0]], dim=-1)

    places = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)).double() - 0.5
    targets = places + displacement(places)
    found, residuals = invert_warp(displacement, targets, places + 0.1, tolerance=1e-9)
    assert residuals.max() < 1e-9
    assert (found - places).norm(dim=-1).max() < 1e-8


def test_a_point_without_a_place_keeps_its_best_guess_and_says_how_far_it_is():
    target = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    found, residuals = invert_warp(lambda p: -p, target, target + 0.5, tolerance=1e-6)  # all go to 0
    assert torch.isfinite(found).all()
    assert residuals.tolist() == [0, 1]
