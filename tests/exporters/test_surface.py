import dataclasses

import pytest
import torch

from fourdfy.config import parse_config
from fourdfy.exporters.surface import IsosurfaceSettings, extract_surface, surface_colors
from fourdfy.fields.base import Material
from fourdfy.fields.implicit_volume import ImplicitVolume
from tests.exporters.scenes import GREY, SIZE, MovedBall, make_subject

torch.set_num_threads(1)


class Coated(MovedBall):
    """Feature 1 in a skin that is 0.06 thick, 0 below it."""

    def forward(self, positions, times, *, step, want_normals=False):
        field = super().forward(positions, times, step=step)
        return dataclasses.replace(
            field, features=(positions.norm(dim=-1, keepdim=True) > SIZE - 0.06).float()
        )


class Lit(Material):
    """The cosine of the light above a ball's surface, as grey."""

    def forward(self, features, *, positions, normals, light_positions, step, generator=None):
        up = torch.nn.functional.normalize(positions, dim=-1)
        return (up * (light_positions - positions)).sum(-1, keepdim=True).expand(-1, 3)


def with_parts(**parts):
    subject = make_subject()
    return dataclasses.replace(subject, scene=dataclasses.replace(subject.scene, **parts))


def some_points():
    up = torch.nn.functional.normalize(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    return SIZE * up, up


def test_colours_are_those_seen_from_outside():
    colors = surface_colors(with_parts(geometry=Coated(deforms=False)), *some_points(), 0.0)
    assert (colors - torch.tensor(GREY)).abs().max() < 0.03


def test_materials_that_shade_are_lit_from_the_camera():
    colors = surface_colors(with_parts(material=Lit()), *some_points(), 0.0)
    assert torch.allclose(colors, torch.ones(50, 3), atol=1e-4)


def test_a_geometrys_own_keys_are_read():
    keys = {"isosurface_resolution": 31, "isosurface_threshold": 3, "isosurface_remove_outliers": False}
    geometry = ImplicitVolume(parse_config(ImplicitVolume.Config, keys))
    assert IsosurfaceSettings.of(geometry) == IsosurfaceSettings(
        resolution=31, threshold=3, remove_outliers=False
    )


@pytest.mark.parametrize("time", [0.0, 0.5])
def test_the_automatic_surface_is_as_high_as_the_scene_is_seen(time):
    subject, y = make_subject(), torch.linspace(-2, 2, 401)
    heights = torch.linspace(0.5, 2, 151)
    rays = torch.stack([torch.zeros(151, 401), y.expand(151, 401), heights[:, None].expand(151, 401)], dim=-1)
    times = torch.full((151 * 401, 1), time)
    sigmas = subject.scene.geometry.density(rays.view(-1, 3), times, step=0).view(151, 401)
    seen = heights[1 - torch.exp(-sigmas.sum(1) * (y[1] - y[0])) > 0.5].max()
    surface = extract_surface(subject, time, IsosurfaceSettings(resolution=40))
    assert float(surface.positions[:, 2].max()) == pytest.approx(float(seen), abs=0.1)  # a cell
