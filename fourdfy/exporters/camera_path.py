"""Camera paths as JSON: ``transforms.json``, the format of instant-ngp, Nerfstudio and D-NeRF; and, to
read, ``camera_path.json`` of Nerfstudio's viewer.

A world of z up; ``transform_matrix`` is camera to world with columns right, up, backward, position,
as everywhere in this project. ``time`` is scene time, 0..1.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.bounds import Bounds
from fourdfy.config import ConfigError
from fourdfy.files.atomic import write_whole
from fourdfy.types import Cameras

logger = logging.getLogger(__name__)

MAX_SIZE = 8192
"""Pixels along a side."""
FPS = Bounds(0.1, 240)
"""Of what is filmed."""
MODELS = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE")
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
CONVENTIONS = (
    "transform_matrix: camera to world, columns right, up, backward, position; the camera looks along its "
    "-z; the world is right-handed, z up, the object's front at +x. Lengths in scene units, angles in "
    "radians, fl and c in pixels, time 0..1 over the clip."
)


def save_cameras(path: Path, cameras: Cameras, *, fps: float | int, images: str | None = None) -> None:
    """Write a path; ``images`` is the folder with ``{i}.png`` of its frames, if there are."""
    width, height = cameras.width, cameras.height
    focal = 0.5 * height / torch.tan(0.5 * torch.deg2rad(cameras.fovy_deg))
    frames = []
    for index, (c2w, length, time) in enumerate(zip(cameras.c2w, focal, cameras.times, strict=True)):
        frame: dict[str, Any] = {} if images is None else {"file_path": f"{images}/{index}.png"}
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
    write_whole(path, json.dumps(content, indent=1) + "\n")


def load_cameras(path: Path) -> tuple[Cameras, float | None]:
    """A path of any origin, and its frames per second if it states them.

    Frames without ``time`` (``render_time``) are spread evenly over the clip. Lenses are not rendered: where
    pixels are not square, or the image is not centred, or distorted, a warning says what is ignored.

    Raises:
        ConfigError: no such file, or it is no camera path.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        cameras, fps = (_of_nerfstudio if "camera_path" in content else _of_transforms)(content)
        if not (len(cameras) and 1 <= cameras.height <= MAX_SIZE and 1 <= cameras.width <= MAX_SIZE):
            raise ValueError(f"{len(cameras)} frames of {cameras.width} x {cameras.height} pixels")
        if not all(value.isfinite().all() for value in cameras.tensors().values()):
            raise ValueError("some numbers are not finite")
        if not ((cameras.times >= 0) & (cameras.times <= 1)).all():
            raise ValueError("times outside 0..1")
        if not ((cameras.fovy_deg > 0) & (cameras.fovy_deg < 180)).all():
            raise ValueError("fields of view outside 0..180 degrees")
        if fps is not None and fps not in FPS:
            raise ValueError(f"fps {fps:g}; expected {FPS}")
        turns = cameras.c2w[:, :3, :3]
        if (
            not torch.allclose(turns.mT @ turns, torch.eye(3).expand_as(turns), atol=0.02)
            or (turns.det() < 0).any()
        ):
            raise ValueError("a matrix is no rotation and position")
        if ignored := sorted(_of_lenses(content, cameras)):
            logger.warning(
                "%s: %s ignored: pixels are square here, and centred, and show the whole scene",
                path,
                ", ".join(ignored),
            )
        return cameras, fps
    except OSError as error:
        raise ConfigError(f"{path}: no such camera path ({error.strerror})") from error
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise ConfigError(
            f"{path}: not a camera path ({type(error).__name__}: {error}); expected JSON with w, h, fl_y or "
            f"camera_angle_y, and frames of transform_matrix (4 x 4), or Nerfstudio's camera_path.json"
        ) from error


def _of_transforms(content: Any) -> tuple[Cameras, float | None]:
    if (model := content.get("camera_model", "OPENCV")) not in MODELS:
        raise ValueError(f"camera_model {model!r}; expected one of {', '.join(MODELS)}")
    width, height, frames = int(content["w"]), int(content["h"]), content["frames"]
    focal = torch.tensor([_focal_length(frame, content, height) for frame in frames])
    cameras = _cameras(
        [frame["transform_matrix"] for frame in frames],
        torch.rad2deg(2 * torch.atan(0.5 * height / focal)),
        [frame.get("time") for frame in frames],
        height,
        width,
    )
    return cameras, float(content["fps"]) if "fps" in content else None


def _of_nerfstudio(content: dict[str, Any]) -> tuple[Cameras, float | None]:
    """The viewer's own interpolation is in the frames; its keyframes are not read."""
    if (kind := content.get("camera_type", "perspective")) != "perspective":
        raise ValueError(f"camera_type {kind!r}; only perspective is rendered here")
    frames = content["camera_path"]
    cameras = _cameras(
        [frame["camera_to_world"] for frame in frames],
        torch.tensor([float(frame["fov"]) for frame in frames]),
        [frame.get("render_time") for frame in frames],
        int(content["render_height"]),
        int(content["render_width"]),
    )
    if "fps" in content:
        return cameras, float(content["fps"])
    return cameras, len(frames) / float(content["seconds"]) if "seconds" in content else None


def _focal_length(frame: dict[str, Any], content: dict[str, Any], height: int) -> float:
    """In pixels, of the frame or of the whole path."""
    for values in (frame, content):
        if length := values.get("fl_y", values.get("fl_x")):
            return float(length)
    if "camera_angle_y" in content:
        return 0.5 * height / math.tan(0.5 * content["camera_angle_y"])
    return 0.5 * content["w"] / math.tan(0.5 * content["camera_angle_x"])


def _of_lenses(content: dict[str, Any], cameras: Cameras) -> set[str]:
    """The keys that ask for what is not rendered, of the path or of its frames."""
    found = set()
    if content.get("crop"):
        found.add("crop")
    for values in (content, *content.get("frames", ())):
        found |= {key for key in DISTORTION if values.get(key)}
        for key, middle in (("cx", cameras.width / 2), ("cy", cameras.height / 2)):
            if abs(values.get(key, middle) - middle) > 1:
                found.add(key)
        if "fl_y" in values and abs(values.get("fl_x", values["fl_y"]) / values["fl_y"] - 1) > 0.01:
            found.add("fl_x")
    return found


def _cameras(
    matrices: list[Any], fovy_deg: Float[Tensor, "F"], times: list[Any], height: int, width: int
) -> Cameras:
    """Cameras whose other fields follow from the poses; the light is at the camera."""
    c2w = torch.tensor(matrices, dtype=torch.float32).reshape(len(matrices), 4, 4)
    shares = torch.linspace(0, 1, len(matrices)).tolist()
    given = [share if time is None else float(time) for time, share in zip(times, shares, strict=True)]
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
        times=torch.tensor(given),
        light_positions=positions,
        height=height,
        width=width,
    )
