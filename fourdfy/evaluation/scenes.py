"""A 4D scene of the shapes world against its ground truth.

``evaluate_scene`` looks at any renderer from fixed cameras at fixed moments.
F frames of a call, T moments, A azimuths, H x W pixels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.callbacks.scene_watch import filling
from fourdfy.config import ConfigError
from fourdfy.evaluation import marks, metrics
from fourdfy.evaluation.report import Moment, ShapesReport, write_json
from fourdfy.shapes import world
from fourdfy.shapes.grammar import COLOURS, ShapePrompt, is_held_out, parse_prompt
from fourdfy.systems.base import System
from fourdfy.types import Cameras

logger = logging.getLogger(__name__)

Render = Callable[[Cameras], tuple[Tensor, Tensor]]
"""F cameras -> rgb [F, H, W, 3] over ``BACKGROUND`` and opacity [F, H, W, 1], both 0..1."""

BACKGROUND = world.BACKGROUNDS[0]
ELEVATION_DEG = 15.0
TIMES = tuple(k / 12 for k in range(12))
"""Times in [0, 1); t = 1 is left out, since training never reaches it and it repeats t = 0."""
VIEWS_DEG = tuple(45.0 * k for k in range(8))
"""Azimuths of the frames that IoU, PSNR, colour and the centroid tracks are measured on."""
AROUND_DEG = tuple(15.0 * k for k in range(24))
"""Azimuths from which fronts are looked for; a front is seen from four of them or more."""
FRAMES_PER_CALL = 24
RIGHT_MOTION = 0.8
"""Correlation with the true track from which on a motion counts as right."""


@torch.no_grad()
def evaluate_scene(
    prompt: str | ShapePrompt, render: Render, *, device: str | torch.device = "cpu"
) -> ShapesReport:
    """Compare what ``render`` shows with the ground truth of ``prompt``.

    Args:
        render: the scene; given 64 x 64 cameras at elevation 15 on ``device``, at most
            ``FRAMES_PER_CALL`` at once. Values that are not finite count as 0.

    Raises:
        ValueError: ``prompt`` is not of the grammar, or ``render`` returns other shapes.
    """
    prompt = parse_prompt(prompt) if isinstance(prompt, str) else prompt
    truth = ground_truth(prompt)
    ours, theirs = (_look(scene, TIMES, VIEWS_DEG, device) for scene in (render, truth))
    if problem := filling(ours.opacity):
        logger.warning("%s: %s", prompt.text, problem)
    ious, psnrs = (
        values.view(len(TIMES), -1).mean(dim=1)
        for values in (
            metrics.silhouette_iou(ours.opacity, theirs.opacity),
            metrics.psnr(ours.rgb, theirs.rgb),
        )
    )
    around = _look(render, TIMES if prompt.motion == "spinning" else TIMES[:1], AROUND_DEG, device)
    straight_ahead = _look(truth, TIMES[:1], AROUND_DEG[:1], device).visible_mark[0]
    scores = marks.front_scores(around.visible_mark, straight_ahead).view(-1, len(AROUND_DEG))
    fronts = [marks.fronts(row) for row in scores]
    track, track_truth = _tracks(prompt, ours, theirs, fronts)
    still = prompt.motion == "standing still"
    corr = None if still else metrics.pearson(track, track_truth)
    columns = (TIMES, ious.tolist(), psnrs.tolist(), track.tolist(), track_truth.tolist())
    return ShapesReport(
        prompt=prompt.text,
        held_out=is_held_out(prompt),
        iou=float(ious.mean()),
        psnr=float(psnrs.mean()),
        colour_error=metrics.colour_error(ours.body_colour, theirs.body_colour),
        colour_ok=_nearest_colour(prompt, ours.body_colour, theirs.body_colour) == prompt.colour,
        saturation_error=ours.saturation - theirs.saturation,
        motion_corr=corr,
        motion_gain=None if still else metrics.gain(track, track_truth),
        motion_right=None if corr is None else corr >= RIGHT_MOTION,
        still_drift=_drift(ours) if still else None,
        fronts=len(fronts[0]),
        front_scores=tuple(scores[0].tolist()),
        over_time=tuple(
            Moment(time=time, iou=iou, psnr=psnr, track=_or_none(at), track_truth=_or_none(true_at))
            for time, iou, psnr, at, true_at in zip(*columns, strict=True)
        ),
    )


def evaluate_system(system: System, prompt: str, folder: Path) -> ShapesReport:
    """A trained scene against the ground truth; the report is also ``it{step}-evaluation.json`` in a folder.

    Raises:
        ConfigError: the prompt is not of the grammar, so there is no ground truth.
    """
    try:
        report = evaluate_scene(prompt, scene_renderer(system))
    except ValueError as error:
        raise ConfigError(f"system.prompt_processor.prompt: {error}") from error
    write_json(folder / f"it{system.step}-evaluation.json", asdict(report))
    return report


def scene_renderer(system: System) -> Render:
    """A system's scene over ``BACKGROUND`` instead of its own background."""

    def render(cameras: Cameras) -> tuple[Tensor, Tensor]:
        out = system.render(cameras)
        assert out.comp_rgb_fg is not None
        return out.comp_rgb_fg + (1 - out.opacity) * out.opacity.new_tensor(BACKGROUND), out.opacity

    return render


def ground_truth(prompt: ShapePrompt, background: Sequence[float] = BACKGROUND) -> Render:
    """The true scene of a prompt as a renderer."""

    def render(cameras: Cameras) -> tuple[Tensor, Tensor]:
        return world.render([prompt] * len(cameras), cameras, torch.tensor(background))

    return render


# ---------------------------------------------------------------------------------------------
# Looking


@dataclass(frozen=True, kw_only=True)
class _Frames:
    """T moments of A azimuths each, times slowest, F = T * A; on the CPU."""

    rgb: Float[Tensor, "F H W 3"]
    opacity: Float[Tensor, "F H W 1"]
    num_azimuths: int

    @cached_property
    def inside(self) -> Tensor:
        return self.opacity[..., 0] > 0.5

    @cached_property
    def colours(self) -> Tensor:
        return marks.foreground_colour(self.rgb, self.opacity, torch.tensor(BACKGROUND))

    @cached_property
    def body_colour(self) -> Tensor:
        return marks.body_colour(self.colours, self.inside)

    @cached_property
    def saturation(self) -> float:
        return metrics.mean_saturation(self.colours, self.inside)

    @cached_property
    def visible_mark(self) -> Tensor:
        return marks.visible_mark(self.colours, self.inside, self.body_colour)


def _look(
    render: Render, times: Sequence[float], azimuths_deg: Sequence[float], device: str | torch.device
) -> _Frames:
    """Render every azimuth at every moment."""
    all_times = torch.tensor(times, device=device).repeat_interleave(len(azimuths_deg))
    azimuth_deg = torch.tensor(azimuths_deg, device=device).repeat(len(times))
    cameras = world.orbit(torch.full_like(azimuth_deg, ELEVATION_DEG), azimuth_deg, all_times)
    images = []
    for first in range(0, len(cameras), FRAMES_PER_CALL):
        some = cameras[first : first + FRAMES_PER_CALL]
        rgb, opacity = render(some)
        size = (len(some), some.height, some.width)
        if rgb.shape != (*size, 3) or opacity.shape != (*size, 1):
            raise ValueError(
                f"the renderer gave rgb {tuple(rgb.shape)} and opacity {tuple(opacity.shape)}; "
                f"wanted are {(*size, 3)} and {(*size, 1)}"
            )
        images.append([_usable(rgb), _usable(opacity)])
    rgb, opacity = (torch.cat(parts) for parts in zip(*images, strict=True))
    return _Frames(rgb=rgb, opacity=opacity, num_azimuths=len(azimuths_deg))


def _usable(values: Tensor) -> Tensor:
    return values.float().nan_to_num(0, 0, 0).clamp(0, 1).cpu()


def _nearest_colour(prompt: ShapePrompt, colour: Float[Tensor, "3"], truth: Float[Tensor, "3"]) -> str | None:
    """The palette's colour, in the truth's shade, that a body's is nearest to.

    None for a grey body, an empty scene's included, which has a nearest colour too.
    """
    palette = torch.tensor([world.COLOUR_RGB[name] for name in COLOURS])
    shade = truth.norm() / palette[COLOURS.index(prompt.colour)].norm()
    nearest = COLOURS[int((colour - shade * palette).norm(dim=-1).argmin())]
    return nearest if marks.chroma(colour) > marks.MIN_CHROMA else None


# ---------------------------------------------------------------------------------------------
# Tracks, in scene units at the origin's depth; NaN at moments when nothing is seen


def _tracks(
    prompt: ShapePrompt, ours: _Frames, theirs: _Frames, fronts: Sequence[Sequence[float]]
) -> tuple[Float[Tensor, "T"], Float[Tensor, "T"]]:
    """The coordinate that the prompt's motion moves, in the scene and in truth; NaN if it stands still."""
    if prompt.motion == "standing still":
        unknown = torch.full((len(TIMES),), math.nan)
        return unknown, unknown
    if prompt.motion == "spinning":
        return marks.angle_track(fronts), torch.rad2deg(world.pose(prompt, torch.tensor(TIMES))[2])
    return _TRACKS[prompt.motion](ours), _TRACKS[prompt.motion](theirs)


def _height(frames: _Frames) -> Float[Tensor, "T"]:
    """Height of the silhouette's centroid in the image, mean over the azimuths."""
    rows, _, _ = _centroids(frames)
    return -rows.nanmean(dim=1)


def _aside(frames: _Frames) -> Float[Tensor, "T"]:
    """Centroid along +y: to the right seen from azimuth 0, to the left from 180."""
    _, columns, _ = _centroids(frames)
    return (columns[:, VIEWS_DEG.index(0.0)] - columns[:, VIEWS_DEG.index(180.0)]) / 2


def _size(frames: _Frames) -> Float[Tensor, "T"]:
    """Side of the square with the silhouette's area, mean over the azimuths."""
    _, _, areas = _centroids(frames)
    return areas.sqrt().nanmean(dim=1)


_TRACKS = {"bouncing": _height, "sliding": _aside, "pulsing": _size}


def _centroids(frames: _Frames) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column (from the image's centre) and area of each silhouette, each [T, A]."""
    inside = frames.inside.double()
    height, width = inside.shape[1:]
    per_pixel = 2 * world.CAMERA_DISTANCE * math.tan(math.radians(world.FOVY_DEG) / 2) / height
    area = inside.sum(dim=(1, 2))
    area = torch.where(area > 0, area, math.nan)
    row = (inside.sum(dim=2) * (torch.arange(height) + 0.5 - height / 2)).sum(dim=1) / area
    column = (inside.sum(dim=1) * (torch.arange(width) + 0.5 - width / 2)).sum(dim=1) / area
    values = (row * per_pixel, column * per_pixel, area * per_pixel**2)
    row, column, area = (value.view(-1, frames.num_azimuths) for value in values)
    return row, column, area


def _drift(frames: _Frames) -> float:
    """Largest over the moments: mean colour change since the first, where the object is or was."""
    moments = (-1, frames.num_azimuths, *frames.inside.shape[1:])
    inside, rgb = frames.inside.view(moments), frames.rgb.view(*moments, 3)
    either = inside | inside[:1]
    change = (rgb - rgb[:1]).abs().mean(dim=-1) * either
    return float((change.flatten(1).sum(dim=1) / either.flatten(1).sum(dim=1).clamp_min(1)).max())


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
