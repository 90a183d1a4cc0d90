"""``video-exporter``: the scene along a camera path as video, GIF, WebP, depth and frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy import ndarray

from fourdfy.bounds import number
from fourdfy.config import ConfigError, file_path
from fourdfy.exporters.base import Exporter, TrainedScene
from fourdfy.exporters.camera_path import FPS, load_cameras, save_cameras
from fourdfy.files import atomic, images
from fourdfy.ops.compositing import expected_depth
from fourdfy.registry import register
from fourdfy.types import Cameras

VideoFormat = Literal["mp4", "webm", "gif", "webp", "png"]
TRANSPARENT = ("webm", "webp", "png")


@register("video-exporter")
class VideoExporter(Exporter):
    """Sizes of its own sequences are ``data.single_view.eval_{height,width}``."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Exporter.Config):
        trajectory: str = file_path("test")
        """A sequence of the data module (``test``, ``test_static``, of moving scenes ``val_video``), or a
        JSON file: such as this exporter writes, or Nerfstudio's ``camera_path.json``."""
        formats: list[VideoFormat] = field(default_factory=lambda: ["mp4", "gif", "webp"])
        """``png`` writes all frames into a folder. Without ffmpeg, mp4 and webm are written as frames too."""
        alpha: bool = False
        """Write WebM, WebP and PNG without the background; mp4 and GIF have no opacity and show it."""
        depth: bool = True
        """Also write depth, as numbers (``.npz``) and as images (near red, far blue, background black)."""
        fps: float | None = number(None, FPS.low, FPS.high)
        """null: that of a camera file, else the rate that shows one clip in ``clip_seconds``, or 15 if the
        scene's time does not advance."""
        frames_at_once: int = number(8, 1, 4096)
        """Number of frames rendered at once; bounds the memory."""

    cfg: Config

    def export(self, trained: TrainedScene, folder: Path) -> list[Path]:
        """``{trajectory}.mp4`` and so on, ``{trajectory}_depth.mp4`` and ``.npz``,
        ``{trajectory}_transforms.json``."""
        cfg = self.cfg
        name, cameras, fps = choose_cameras(cfg.trajectory, trained.cameras)
        fps = cfg.fps or self._clips_fps(trained, cameras, fps)
        colors, cutouts, depths = [], [], []
        for some in torch.arange(len(cameras)).split(cfg.frames_at_once):
            out = trained.render(cameras[some])
            colors.append(images.to_pixels(out.comp_rgb))
            depths.append(expected_depth(out.opacity, out.depth).cpu())
            if cfg.alpha:
                if out.comp_rgb_fg is None:
                    raise ConfigError(
                        f"system.exporter.alpha=true: a {type(trained.scene).__name__} renders no foreground "
                        "without its background; set it to false"
                    )
                straight = out.comp_rgb_fg / out.opacity.clamp(min=1e-6)
                cutouts.append(images.to_pixels(torch.cat([straight, out.opacity], dim=-1)))

        def save(clip: str, opaque: ndarray, transparent: ndarray) -> list[Path]:
            shown = {fmt: transparent if fmt in TRANSPARENT else opaque for fmt in cfg.formats}
            # The frames last: those of a video that can't be encoded have no opacity, and the same folder.
            ordered = sorted(shown, key="png".__eq__)
            files = {f: images.save_clip(folder / f"{clip}.{f}", shown[f], fps=fps) for f in ordered}
            return [*dict.fromkeys(files[f] for f in cfg.formats)]

        opaque = np.concatenate(colors)
        files = save(name, opaque, np.concatenate(cutouts) if cfg.alpha else opaque)
        if cfg.depth:
            depth = torch.cat(depths)
            jet = images.depth_to_jet(depth, *images.depth_range(list(depth)))
            files += save(f"{name}_depth", jet, jet)
            files.append(folder / f"{name}_depth.npz")
            with atomic.whole_file(files[-1]) as half_written:
                np.savez_compressed(half_written, depth=depth[..., 0].numpy())
        files.append(folder / f"{name}_transforms.json")
        save_cameras(files[-1], cameras, fps=fps, images=name if "png" in cfg.formats else None)
        return files

    def _clips_fps(self, trained: TrainedScene, cameras: Cameras, of_file: float | None) -> float | int:
        """The frame rate that shows one clip in its duration, if the frames pass through it at one speed."""
        steps = (cameras.times.diff() + 0.5) % 1 - 0.5  # forwards or backwards, across the clip's end too
        even = len(steps) > 0 and float(steps.abs().min()) > 1e-6 and float(steps.max() - steps.min()) < 1e-4
        if even and trained.dynamic and (self.cfg.clip_seconds or not of_file):
            return 1 / abs(float(steps.mean())) / (self.cfg.clip_seconds or trained.clip_seconds)
        return of_file or images.TEST_FPS


def choose_cameras(trajectory: str, sequences: Mapping[str, Cameras]) -> tuple[str, Cameras, float | None]:
    """(name for the files, cameras, frames per second if a file states them)."""
    if trajectory in sequences:
        return trajectory, sequences[trajectory], None
    if trajectory.endswith(".json"):
        return Path(trajectory).stem.removesuffix("_transforms"), *load_cameras(Path(trajectory))
    raise ConfigError(
        f"system.exporter.trajectory={trajectory!r}: expected {', '.join(sequences)} or a .json file"
    )
