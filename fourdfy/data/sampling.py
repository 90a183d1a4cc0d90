"""Random training cameras: single views, groups of views, and videos.

F frames, G draws, each shared by F / G consecutive frames: one frame of a single-view step, the
n_view frames of a group, the num_frames frames of a video. Everything is drawn from an explicit
generator; nothing here decides which kind of step it is. Keys and distributions are threestudio's
and 4D-fy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from fourdfy.data.base import CameraSampler
from fourdfy.data.settings import CameraConfig, MultiViewConfig, SingleViewConfig, at_step
from fourdfy.ops.cameras import look_at, spherical_positions
from fourdfy.types import Cameras, StepContext


@dataclass(frozen=True)
class SingleViews(CameraSampler):
    """Single views of one moment."""

    views: SingleViewConfig

    def sample(self, context: StepContext) -> Cameras:
        return sample_single_view(self.views, step=context.step, generator=context.random)

    def sizes(self) -> list[tuple[int, int, int]]:
        return self.views.sizes()


@dataclass(frozen=True)
class MultiViews(CameraSampler):
    """Groups of ``n_view`` cameras around one moment of ``clip``."""

    groups: MultiViewConfig
    clip: SingleViewConfig
    group_key = "data.multi_view.n_view"

    @property
    def group_size(self) -> int:
        return self.groups.n_view

    def sample(self, context: StepContext) -> Cameras:
        return sample_multi_view(self.groups, self.clip, step=context.step, generator=context.random)

    def sizes(self) -> list[tuple[int, int, int]]:
        return self.groups.sizes()


@dataclass(frozen=True)
class Videos(CameraSampler):
    """Draws whole clips."""

    clip: SingleViewConfig
    group_key = "data.single_view.num_frames"

    @property
    def group_size(self) -> int:
        return self.clip.num_frames

    def sample(self, context: StepContext) -> Cameras:
        return sample_video(self.clip, step=context.step, generator=context.random)

    def sizes(self) -> list[tuple[int, int, int]]:
        cfg = self.clip
        frames = [videos * cfg.num_frames for videos, _, _ in cfg.sizes()]
        return list(dict.fromkeys((count, cfg.height_vid, cfg.width_vid) for count in frames))


def sample_single_view(cfg: SingleViewConfig, *, step: int, generator: torch.Generator) -> Cameras:
    """``batch_size`` independent cameras at one time."""
    batch = at_step(cfg.batch_size, cfg.resolution_milestones, step)
    poses = _draw_poses(cfg, batch, generator)
    return _cameras(
        cfg,
        poses,
        group_size=1,
        times=_still_time(cfg, generator).expand(batch),
        height=at_step(cfg.height, cfg.resolution_milestones, step),
        width=at_step(cfg.width, cfg.resolution_milestones, step),
        generator=generator,
    )


def sample_video(cfg: SingleViewConfig, *, step: int, generator: torch.Generator) -> Cameras:
    """``batch_size`` videos, the ``num_frames`` frames of each contiguous.

    Raises:
        ValueError: the scene is static.
    """
    if cfg.static:
        raise ValueError("data.single_view.static=true has no video steps; set it to false")
    videos, frames = at_step(cfg.batch_size, cfg.resolution_milestones, step), cfg.num_frames
    poses = _each_repeated(_draw_poses(cfg, videos, generator), frames)
    if cfg.train_dynamic_camera:
        poses = _moving(cfg, poses, videos, generator)
    times = frame_times(videos, frames, cfg.sample_rand_frames, generator)
    if cfg.prob_reversed:
        backwards = torch.rand(videos, 1, generator=generator) < cfg.prob_reversed
        times = torch.where(backwards, times.flip(1), times)
    return _cameras(
        cfg,
        poses,
        group_size=frames,
        times=times.flatten(),
        height=cfg.height_vid,
        width=cfg.width_vid,
        generator=generator,
    )


def sample_multi_view(
    cfg: MultiViewConfig, clip: SingleViewConfig, *, step: int, generator: torch.Generator
) -> Cameras:
    """``batch_size / n_view`` groups of neighbours, evenly spaced in azimuth, at one moment of ``clip``."""
    batch = at_step(cfg.batch_size, cfg.resolution_milestones, step)
    groups = batch // cfg.n_view
    elevation = _elevations(cfg, groups, generator)
    turn = _uniform((0.0, 1.0), groups, generator)
    fovy = _uniform(cfg.fovy_range, groups, generator)
    distance = _uniform(cfg.camera_distance_range, groups, generator)
    zoom = _uniform(cfg.zoom_range, groups, generator)
    if cfg.relative_radius:
        distance = distance / torch.tan(0.5 * torch.deg2rad(fovy))
    first, last = cfg.azimuth_range
    azimuth = first + (turn[:, None] + torch.arange(cfg.n_view)) / cfg.n_view * (last - first)
    poses = _Poses(
        elevation_deg=elevation.repeat_interleave(cfg.n_view),
        azimuth_deg=azimuth.flatten(),
        distances=distance.repeat_interleave(cfg.n_view),
        fovy_deg=(fovy * zoom).repeat_interleave(cfg.n_view),
    )
    return _cameras(
        cfg,
        poses,
        group_size=cfg.n_view,
        times=_still_time(clip, generator).expand(batch),
        height=at_step(cfg.height, cfg.resolution_milestones, step),
        width=at_step(cfg.width, cfg.resolution_milestones, step),
        generator=generator,
    )


def frame_times(
    videos: int, frames: int, mode: Literal["t0", "loop"] | None, generator: torch.Generator
) -> Float[Tensor, "videos frames"]:
    """Frame times of each video, in 0..1; with a ``mode`` they stay below 1, else both ends are included."""
    if mode is None:
        return torch.linspace(0, 1, frames).expand(videos, frames)
    start = torch.rand(videos, 1, generator=generator)
    if mode == "loop":
        return (start + torch.arange(frames) / frames) % 1
    return (start + torch.arange(frames)) / frames


# ---------------------------------------------------------------------------------------------
# Private parts


@dataclass(frozen=True)
class _Poses:
    elevation_deg: Float[Tensor, "F"]
    azimuth_deg: Float[Tensor, "F"]
    distances: Float[Tensor, "F"]
    fovy_deg: Float[Tensor, "F"]


def _each_repeated(poses: _Poses, frames: int) -> _Poses:
    return _Poses(**{name: value.repeat_interleave(frames) for name, value in vars(poses).items()})


def _draw_poses(cfg: SingleViewConfig, count: int, generator: torch.Generator) -> _Poses:
    elevation = _elevations(cfg, count, generator)
    azimuth_share = _uniform((0.0, 1.0), count, generator)
    if cfg.batch_uniform_azimuth:
        azimuth_share = (azimuth_share + torch.arange(count)) / count
    first, last = cfg.azimuth_range
    return _Poses(
        elevation_deg=elevation,
        azimuth_deg=first + azimuth_share * (last - first),
        distances=_uniform(cfg.camera_distance_range, count, generator),
        fovy_deg=_uniform(cfg.fovy_range, count, generator),
    )


def _moving(cfg: SingleViewConfig, poses: _Poses, videos: int, generator: torch.Generator) -> _Poses:
    """Each video's pose drifts from frame to frame, at rates drawn once for the video."""
    frames = cfg.num_frames
    index = torch.arange(frames).repeat(videos)

    def rate(low: Tensor | float, high: Tensor | float) -> Float[Tensor, "F"]:
        share = torch.rand(videos, generator=generator).repeat_interleave(frames)
        return low + share * (high - low)

    nearest, farthest = cfg.camera_distance_range
    elevation, azimuth = 180 / (16 * frames), 180 / (2 * frames)
    return replace(
        poses,
        elevation_deg=(poses.elevation_deg + index * rate(-elevation, elevation)).clamp(-90, 90),
        azimuth_deg=poses.azimuth_deg + index * rate(-azimuth, azimuth),
        distances=poses.distances
        + index * rate((nearest - poses.distances) / frames, (farthest - poses.distances) / frames),
    )


def _elevations(cfg: CameraConfig, count: int, generator: torch.Generator) -> Float[Tensor, "G"]:
    """One coin toss per batch decides between uniform in degrees and "on the sphere".

    The second branch's bounds are linear in the angle instead of in its sine, so that [0, 30] gives
    0 .. asin(1/3) = 19.47 degrees. Kept from threestudio: the paper's results were made with it.
    """
    low, high = cfg.elevation_range
    if torch.rand((), generator=generator) < 0.5:
        return _uniform((low, high), count, generator)
    share = _uniform(((low + 90) / 180, (high + 90) / 180), count, generator)
    return torch.rad2deg(torch.asin(2 * share - 1))


def _still_time(cfg: SingleViewConfig, generator: torch.Generator) -> Float[Tensor, "1"]:
    """The time of a step without motion: 0, or one of a video's times."""
    if cfg.static:
        return torch.zeros(1)
    times = frame_times(1, cfg.num_frames, cfg.sample_rand_frames, generator)[0]
    return times[torch.randint(cfg.num_frames, (1,), generator=generator)]


def _cameras(
    cfg: CameraConfig,
    poses: _Poses,
    *,
    group_size: int,
    times: Float[Tensor, "F"],
    height: int,
    width: int,
    generator: torch.Generator,
) -> Cameras:
    """Perturbed cameras and their lights; the frames of a group share each draw."""
    draws = len(times) // group_size

    def normal() -> Float[Tensor, "F 3"]:
        return torch.randn(draws, 3, generator=generator).repeat_interleave(group_size, 0)

    shift = (2 * torch.rand(draws, 3, generator=generator) - 1).repeat_interleave(group_size, 0)
    positions = spherical_positions(poses.elevation_deg, poses.azimuth_deg, poses.distances)
    positions = positions + cfg.camera_perturb * shift
    centers = cfg.center_perturb * normal()
    ups = torch.tensor([0.0, 0.0, 1.0]) + cfg.up_perturb * normal()
    light_distances = _uniform(cfg.light_distance_range, draws, generator)
    if cfg.light_sample_strategy == "dreamfusion":
        directions = normalize(positions + cfg.light_position_perturb * normal(), dim=-1)
    else:
        angles = torch.rand(draws, 2, generator=generator).repeat_interleave(group_size, 0)
        directions = _within_60_degrees(positions, angles)
    return Cameras(
        c2w=look_at(positions, centers, ups),
        fovy_deg=poses.fovy_deg,
        elevation_deg=poses.elevation_deg,
        azimuth_deg=poses.azimuth_deg,
        distances=poses.distances,
        times=times,
        light_positions=directions * light_distances.repeat_interleave(group_size)[:, None],
        height=height,
        width=width,
        group_size=group_size,
    )


def _within_60_degrees(positions: Float[Tensor, "F 3"], shares: Float[Tensor, "F 2"]) -> Float[Tensor, "F 3"]:
    """Directions at most 60 degrees from ``positions`` (Lin et al. 2023, Magic3D)."""
    azimuth, elevation = 360 * shares[:, 0], 30 + 60 * shares[:, 1]
    local = spherical_positions(elevation, azimuth, torch.ones_like(azimuth))
    ahead = normalize(positions, dim=-1)
    side = torch.stack([ahead[:, 1], -ahead[:, 0], torch.zeros_like(azimuth)], dim=-1)
    side = normalize(side, dim=-1)
    frame = torch.stack([side, torch.linalg.cross(ahead, side, dim=-1), ahead], dim=-1)
    return torch.einsum("fij,fj->fi", frame, local)


def _uniform(bounds: Sequence[float], count: int, generator: torch.Generator) -> Float[Tensor, "count"]:
    low, high = bounds
    return low + (high - low) * torch.rand(count, generator=generator)
