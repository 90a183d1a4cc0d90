"""Settings of training cameras and evaluation sequences; the keys are those of threestudio and 4D-fy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from fourdfy.bounds import number


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
    sample_rand_frames: Literal["t0", "loop"] | None = None
    """``t0``: times (u + k) / num_frames with one u in [0, 1) for a clip; ``loop``: one u in [0, num_frames),
    modulo 1, so that a clip starts at any time and the motion becomes a loop; null: linspace(0, 1,
    num_frames)."""
    prob_reversed: float = number(0.0, 0, 1)
    """Share of the clips that run backwards. Only for motions that look the same in reverse: nobody walks
    backwards."""
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
    sample_rand_frames: Literal["t0", "loop"] | None = None
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


def at_step(values: int | Sequence[int], milestones: Sequence[int], step: int) -> int:
    """The entry that applies at ``step``; the next one starts exactly at its milestone."""
    stretches = _stretches(values)
    passed = sum(milestone <= step for milestone in milestones)
    return stretches[min(passed, len(stretches) - 1)]


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
