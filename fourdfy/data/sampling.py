"""Random training cameras: single views, groups of views, and videos.

F frames, G draws, each shared by F / G consecutive frames: one frame of a single-view step, the
n_view frames of a group, the num_frames frames of a video. Everything is drawn from an explicit
generator; nothing here decides which kind of step it is. Keys and distributions are threestudio's
and 4D-fy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from fourdfy.bounds import number
from fourdfy.data.base import CameraSampler
from fourdfy.ops.cameras import look_at, spherical_positions
from fourdfy.types import Cameras, StepContext


@dataclass(frozen=True, kw_only=True)
class CameraConfig:
    """Settings that both samplers share."""

    batch_size: Any = number(1, 1, 1024)
    """Cameras of a step (in video steps: videos); like ``height``, a number or a list."""
    height: Any = number(64, 1, 8192)
    """Pixels: a number, or a list with one more entry than ``resolution_milestones``."""
    width: Any = number(64, 1, 8192)
    """Pixels; a number or a list, as ``height``."""
    resolution_milestones: tuple[int, ...] = number((), 1)
    """Global steps at which ``height``, ``width`` and ``batch_size`` change to their next entry."""
    camera_distance_range: tuple[float, float] = number((1.0, 1.5), high=1000, above=0)
    """Distance of the camera from the origin, scene units."""
    fovy_range: tuple[float, float] = number((40.0, 70.0), high=179, above=0)
    """Vertical field of view, degrees."""
    elevation_range: tuple[float, float] = number((-10.0, 90.0), -90, 90)
    """Degrees above the horizon."""
    azimuth_range: tuple[float, float] = number((-180.0, 180.0), -720, 720)
    """Degrees; 0 looks at the front."""
    camera_perturb: float = number(0.1, 0, 100)
    """Half side of the uniform displacement of the position, scene units."""
    center_perturb: float = number(0.2, 0, 100)
    """Standard deviation of the point looked at, scene units."""
    up_perturb: float = number(0.02, 0, 100)
    """Standard deviation of the up vector."""
    light_position_perturb: float = number(1.0, 0, 100)
    """Standard deviation of the light's direction around the camera's position (dreamfusion)."""
    light_distance_range: tuple[float, float] = number((0.8, 1.5), high=1000, above=0)
    """Distance of the light from the origin, scene units."""
    light_sample_strategy: Literal["dreamfusion", "magic3d"] = "dreamfusion"
    """``dreamfusion`` draws around the camera's position, ``magic3d`` within 60 degrees of its direction."""

    def __post_init__(self) -> None:
        for key in ("batch_size", "height", "width"):
            _check_stretches(key, getattr(self, key), self.resolution_milestones)
        if list(self.resolution_milestones) != sorted(self.resolution_milestones):
            raise ValueError(
                f"resolution_milestones={list(self.resolution_milestones)}: earlier steps come first"
            )
        for key in (f.name for f in fields(self) if f.name.endswith("_range")):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"{key}=[{low}, {high}]: the lower bound comes first")

    def sizes(self) -> list[tuple[int, int, int]]:
        """(batch_size, height, width) of each stretch between milestones, without repetitions."""
        stretches = [
            (
                at_step(self.batch_size, self.resolution_milestones, start),
                at_step(self.height, self.resolution_milestones, start),
                at_step(self.width, self.resolution_milestones, start),
            )
            for start in (0, *self.resolution_milestones)
        ]
        return list(dict.fromkeys(stretches))


@dataclass(frozen=True, kw_only=True)
class SingleViewConfig(CameraConfig):
    """Image and video steps, and all evaluation sequences."""

    batch_uniform_azimuth: bool = True
    """Spread the azimuths of a batch evenly over the range."""
    static: bool = True
    """Whether the scene is static, so that every time is 0."""
    simultan: bool = False
    """Whether image and video steps alternate; read by the supervision plan."""
    prob_single_view_video: float | None = number(None, 0, 1)
    """Share of video steps among image and video steps; read by the supervision plan."""
    num_frames: int = number(1, 1, 1024)
    """Frames of a video, and number of times that a still of a dynamic scene is drawn from."""
    sample_rand_frames: Literal["t0"] | None = None
    """``t0``: times (u + k) / num_frames with one u in [0, 1); null: linspace(0, 1, num_frames)."""
    width_vid: int = number(64, 1, 8192)
    """Pixels, in video steps."""
    height_vid: int = number(64, 1, 8192)
    """Pixels, in video steps."""
    train_dynamic_camera: bool = False
    """In video steps the camera moves too, at random constant rates."""
    num_frames_factor: int = number(1, 1, 100)
    """Evaluation videos have num_frames times this many frames."""
    num_test_loop_factor: int = number(1, 1, 100)
    """Views of each turning part of the ``test_traj: null`` sequence, in units of its clip's frames."""
    num_test_loop_static: int = number(4, 1, 360)
    """Parts of the test sequence: rest at an azimuth, then turn to the next."""
    test_traj: Literal["motion_smooth", "motion_smooth_full"] | None = None
    """Camera of the dynamic test sequence; see ``data.trajectories``."""
    eval_height: int = number(512, 1, 8192)
    """Pixels, in validation and test."""
    eval_width: int = number(512, 1, 8192)
    """Pixels, in validation and test."""
    eval_batch_size: int = number(1, 1, 1024)
    """Frames rendered per evaluation step; the images do not depend on it."""
    n_val_views: int = number(1, 1, 10_000)
    """Validation stills around the object."""
    n_test_views: int = number(120, 1, 10_000)
    """Test views around a static object."""
    eval_elevation_deg: float = number(15.0, -90, 90)
    """Elevation of the camera in all evaluation sequences, degrees."""
    eval_camera_distance: float = number(1.5, high=1000, above=0)
    """Distance of the camera from the origin, scene units."""
    eval_fovy_deg: float = number(70.0, high=179, above=0)
    """Vertical field of view."""


@dataclass(frozen=True, kw_only=True)
class MultiViewConfig(CameraConfig):
    """Groups of cameras evenly around the object."""

    n_view: int = number(1, 1, 64)
    """Cameras of a group."""
    relative_radius: bool = True
    """Divide distances by tan(fovy / 2), so that the object keeps its size in the image."""
    zoom_range: tuple[float, float] = number((1.0, 1.0), high=100, above=0)
    """Factor on the field of view, after ``relative_radius``."""
    num_frames: int | None = number(None, 1, 1024)
    """Must be null or as in ``data.single_view``, where the frame times come from."""
    sample_rand_frames: Literal["t0"] | None = None
    """The frame times are those of ``data.single_view``; null, or the same as there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fovy_range[1] * self.zoom_range[1] > 179:
            raise ValueError(
                f"fovy_range={list(self.fovy_range)} times zoom_range={list(self.zoom_range)} exceeds 179 "
                f"degrees; narrow one of the two"
            )
        for batch_size in _stretches(self.batch_size):
            if batch_size % self.n_view:
                fitting = max(1, batch_size // self.n_view) * self.n_view
                raise ValueError(
                    f"data.multi_view.batch_size={batch_size} does not fill whole groups of "
                    f"n_view={self.n_view} cameras; use a multiple, e.g. data.multi_view.batch_size={fitting}"
                    f", or the prior's n_view, which is 4 for MVDream"
                )


# ---------------------------------------------------------------------------------------------
# Samplers


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
    return _cameras(
        cfg,
        poses,
        group_size=frames,
        times=frame_times(videos, frames, cfg.sample_rand_frames, generator).flatten(),
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
    videos: int, frames: int, mode: Literal["t0"] | None, generator: torch.Generator
) -> Float[Tensor, "videos frames"]:
    """Frame times of each video, in 0..1; ``t0`` stays below 1, otherwise both ends are included."""
    if mode is None:
        return torch.linspace(0, 1, frames).expand(videos, frames)
    return (torch.rand(videos, 1, generator=generator) + torch.arange(frames)) / frames


def at_step(values: int | Sequence[int], milestones: Sequence[int], step: int) -> int:
    """The entry that applies at ``step``; the next one starts exactly at its milestone."""
    stretches = _stretches(values)
    passed = sum(milestone <= step for milestone in milestones)
    return stretches[min(passed, len(stretches) - 1)]


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


def _stretches(values: int | Sequence[int]) -> list[int]:
    return [values] if isinstance(values, int) else list(values)


def _check_stretches(key: str, values: Any, milestones: Sequence[int]) -> None:
    listed = isinstance(values, Sequence) and not isinstance(values, str)
    numbers = values if listed else [values]
    if not numbers or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise ValueError(f"{key}={values!r}: expected an integer or a list of them")
    if len(numbers) not in (1, len(milestones) + 1):
        raise ValueError(
            f"{key}={list(numbers)} has {len(numbers)} entries for {len(milestones)} "
            f"resolution_milestones; expected one entry, or {len(milestones) + 1}"
        )
