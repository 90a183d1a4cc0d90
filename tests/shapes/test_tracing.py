"""Sphere tracing of bodies, against the definitions of their parts and of their shading."""

import pytest
import torch

from fourdfy.ops.cameras import cast_rays
from fourdfy.shapes import tracing
from fourdfy.shapes.tracing import Bodies, render_bodies
from fourdfy.shapes.world import orbit

BLACK = torch.zeros(2, 3)
UPRIGHT = torch.eye(3)


def cameras(elevation, size=24):
    """In the second frame one part stands behind another."""
    return orbit(torch.tensor([elevation] * 2), torch.tensor([20.0, 80.0]), torch.zeros(2), size)


def body(*parts, axes=UPRIGHT):
    """In two frames, of (centre, size, rounding); parts are red, green and blue."""
    centres, sizes, rounding = zip(*parts, strict=True)
    return Bodies(
        centres=torch.tensor(centres).expand(2, -1, -1),
        axes=axes.expand(2, len(parts), 3, 3),
        sizes=torch.tensor(sizes),
        rounding=torch.tensor(rounding),
        colours=torch.eye(3)[: len(parts)].expand(2, -1, -1),
        ellipsoids=rounding.count(0.0),
    )


def test_an_ellipsoid_a_box_and_a_capsule_are_seen_where_they_are():
    turns = torch.linalg.qr(torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(0)))[0]
    parts = body(
        ((0.0, -0.55, 0.3), (0.5, 0.15, 0.3), 0.0),
        ((0.1, 0.5, 0.3), (0.2, 0.1, 0.3), 0.1),
        ((-0.1, 0.0, -0.5), (0.0, 0.0, 0.4), 0.15),
        axes=turns * torch.linalg.det(turns)[..., None, None],
    )
    views = cameras(15.0)
    rgb, opacity, part = render_bodies(parts, views, BLACK, supersample=1)

    rays, t = cast_rays(views), torch.linspace(1.8, 4.2, 700)
    points = rays.origins[..., None, None, :] + t[:, None, None] * rays.directions[..., None, None, :]
    away = (points - parts.centres[:, None, None, None]).unsqueeze(-2)
    own = (away @ parts.axes[:, None, None, None]).squeeze(-2)
    to_box = (own.abs() - parts.sizes).clamp_min(0).norm(dim=-1) <= parts.rounding
    inside = torch.where(parts.rounding == 0, (own / parts.sizes).norm(dim=-1) <= 1, to_box)
    first = torch.where(inside.any(dim=3), inside.float().argmax(dim=3), len(t)).min(dim=-1)
    wanted = torch.where(first.values < len(t), first.indices, -1)
    assert all((wanted == k).sum() > 10 for k in (-1, 0, 1, 2))
    assert (part != wanted).sum() <= 8 and (
        (part >= 0) == (opacity[..., 0] > 0)
    ).all()  # edges are SURFACE wide
    assert (rgb[part >= 0].argmax(dim=-1) == part[part >= 0]).all()


def seen(parts, elevation, supersample=1):
    """Colour of the middle pixel."""
    views = cameras(elevation, size=25)
    return render_bodies(parts, views, BLACK, supersample=supersample)[0][:, 12, 12]


@pytest.mark.parametrize(("elevation", "light"), [(90.0, 1.0), (0.0, 0.79), (-90.0, 0.58)])
def test_light_comes_from_above(elevation, light):
    ball = body(((0.0, 0.0, 0.0), (0.3, 0.3, 0.3), 0.0))
    assert torch.allclose(seen(ball, elevation), torch.tensor([light, 0.0, 0.0]), atol=5e-3)


def test_what_is_near_to_another_part_is_darker():
    """A ball lies on a floor beside the middle, where its distance to what is CREASE above is 0.0341."""
    ball, floor = ((0.22, 0.0, 0.2), (0.2, 0.2, 0.2), 0.0), ((0.0, 0.0, -0.2), (0.6, 0.6, 0.1), 0.1)
    blend = -tracing.BLEND * torch.tensor([0.0341, tracing.CREASE]).div(-tracing.BLEND).logsumexp(0)
    wanted = 0.72 + 0.28 * float(blend) / tracing.CREASE
    assert torch.allclose(seen(body(ball, floor), 90.0)[:, 1], torch.tensor(wanted), atol=5e-3)


def test_shapes_melt_and_colours_hardly_do():
    """Two balls side by side: the gap between them fills, and one is red beside the other's green."""
    two = body(((0.0, -0.205, 0.0), (0.2, 0.2, 0.2), 0.0), ((0.0, 0.205, 0.0), (0.2, 0.2, 0.2), 0.0))
    rgb, opacity, _ = render_bodies(two, orbit(*torch.zeros(3, 2), 65), BLACK, supersample=1)
    assert opacity[0, 32, 32] == 1
    mixed = rgb[0, 32, :, :2].amin(dim=-1) > 0.02
    assert 1 <= mixed.sum() <= 3, "the edge, no more"
