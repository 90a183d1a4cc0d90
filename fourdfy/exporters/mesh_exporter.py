"""``mesh-exporter``: the scene as a mesh at chosen times and, if it moves, as one animated GLB."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fourdfy.callbacks.saving import whole_file
from fourdfy.config import ignored
from fourdfy.exporters.animation import deforms, follow, morphing_glb, switching_glb
from fourdfy.exporters.base import Exporter, Subject
from fourdfy.exporters.mesh_files import ColoredMesh, Format, ImageFormat, write_mesh
from fourdfy.exporters.surface import (
    IsosurfaceSettings,
    extract_surface,
    surface_colors,
)
from fourdfy.exporters.texture import bake, can_unwrap, unwrap
from fourdfy.registry import register


@register("mesh-exporter")
class MeshExporter(Exporter):
    """Surface and resolution are the geometry's ``isosurface_*`` keys."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Exporter.Config):
        fmt: Format = "glb"
        """``obj-mtl`` has a texture, ``obj`` and ``ply`` vertex colours, ``glb`` either."""
        save_name: str = "model"
        times: list[float] = field(default_factory=lambda: [0.0])
        """Moments to write a mesh of, 0..1; [] for none. With several, names end in the time."""
        save_normal: bool = True
        """Write vertex normals."""
        save_uv: bool = True
        save_texture: bool = True
        """Both true: an image where the format has one (needs xatlas). Else vertex colours."""
        texture_size: int = 1024
        """Texels along each side."""
        texture_format: ImageFormat = "jpg"
        xatlas_chart_options: dict[str, Any] = field(default_factory=dict)
        xatlas_pack_options: dict[str, Any] = field(default_factory=dict)
        """Attributes of xatlas' ChartOptions and PackOptions."""
        context_type: str = ignored("textures are baked without a graphics context", "gl")
        save_video: bool = ignored("video-exporter renders videos", False)

        animation_frames: int = 16
        """Moments of the animated GLB, both ends of the clip included; 0 for none."""
        animation_seconds: float = 2.0
        """Length of the clip when played."""
        animation_resolution: int | None = 64
        """Takes the place of ``isosurface_resolution`` in the animation; null does not. The file grows
        with its square."""

        def __post_init__(self) -> None:
            if outside := [time for time in self.times if not 0 <= time <= 1]:
                raise ValueError(f"times: {outside[0]} is no scene time; expected 0..1")
            if self.animation_frames == 1 or self.animation_frames < 0:
                raise ValueError(f"animation_frames={self.animation_frames}: expected at least 2, or 0")
            if self.animation_seconds <= 0:
                raise ValueError(f"animation_seconds={self.animation_seconds}: expected a time above 0")
            if Path(self.save_name).name != self.save_name:
                raise ValueError(f"save_name={self.save_name!r}: expected a file's name without a folder")

    cfg: Config

    def export(self, subject: Subject, folder: Path) -> list[Path]:
        cfg = self.cfg
        settings = IsosurfaceSettings.of(subject.scene.geometry)
        files = []
        if subject.dynamic and cfg.animation_frames:
            files.append(folder / f"{cfg.save_name}_animated.glb")
            with whole_file(files[0]) as half_written:
                half_written.write_bytes(self._animation(subject, settings))
        for time in cfg.times:
            name = cfg.save_name if len(cfg.times) == 1 else f"{cfg.save_name}_t{time:g}"
            mesh = self._mesh(subject, time, settings, textured=cfg.fmt in ("glb", "obj-mtl"))
            files += write_mesh(
                folder, name, mesh, cfg.fmt, normals=cfg.save_normal, image_format=cfg.texture_format
            )
        return files

    def _animation(self, subject: Subject, settings: IsosurfaceSettings) -> bytes:
        cfg = self.cfg
        if cfg.animation_resolution is not None:
            settings = dataclasses.replace(settings, resolution=cfg.animation_resolution)
        times = torch.linspace(0, 1, cfg.animation_frames).tolist()
        if deforms(subject):
            mesh = self._mesh(subject, times[0], settings, textured=True)
            tracks = follow(subject, mesh.surface.positions, times)
            return morphing_glb(mesh, tracks, seconds=cfg.animation_seconds, image_format=cfg.texture_format)
        meshes = [self._mesh(subject, time, settings, textured=False) for time in times]
        return switching_glb(meshes, seconds=cfg.animation_seconds)

    def _mesh(
        self, subject: Subject, time: float, settings: IsosurfaceSettings, *, textured: bool
    ) -> ColoredMesh:
        cfg, surface = self.cfg, extract_surface(subject, time, settings)
        if not (textured and cfg.save_uv and cfg.save_texture and can_unwrap()):
            colors = surface_colors(subject, surface.positions, surface.normals, time)
            return ColoredMesh(surface=surface, colors=colors)
        unwrapped = unwrap(surface, cfg.texture_size, cfg.xatlas_chart_options, cfg.xatlas_pack_options)
        texture = bake(
            unwrapped,
            lambda positions, normals: surface_colors(subject, positions, normals, time),
            cfg.texture_size,
        )
        return ColoredMesh(surface=unwrapped.surface, uvs=unwrapped.uvs, texture=texture)
