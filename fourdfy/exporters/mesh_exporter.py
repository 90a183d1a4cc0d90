"""``mesh-exporter``: the scene as a mesh at chosen times and, if it moves, as one animated GLB."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourdfy.bounds import number
from fourdfy.exporters.animation import deforms, follow, morphing_glb, switching_glb
from fourdfy.exporters.base import Exporter, TrainedScene
from fourdfy.exporters.gltf import Glb
from fourdfy.exporters.mesh_files import ColoredMesh, Format, ImageFormat, write_mesh
from fourdfy.exporters.surface import (
    NoSurfaceError,
    extract_surface,
    simplified,
    surface_colors,
)
from fourdfy.exporters.texture import bake, can_unwrap, unwrap
from fourdfy.files.atomic import write_whole
from fourdfy.registry import register

logger = logging.getLogger(__name__)


@register("mesh-exporter")
class MeshExporter(Exporter):
    """Surface and resolution are the geometry's ``isosurface_*`` keys."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Exporter.Config):
        fmt: Format = "glb"
        """``obj-mtl`` has a texture, ``obj`` and ``ply`` vertex colours, ``glb`` either."""
        save_name: str = "model"
        """Name of the files, without their ending."""
        times: list[float] = number([0.0], 0, 1)
        """Times at which to write a mesh; [] for none. File names end in the time, unless it is 0."""
        save_normal: bool = True
        """Write vertex normals."""
        lit: bool = False
        """Give GLBs normals and a material that the viewer's lights shade; otherwise colours are final."""
        smoothing: int = number(10, 0, 1000)
        """Iterations of smoothing, which removes the ripples of the grid."""
        max_faces: int = number(10_000, 4, 10_000_000)
        """Approximate number of triangles; with colours in the vertices, edges between colours stay finer."""
        save_uv: bool = True
        """Write texture coordinates."""
        save_texture: bool = True
        """With ``save_uv``, colours are an image if the format has one (needs xatlas), else in vertices."""
        texture_size: int = number(1024, 1, 16384)
        """Texels along each side."""
        texture_format: ImageFormat = "jpg"
        """Format of the texture's image."""
        xatlas_chart_options: dict[str, Any] = field(default_factory=dict)
        """Attributes of xatlas' ChartOptions."""
        xatlas_pack_options: dict[str, Any] = field(default_factory=dict)
        """Attributes of xatlas' PackOptions."""

        animation_frames: int = number(32, 0, 1000)
        """Number of moments in the animated GLB, spread evenly over the clip; 0 for no such file."""
        animation_resolution: int | None = number(64, 2, 2048)
        """Replaces ``isosurface_resolution`` in the animation; null keeps it."""
        animation_max_faces: int = number(5000, 4, 10_000_000)
        """``max_faces`` of each moment in the animation."""

        def __post_init__(self) -> None:
            if self.animation_frames == 1:
                raise ValueError("animation_frames=1: expected at least 2, or 0 for no animation")
            if Path(self.save_name).name != self.save_name:
                raise ValueError(f"save_name={self.save_name!r}: expected a file's name without a folder")

    cfg: Config

    def export(self, trained: TrainedScene, folder: Path) -> list[Path]:
        """``{save_name}_animated.glb`` of a moving scene, and the ``times``: ``{save_name}_t0.5.glb``."""
        cfg = self.cfg
        files = []
        if trained.dynamic and cfg.animation_frames:
            files.append(folder / f"{cfg.save_name}_animated.glb")
            write_whole(files[0], self._animation(trained))
        try:
            meshes = self._meshes(trained, cfg.times, textured=cfg.fmt in ("glb", "obj-mtl"))
        except NoSurfaceError:
            if not files:
                raise
            meshes = []
        for time, mesh in zip(cfg.times, meshes, strict=False):
            if mesh is not None:
                files += write_mesh(
                    folder,
                    f"{cfg.save_name}_t{time:.10g}" if time else cfg.save_name,
                    mesh,
                    cfg.fmt,
                    title=trained.name,
                    normals=cfg.save_normal,
                    lit=cfg.lit,
                    image_format=cfg.texture_format,
                )
        return files

    def _animation(self, trained: TrainedScene) -> bytes:
        """A loop: the moment after the last is the first."""
        cfg = self.cfg
        glb = Glb(trained.name, lit=cfg.lit)
        seconds = cfg.clip_seconds or trained.clip_seconds
        times = [index / cfg.animation_frames for index in range(cfg.animation_frames)]
        if deforms(trained):
            try:
                mesh = self._mesh(trained, 0.0, textured=True, animated=True)
            except NoSurfaceError:
                logger.info("nothing to follow from time 0, so every moment gets its own mesh")
            else:
                tracks = follow(trained, mesh.surface.positions, [*times, 1.0])
                return morphing_glb(glb, mesh, tracks, seconds=seconds, image_format=cfg.texture_format)
        meshes = self._meshes(trained, times, textured=False, animated=True)
        return switching_glb(glb, meshes, seconds=seconds)

    def _meshes(self, trained: TrainedScene, times: Sequence[float], **how: bool) -> list[ColoredMesh | None]:
        """A mesh for each moment; None, with a warning, for moments at which nothing is visible.

        Raises:
            NoSurfaceError: nothing is visible at any moment.
        """
        meshes: list[ColoredMesh | None] = []
        nothing: NoSurfaceError | None = None
        for time in times:
            try:
                meshes.append(self._mesh(trained, time, **how))
            except NoSurfaceError as error:
                logger.warning("nothing is visible at time %.3g", time)
                meshes.append(None)
                nothing = nothing or error
        if nothing is not None and not any(meshes):
            raise nothing
        return meshes

    def _mesh(
        self, trained: TrainedScene, time: float, *, textured: bool, animated: bool = False
    ) -> ColoredMesh:
        cfg = self.cfg
        most = cfg.animation_max_faces if animated else cfg.max_faces
        resolution = cfg.animation_resolution if animated else None
        surface = extract_surface(trained, time, resolution=resolution, smoothing=cfg.smoothing)
        if not (textured and cfg.save_uv and cfg.save_texture and can_unwrap()):
            colors = surface_colors(trained, surface.positions, surface.normals, time)
            if len(surface.faces) > most:
                surface = simplified(surface, most, colors)
                colors = surface_colors(trained, surface.positions, surface.normals, time)
            return ColoredMesh(surface=surface, colors=colors)
        surface = simplified(surface, most)
        unwrapped = unwrap(surface, cfg.texture_size, cfg.xatlas_chart_options, cfg.xatlas_pack_options)
        texture = bake(
            unwrapped,
            lambda positions, normals: surface_colors(trained, positions, normals, time),
            cfg.texture_size,
        )
        return ColoredMesh(surface=unwrapped.surface, uvs=unwrapped.uvs, texture=texture)
