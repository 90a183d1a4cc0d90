"""Textures: from colours in space to an image on a surface.

V vertices, T triangles, S x S texels, P covered texels. (u, v) run from the image's upper left corner.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from torch import Tensor
from torch.nn.functional import normalize

from fourdfy.config import ConfigError
from fourdfy.exporters.surface import Surface
from fourdfy.files.images import to_pixels

logger = logging.getLogger(__name__)

FACES_AT_ONCE = 1 << 14
"""Bounds the memory of rasterising."""


@cache
def can_unwrap() -> bool:
    """Whether xatlas is installed; warns once if not."""
    if find_spec("xatlas") is None:
        logger.warning(
            "xatlas is missing, so meshes get vertex colours instead of textures; pip install xatlas"
        )
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Unwrapped:
    """A surface cut open along its seams, where vertices repeat, and laid out flat."""

    surface: Surface
    uvs: Float[Tensor, "V 2"]


def unwrap(
    surface: Surface, size: int, chart_options: Mapping[str, Any], pack_options: Mapping[str, Any]
) -> Unwrapped:
    """An atlas by xatlas, for an image of ``size`` texels a side.

    Raises:
        ConfigError: an option that xatlas does not have.
    """
    import xatlas

    atlas, charts, pack = xatlas.Atlas(), xatlas.ChartOptions(), xatlas.PackOptions()
    pack.resolution, pack.padding, pack.create_image = size, 2, False
    _set_options(charts, chart_options, "xatlas_chart_options")
    _set_options(pack, pack_options, "xatlas_pack_options")
    device = surface.faces.device
    atlas.add_mesh(
        surface.positions.cpu().numpy(),
        surface.faces.cpu().numpy().astype(np.uint32),
        surface.normals.cpu().numpy(),
    )
    atlas.generate(charts, pack)
    sources, faces, uvs = atlas.get_mesh(0)
    kept = torch.from_numpy(sources.astype(np.int64)).to(device)
    return Unwrapped(
        surface=Surface(
            positions=surface.positions[kept],
            faces=torch.from_numpy(faces.astype(np.int64)).to(device),
            normals=surface.normals[kept],
        ),
        uvs=torch.from_numpy(uvs).to(device),
    )


def bake(
    unwrapped: Unwrapped,
    colors: Callable[[Float[Tensor, "P 3"], Float[Tensor, "P 3"]], Float[Tensor, "P 3"]],
    size: int,
) -> UInt8[ndarray, "S S 3"]:
    """The image of ``colors(positions, normals)``. Texels between charts take their nearest
    neighbour's colour, so that no seam shows when a viewer filters the image."""
    from scipy.ndimage import distance_transform_edt

    surface = unwrapped.surface
    texels, faces, barycentric = rasterize(unwrapped.uvs, surface.faces, size)
    corners = surface.faces[faces]
    positions = (surface.positions[corners] * barycentric[..., None]).sum(1)
    normals = normalize((surface.normals[corners] * barycentric[..., None]).sum(1), dim=-1)
    image = torch.zeros(size * size, 3, device=positions.device)
    image[texels] = colors(positions, normals)
    empty = torch.ones(size * size, dtype=torch.bool, device=positions.device)
    empty[texels] = False
    rows, columns = distance_transform_edt(
        empty.view(size, size).cpu().numpy(), return_distances=False, return_indices=True
    )
    return to_pixels(image.view(size, size, 3))[rows, columns]


def rasterize(
    uvs: Float[Tensor, "V 2"], faces: Int[Tensor, "T 3"], size: int
) -> tuple[Int[Tensor, "P"], Int[Tensor, "P"], Float[Tensor, "P 3"]]:
    """The texels whose centres lie in a triangle: flat index (row * size + column), triangle, and
    barycentric coordinates there. On a shared edge a texel may come up twice."""
    parts = [
        _rasterize(uvs[some] * size, size, first * FACES_AT_ONCE)
        for first, some in enumerate(faces.split(FACES_AT_ONCE))
    ]
    texels, owners, barycentric = (torch.cat(column) for column in zip(*parts, strict=True))
    return texels, owners, barycentric


def _rasterize(
    corners: Float[Tensor, "T 3 2"], size: int, first: int
) -> tuple[Int[Tensor, "P"], Int[Tensor, "P"], Float[Tensor, "P 3"]]:
    """All texels of the triangles' bounding boxes, less those outside the triangles."""
    low = (corners.amin(1) - 0.5).ceil().long().clamp(0, size - 1)
    high = (corners.amax(1) - 0.5).floor().long().clamp(0, size - 1)
    extent = (high - low + 1).clamp(min=0)
    counts = extent.prod(-1)
    owner = torch.arange(len(corners), device=corners.device).repeat_interleave(counts)
    within = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
    column = low[owner, 0] + within % extent[owner, 0]
    row = low[owner, 1] + within // extent[owner, 0]

    a, b, c = corners[owner].unbind(1)
    point = torch.stack([column, row], dim=-1) + 0.5
    area = _cross(b - a, c - a)
    barycentric = torch.stack([_cross(b - point, c - point), _cross(c - point, a - point)], dim=-1)
    barycentric = barycentric / torch.where(area == 0, 1.0, area)[:, None]
    barycentric = torch.cat([barycentric, 1 - barycentric.sum(-1, keepdim=True)], dim=-1)
    inside = (barycentric >= -1e-5).all(-1) & (area != 0)
    return (row * size + column)[inside], owner[inside] + first, barycentric[inside]


def _cross(a: Float[Tensor, "P 2"], b: Float[Tensor, "P 2"]) -> Float[Tensor, "P"]:
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


def _set_options(options: Any, given: Mapping[str, Any], key: str) -> None:
    known = [name for name in dir(options) if not name.startswith("_")]
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"system.exporter.{key}.{name}: unknown; xatlas has {', '.join(known)}")
        setattr(options, name, value)
