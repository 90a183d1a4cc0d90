"""Camera paths as JSON: ``transforms.json``, the format of instant-ngp, Nerfstudio and D-NeRF.

A world of z up; ``transform_matrix`` is camera to world with columns right, up, backward, position,
as everywhere in this project. ``time`` is scene time, 0..1.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.callbacks.saving import whole_file
from fourdfy.config import ConfigError
from fourdfy.types import Cameras

CONVENTIONS = (
    "transform_matrix: camera to world, columns right, up, backward, position; the camera looks along its "
    "-z; the world is right-handed, z up, the object's front at +x. Lengths in scene units, angles in "
    "radians, fl and c in pixels, time 0..1 over the clip."
)


def save_cameras(path: Path, cameras: Cameras, *, fps: int, image_pattern: str | None = None) -> None:
    """Write a path; ``image_pattern`` ("frames/{}.png") names the images of its frames, if there are."""
    width, height = cameras.width, cameras.height
    focal = 0.5 * height / torch.tan(0.5 * torch.deg2rad(cameras.fovy_deg))
    frames = []
    for index, (c2w, length, time) in enumerate(zip(cameras.c2w, focal, cameras.times, strict=True)):
        frame: dict[str, Any] = {} if image_pattern is None else {"file_path": image_pattern.format(index)}
        frame |= {"time": float(time), "fl_x": float(length), "fl_y": float(length)}
        frames.append(frame | {"transform_matrix": c2w.tolist()})
    first = float(focal[0])
    content = {
        "conventions": CONVENTIONS,
        "camera_model": "OPENCV",
        "w": width,
        "h": height,
        "cx": width / 2,
        "cy": height / 2,
        "fl_x": first,
        "fl_y": first,
        "camera_angle_x": 2 * math.atan(0.5 * width / first),
        "camera_angle_y": 2 * math.atan(0.5 * height / first),
        "fps": fps,
        "frames": frames,
    }
    with whole_file(path) as half_written:
        half_written.write_text(json.dumps(content, indent=1) + "\n")


def load_cameras(path: Path) -> Cameras:
    """Read a path, whoever wrote it; a frame without ``time`` has its share of the clip.

    Raises:
        ConfigError: no such file, or it is no camera path of square, centred pixels.
    """
    try:
        content = json.loads(Path(path).read_text())
        width, height, frames = int(content["w"]), int(content["h"]), content["frames"]
        c2w = torch.tensor([frame["transform_matrix"] for frame in frames], dtype=torch.float32)
        focal = torch.tensor([_focal_length(frame, content, height) for frame in frames])
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such camera path") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: not a camera path ({type(error).__name__}: {error}); expected JSON with w, h, fl_y or "
            f"camera_angle_y, and frames of transform_matrix"
        ) from error
    if not len(frames) or c2w.shape[1:] != (4, 4):
        raise ConfigError(f"{path}: expected frames with a transform_matrix of 4 x 4 numbers each")
    default = torch.linspace(0, 1, len(frames)).tolist()
    times = torch.tensor([float(f.get("time", time)) for f, time in zip(frames, default, strict=True)])
    return _with_angles(c2w, torch.rad2deg(2 * torch.atan(0.5 * height / focal)), times, height, width)


def _focal_length(frame: dict[str, Any], content: dict[str, Any], height: int) -> float:
    """In pixels, of the frame or of the whole path."""
    for values in (frame, content):
        if length := values.get("fl_y", values.get("fl_x")):
            return float(length)
    return 0.5 * height / math.tan(0.5 * content["camera_angle_y"])


def _with_angles(
    c2w: Float[Tensor, "F 4 4"],
    fovy_deg: Float[Tensor, "F"],
    times: Float[Tensor, "F"],
    height: int,
    width: int,
) -> Cameras:
    """The record's other fields, from the positions; the light is at the camera."""
    positions = c2w[:, :3, 3]
    distances = positions.norm(dim=-1)
    elevation = torch.asin((positions[:, 2] / distances.clamp(min=1e-9)).clamp(-1, 1))
    azimuth = torch.atan2(positions[:, 1], positions[:, 0])
    return Cameras(
        c2w=c2w,
        fovy_deg=fovy_deg,
        elevation_deg=torch.rad2deg(elevation),
        azimuth_deg=torch.rad2deg(azimuth),
        distances=distances,
        times=times,
        light_positions=positions,
        height=height,
        width=width,
    )
