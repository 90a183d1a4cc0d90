import dataclasses
import math

import pytest
import torch
import trimesh

from fourdfy.exporters.surface import extract_surface, surface_colors
from fourdfy.ops.isosurface import optical_depth, without_ripples
from fourdfy.scenes.nerf.base import Material
from tests.exporters.scenes import GREY, SIZE, MovedBall, auto, make_trained


class Coated(MovedBall):
    """Feature 1 in a skin that is 0.06 thick, 0 below it."""

    def forward(self, positions, times, *, step, want_normals=False):
        field = super().forward(positions, times, step=step)
        return dataclasses.replace(
            field, features=(positions.norm(dim=-1, keepdim=True) > SIZE - 0.06).float()
        )


class Lit(Material):
    """The cosine of the light above a ball's surface, as grey."""

    def forward(self, field, points, context):
        up = torch.nn.functional.normalize(points.positions, dim=-1)
        return (up * (points.light_positions - points.positions)).sum(-1, keepdim=True).expand(-1, 3)


def some_points():
    up = torch.nn.functional.normalize(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    return SIZE * up, up


def test_colours_are_those_seen_from_outside():
    colors = surface_colors(make_trained(geometry=Coated(deforms=False)), *some_points(), 0.0)
    assert (colors - torch.tensor(GREY)).abs().max() < 0.03


def test_materials_that_shade_are_lit_from_the_camera():
    colors = surface_colors(make_trained(material=Lit()), *some_points(), 0.0)
    assert torch.allclose(colors, torch.ones(50, 3), atol=1e-4)


class Sharp(MovedBall):
    """Its density falls from 100 within a hundredth: the isosurfaces of all thresholds are close."""

    def density(self, positions, times, *, step):
        return 100 * torch.sigmoid((SIZE - positions.norm(dim=-1)) / 0.01)


@pytest.mark.parametrize("threshold", [25.0, 2.0, 0.5])
def test_a_given_threshold_is_that_isosurface(threshold):
    geometry = auto(Sharp)
    geometry.cfg = Sharp.Config(isosurface_resolution=80, isosurface_threshold=threshold)
    surface = extract_surface(make_trained(geometry=geometry), 0.0)
    expected = SIZE - 0.01 * math.log(threshold / (100 - threshold))
    assert surface.positions.norm(dim=-1).mean() == pytest.approx(expected, abs=0.02)


class Within(MovedBall):
    """Feature 1 in the scene's cube, 0 outside."""

    def density(self, positions, times, *, step):
        return torch.full_like(positions[:, 0], 60.0)

    def forward(self, positions, times, *, step, want_normals=False):
        field = super().forward(positions, times, step=step)
        is_inside = (positions.abs() <= self.radius).all(dim=-1, keepdim=True)
        return dataclasses.replace(field, features=is_inside.float())


def test_colours_of_a_face_of_the_cube_come_from_inside():
    points = torch.tensor([[2.0, 0.3, 0.1], [0.2, -2.0, 0.4]])
    colors = surface_colors(
        make_trained(geometry=Within(deforms=False)), points, points.sign() * (points.abs() == 2), 0.0
    )
    assert (colors - torch.tensor(GREY)).abs().max() < 0.03


class Hollow(MovedBall):
    """A shell 0.12 thick, of a third of the density where the front's pupil is; nearly nothing inside."""

    def density(self, positions, times, *, step):
        distances = positions.norm(dim=-1)
        pupil = positions[:, 0] > 0.9 * distances
        peak = torch.where(pupil, 12.0, 36.0)
        shell = torch.sigmoid(60 * (SIZE - distances)) * torch.sigmoid(60 * (distances - SIZE + 0.12))
        return peak * shell + 0.3 * (distances < SIZE)


@pytest.mark.parametrize("resolution", [40, 64])
def test_a_thin_part_of_a_skin_is_no_hole_and_the_hollow_has_no_surface(resolution):
    surface = extract_surface(make_trained(geometry=auto(Hollow)), 0.0, resolution=resolution)
    mesh = trimesh.Trimesh(surface.positions.numpy(), surface.faces.numpy(), process=False)
    assert mesh.is_watertight and mesh.euler_number == 2 and mesh.body_count == 1
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * SIZE**3, rel=0.2)
    assert surface.positions.norm(dim=-1).min() > SIZE - 0.15


def test_what_is_seen_through_stays_open():
    """A ring round x: along x a camera sees through it."""

    class Ring(MovedBall):
        def density(self, positions, times, *, step):
            across = positions[:, 1:].norm(dim=-1) - SIZE
            return 40 * torch.sigmoid(40 * (0.25 - torch.hypot(across, positions[:, 0])))

    surface = extract_surface(make_trained(geometry=auto(Ring)), 0.0)
    assert trimesh.Trimesh(surface.positions.numpy(), surface.faces.numpy(), process=False).euler_number == 0


@pytest.mark.parametrize("direction", [(0, 0, 1), (-1, 1, 0), (1, -1, -1)])
def test_a_point_is_as_deep_as_its_least_covered_direction_says(direction):
    """A tunnel leads from the middle of a full cube to its side; elsewhere 3 cells of density 2 cover it."""
    grid = torch.full((7, 7, 7), 2.0)
    for cells in range(4):
        grid[tuple(3 + cells * step for step in direction)] = 0
    depths = optical_depth(grid, 1.5)  # cells of 0.5
    assert depths[3, 3, 3] == 0
    grid[:] = 2.0
    assert optical_depth(grid, 1.5)[3, 3, 3] == pytest.approx(2 * 0.5 * 3.5)
    assert optical_depth(grid, 1.5)[1, 3, 3] == pytest.approx(2 * 0.5 * 1.5)


def test_smoothing_takes_out_ripples_and_keeps_the_shape():
    ball = trimesh.creation.icosphere(4)
    ripple = 1 + 0.01 * torch.randn(len(ball.vertices), 1, generator=torch.Generator().manual_seed(0))
    positions = without_ripples(torch.tensor(ball.vertices).float() * ripple, torch.tensor(ball.faces), 10)
    lengths = positions.norm(dim=-1)
    assert lengths.std() < 0.5 * ripple.std()
    assert float(lengths.mean()) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("time", [0.0, 0.5])
def test_the_automatic_surface_is_as_high_as_the_scene_is_seen(time):
    trained, y = make_trained(geometry=auto(MovedBall)), torch.linspace(-2, 2, 401)
    heights = torch.linspace(0.5, 2, 151)
    rays = torch.stack([torch.zeros(151, 401), y.expand(151, 401), heights[:, None].expand(151, 401)], dim=-1)
    times = torch.full((151 * 401, 1), time)
    sigmas = trained.scene.geometry.density(rays.view(-1, 3), times, step=0).view(151, 401)
    seen = heights[1 - torch.exp(-sigmas.sum(1) * (y[1] - y[0])) > 0.5].max()
    surface = extract_surface(trained, time)
    assert float(surface.positions[:, 2].max()) == pytest.approx(float(seen), abs=0.1)  # a cell
