"""``all-exporter``: meshes and videos in one run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fourdfy.config import slot
from fourdfy.exporters.base import Exporter, TrainedScene
from fourdfy.registry import register


@register("all-exporter")
class AllExporter(Exporter):
    """``system.exporter.mesh.*`` and ``system.exporter.video.*`` are the keys of the two exporters."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Exporter.Config):
        mesh_type: str | None = "mesh-exporter"
        mesh: Any = slot(Exporter, "mesh_type")
        video_type: str | None = "video-exporter"
        video: Any = slot(Exporter, "video_type")

    cfg: Config

    def export(self, trained: TrainedScene, folder: Path) -> list[Path]:
        files: list[Path] = []
        for inner in (self.cfg.video, self.cfg.mesh):  # meshes last: they can be refused
            if inner is not None:
                cfg = replace(inner, clip_seconds=inner.clip_seconds or self.cfg.clip_seconds)
                files = cfg.build().export(trained, folder) + files
        return files
