"""``video-exporter``: the scene along a camera path as video, GIF, WebP, depth and frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from fourdfy.callbacks import saving
from fourdfy.config import ConfigError, file_path
from fourdfy.exporters.base import Exporter, Subject
from fourdfy.exporters.camera_path import load_cameras, save_cameras
from fourdfy.ops.compositing import expected_depth
from fourdfy.registry import register
from fourdfy.types import Cameras

VideoFormat = Literal["mp4", "gif", "webp", "png"]


@register("video-exporter")
class VideoExporter(Exporter):
    """Sizes of its own sequences are ``data.single_view.eval_{height,width}``."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Exporter.Config):
        trajectory: str = file_path("test")
        """A sequence of the data module (``test``, ``test_static``, of moving scenes ``val_video``), or
        the path of a JSON file such as this exporter writes."""
        formats: list[VideoFormat] = field(default_factory=lambda: ["mp4", "gif", "webp"])
        """``png``: all frames, in a folder. Without ffmpeg, mp4 is frames as well."""
        depth: bool = True
        """Also the depths, near red and far blue, the background black."""
        fps: int = saving.TEST_FPS
        frames_at_once: int = 8
        """Bounds memory."""

        def __post_init__(self) -> None:
            if self.fps < 1 or self.frames_at_once < 1:
                raise ValueError("fps and frames_at_once: expected at least 1")

    cfg: Config

    def export(self, subject: Subject, folder: Path) -> list[Path]:
        """``{trajectory}.mp4`` and so on, ``{trajectory}_depth.mp4``, ``{trajectory}_transforms.json``."""
        cfg = self.cfg
        name, cameras = choose_cameras(cfg.trajectory, subject.cameras)
        colors, depths = [], []
        for some in torch.arange(len(cameras)).split(cfg.frames_at_once):
            out = subject.render(cameras[some])
            colors.append(out.comp_rgb.cpu())
            depths.append(expected_depth(out.opacity, out.depth).cpu())
        clips = {name: saving.to_pixels(torch.cat(colors))}
        if cfg.depth:
            depth = torch.cat(depths)
            clips[f"{name}_depth"] = saving.depth_to_jet(depth, *saving.depth_range(list(depth)))
        files = [
            saving.save_clip(folder / f"{clip}.{fmt}", frames, fps=cfg.fps)
            for clip, frames in clips.items()
            for fmt in cfg.formats
        ]
        path = folder / f"{name}_transforms.json"
        images = f"{name}/{{}}.png" if "png" in cfg.formats else None
        save_cameras(path, cameras, fps=cfg.fps, image_pattern=images)
        return [*files, path]


def choose_cameras(trajectory: str, sequences: Mapping[str, Cameras]) -> tuple[str, Cameras]:
    """A name for the files, and the cameras."""
    if trajectory in sequences:
        return trajectory, sequences[trajectory]
    if trajectory.endswith(".json"):
        return Path(trajectory).stem.removesuffix("_transforms"), load_cameras(Path(trajectory))
    raise ConfigError(
        f"system.exporter.trajectory={trajectory!r}: expected {', '.join(sequences)} or a .json file"
    )
