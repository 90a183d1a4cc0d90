"""A whole clip as one GLB that plays in a loop.

If a deformation moves the scene, one mesh has vertices that follow it (morph targets). If the scene
changes by added features, there is nothing to follow, so every moment has its own mesh, and only one
is shown at a time (scale 1, the others 0).

M moments, V vertices, N points. Positions are in scene units.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor
from torch.nn.functional import pad

from fourdfy.exporters.base import TrainedScene
from fourdfy.exporters.gltf import ARRAY_BUFFER, Glb
from fourdfy.exporters.mesh_files import ColoredMesh, ImageFormat, add_material, add_primitive, y_up
from fourdfy.ops.isosurface import in_chunks, invert_warp, vertex_normals

logger = logging.getLogger(__name__)

CHUNK = 1 << 17
TRACKING_TOLERANCE = 1e-4
"""How near a vertex must come to its canonical point, as a share of the radius."""


@dataclass(frozen=True, kw_only=True)
class Tracks:
    """The positions of the first mesh's vertices at every moment."""

    positions: Float[Tensor, "M V 3"]
    residuals: Float[Tensor, "M V"]
    """Distance in canonical space from the vertex's canonical point; 0 is exact."""


@torch.no_grad()
def deforms(trained: TrainedScene) -> bool:
    """Whether the scene moves its points by a deformation."""
    point, time = torch.zeros(1, 3, device=trained.device), torch.zeros(1, 1, device=trained.device)
    return trained.volume.displacement(point, time, step=trained.step) is not None


def follow(trained: TrainedScene, positions: Float[Tensor, "V 3"], times: Sequence[float]) -> Tracks:
    """The paths of points that lie on the surface at ``times[0]``.

    The field maps backwards: the point x of time t is the canonical point x + dx(x, t). A vertex
    belongs to one canonical point, that of its place at the first moment; where it is at a later one
    solves ``p + dx(p, t) = canonical``, which is found by Broyden's method from its place a moment
    before. Density biases are functions of x itself and do not move along, so the surface of a later
    moment is only nearly this one.
    """
    volume, radius = trained.volume, trained.volume.radius

    def displacement(points: Float[Tensor, "N 3"], time: float) -> Float[Tensor, "N 3"]:
        def of_some(some: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
            moved = volume.displacement(some, torch.full_like(some[:, :1], time), step=trained.step)
            assert moved is not None
            return moved

        return in_chunks(of_some, points, CHUNK)

    canonical = positions + displacement(positions, times[0])
    places, residuals = [positions], [torch.zeros_like(positions[:, 0])]
    for time in times[1:]:
        found, residual = invert_warp(
            partial(displacement, time=time),
            canonical,
            places[-1],
            tolerance=TRACKING_TOLERANCE * radius,
        )
        places.append(found)
        residuals.append(residual)
    tracks = Tracks(positions=torch.stack(places), residuals=torch.stack(residuals))
    lost = (tracks.residuals > 10 * TRACKING_TOLERANCE * radius).float().mean()
    logger.info(
        "%d vertices followed over %d moments: residual %.1e mean, %.1e largest, %.1f %% lost",
        len(positions), len(times), tracks.residuals.mean(), tracks.residuals.max(), 100 * lost,
    )  # fmt: skip
    return tracks


def morphing_glb(
    glb: Glb, mesh: ColoredMesh, tracks: Tracks, *, seconds: float, image_format: ImageFormat
) -> bytes:
    """One mesh, whose vertices move on straight lines between moments; the first is at 0 seconds, the
    last at ``seconds``."""
    normals = _normals(tracks.positions, mesh.surface.faces) if glb.lit else []
    mesh = _reaching(mesh, tracks.positions.flatten(0, 1))
    primitive = add_primitive(glb, mesh, add_material(glb, mesh, image_format))

    def targets(values: list[Tensor], **options: bool) -> list[int]:
        loose = len(mesh.surface.positions) - len(tracks.positions[0])
        return [
            glb.add_array(y_up(pad(later - values[0], (0, 0, 0, loose))), target=ARRAY_BUFFER, **options)
            for later in values[1:]
        ]

    later = [{"POSITION": index} for index in targets([*tracks.positions], bounds=True)]
    for target, index in zip(later, targets(normals), strict=False):
        target["NORMAL"] = index
    primitive["targets"] = later
    rest = [0.0] * len(later)
    shape = glb.add("meshes", name=f"{glb.name} mesh", primitives=[primitive], weights=rest)
    node = glb.add("nodes", name=f"{glb.name} mesh", mesh=shape)
    key_times = np.linspace(0, seconds, len(tracks.positions), dtype=np.float32)
    # Moment k is target k - 1 in full; the first moment is the mesh itself.
    weights = np.eye(len(key_times), len(later), k=-1, dtype=np.float32)
    _animate(glb, key_times, {node: weights.reshape(-1)}, path="weights", interpolation="LINEAR")
    glb.add_scene([node])
    return glb.to_bytes()


def switching_glb(glb: Glb, meshes: Sequence[ColoredMesh | None], *, seconds: float) -> bytes:
    """A mesh with vertex colours for each moment, each shown for an equal part of the time; None for a
    moment at which nothing is visible."""
    material = glb.add_material()
    there = {moment: mesh for moment, mesh in enumerate(meshes) if mesh is not None}
    at_rest = min(there)  # what a viewer shows if it plays no animation
    there[at_rest] = _reaching(there[at_rest], torch.cat([mesh.surface.positions for mesh in there.values()]))
    key_times = np.linspace(0, seconds, len(meshes) + 1, dtype=np.float32)
    shown = np.eye(len(meshes), len(meshes) + 1, dtype=np.float32)
    shown[-1, -1] = 1  # the last key only says when the clip ends
    scales = {}
    for moment, mesh in there.items():
        name = f"{glb.name} moment {moment}"
        shape = glb.add("meshes", name=name, primitives=[add_primitive(glb, mesh, material)])
        node = glb.add("nodes", name=name, mesh=shape, scale=[float(moment == at_rest)] * 3)
        scales[node] = np.repeat(shown[moment][:, None], 3, axis=1)
    _animate(glb, key_times, scales, path="scale", interpolation="STEP")
    glb.add_scene(list(scales))
    return glb.to_bytes()


def _normals(positions: Float[Tensor, "M V 3"], faces: Int[Tensor, "T 3"]) -> list[Float[Tensor, "V 3"]]:
    """Normals at every moment; vertices that coincide at the first, on two sides of a seam, share them."""
    _, joined = positions[0].unique(dim=0, return_inverse=True)
    one_of = torch.empty_like(joined).scatter_(0, joined, torch.arange(len(joined), device=joined.device))
    representative = one_of[joined]
    return [vertex_normals(places, representative[faces])[representative] for places in positions]


def _reaching(mesh: ColoredMesh, everything: Float[Tensor, "N 3"]) -> ColoredMesh:
    """The mesh with two more vertices, of no triangle, at the corners of the box around ``everything``.

    A viewer frames what it sees at rest, the first moment alone; what moves later would leave the picture.
    """

    def padded(values: Tensor) -> Tensor:
        return torch.cat([values, values[:2]])

    surface = mesh.surface
    corners = torch.stack([everything.amin(0), everything.amax(0)])
    surface = replace(
        surface, positions=torch.cat([surface.positions, corners]), normals=padded(surface.normals)
    )
    return replace(
        mesh,
        surface=surface,
        colors=None if mesh.colors is None else padded(mesh.colors),
        uvs=None if mesh.uvs is None else padded(mesh.uvs),
    )


def _animate(
    glb: Glb, key_times: ndarray, values: dict[int, ndarray], *, path: str, interpolation: str
) -> None:
    """One animation: a channel for each node, all with the same key times."""
    keys = glb.add_array(key_times, bounds=True)
    samplers = [
        {"input": keys, "output": glb.add_array(of_node), "interpolation": interpolation}
        for of_node in values.values()
    ]
    channels = [
        {"sampler": index, "target": {"node": node, "path": path}} for index, node in enumerate(values)
    ]
    glb.add("animations", name=glb.name, samplers=samplers, channels=channels)
