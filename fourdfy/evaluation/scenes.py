"""A 4D scene of the shapes world against its ground truth.

``evaluate_scene`` looks at any renderer from fixed cameras at fixed moments.
T moments, A azimuths.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.callbacks.scene_watch import filling
from fourdfy.config import ConfigError
from fourdfy.evaluation import creatures, marks, metrics, tracking
from fourdfy.evaluation.frames import BACKGROUND, Frames, Render, drift, look, orbit
from fourdfy.evaluation.report import Moment, Report, ShapesReport, write_json
from fourdfy.shapes import world
from fourdfy.shapes.creature_prompts import CreaturePrompt
from fourdfy.shapes.grammar import COLOURS, ShapePrompt, is_held_out
from fourdfy.shapes.prompts import Prompt, encode, parse, render_codes
from fourdfy.systems.base import System
from fourdfy.types import Cameras

logger = logging.getLogger(__name__)

TIMES = tuple(k / 12 for k in range(12))
"""Times in [0, 1); t = 1 is left out, since training never reaches it and it repeats t = 0."""
VIEWS_DEG = tuple(45.0 * k for k in range(8))
"""Azimuths of the frames that all is measured on but the fronts; some show the true mark at any moment."""
AROUND_DEG = tuple(15.0 * k for k in range(24))
"""Azimuths from which fronts are looked for; a front is seen from four of them or more."""
RIGHT_MOTION = 0.8
"""Correlation with the true track from which on a motion counts as right,"""
RIGHT_GAIN = (2 / 3, 3 / 2)
"""if it also goes so far for each unit of the truth; a motion with too few tracked moments is not right."""


@torch.no_grad()
def evaluate_scene(prompt: str | Prompt, render: Render, *, device: str | torch.device = "cpu") -> Report:
    """Compare what ``render`` shows with the ground truth of ``prompt``, a solid's or a creature's.

    Args:
        render: the scene; given 64 x 64 cameras at elevation 15 on ``device``, at most
            ``FRAMES_PER_CALL`` at once. Values that are not finite count as 0.

    Raises:
        ValueError: ``prompt`` is not of the grammar, or ``render`` returns other shapes.
    """
    prompt = parse(prompt) if isinstance(prompt, str) else prompt
    if isinstance(prompt, CreaturePrompt):
        return creatures.evaluate_creature(prompt, render, device=device)
    ours = look(render, TIMES, VIEWS_DEG, device)
    theirs = _truth(prompt)
    if problem := filling(ours.opacity):
        logger.warning("%s: %s", prompt.text, problem)
    around = look(render, TIMES[:1], AROUND_DEG, device)
    straight_ahead = marks.visible_mark(theirs.mark[:1], theirs.inside[:1])[0]
    scores = marks.front_scores(marks.visible_mark(around.mark, around.inside), straight_ahead)
    still = prompt.motion == "standing still"
    over_time = _over_time(prompt, ours, theirs)
    track, truth = (
        torch.tensor([math.nan if at is None else at for at in values])
        for values in zip(*((moment.track, moment.track_truth) for moment in over_time), strict=True)
    )
    corr, gain = (None, None) if still else (metrics.pearson(track, truth), metrics.gain(track, truth))
    return ShapesReport(
        prompt=prompt.text,
        held_out=is_held_out(prompt),
        iou=_mean(moment.iou for moment in over_time),
        psnr=_mean(moment.psnr for moment in over_time),
        colour_error=metrics.colour_error(ours.body_colour, theirs.body_colour),
        colour_ok=_nearest_colour(prompt, ours.body_colour, theirs.body_colour) == prompt.colour,
        saturation_error=_saturation(ours) - _saturation(theirs),
        motion_corr=corr,
        motion_gain=gain,
        motion_right=None if still else _is_right(corr, gain),
        untracked=None if still else int(track.isnan().sum()),
        still_drift=drift(ours, len(TIMES)) if still else None,
        mark_seen=sum(moment.mark >= marks.MARK_SEEN for moment in over_time),
        ghosts=sum(moment.ghost >= marks.GHOST_SEEN for moment in over_time),
        fronts=len(marks.fronts(scores)),
        front_scores=tuple(scores.tolist()),
        over_time=over_time,
    )


def evaluate_system(system: System, prompt: str, folder: Path) -> Report:
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


def ground_truth(prompt: Prompt, background: Sequence[float] = BACKGROUND) -> Render:
    """The true scene of a prompt as a renderer."""
    codes = encode([prompt])

    def render(cameras: Cameras) -> tuple[Tensor, Tensor]:
        return render_codes(codes.expand(len(cameras), -1), cameras, torch.tensor(background))

    return render


@lru_cache(maxsize=2)
def _truth(prompt: ShapePrompt) -> Frames:
    """What ``evaluate_scene`` compares with."""
    return look(ground_truth(prompt), TIMES, VIEWS_DEG, "cpu")


@lru_cache(maxsize=2)
def _poses(prompt: ShapePrompt) -> Float[Tensor, "K A H W C"]:
    """The object of a prompt at rest, as ``tracking.track`` compares with it."""
    still = ground_truth(replace(prompt, motion="standing still"))
    return tracking.poses(prompt.motion, still, orbit(TIMES[:1], VIEWS_DEG, "cpu"))


def _over_time(prompt: ShapePrompt, ours: Frames, theirs: Frames) -> tuple[Moment, ...]:
    moments = (len(TIMES), len(VIEWS_DEG))
    mark, true_mark, greyness, body = (
        values.unflatten(0, moments)
        for values in (ours.mark, theirs.mark, ours.smooth.greyness, ours.inside & theirs.inside)
    )
    columns = (
        metrics.silhouette_iou(ours.opacity, theirs.opacity).view(moments).mean(dim=1),
        metrics.psnr(ours.rgb, theirs.rgb).view(moments).mean(dim=1),
        marks.mark_in_place(mark, true_mark),
        marks.ghosts(greyness, true_mark, body),
        *_tracks(prompt, ours),
    )
    names = ("time", "iou", "psnr", "mark", "ghost", "track", "track_truth")
    rows = zip(TIMES, *(map(_or_none, column.tolist()) for column in columns), strict=True)
    return tuple(Moment(**dict(zip(names, row, strict=True))) for row in rows)


def _tracks(prompt: ShapePrompt, ours: Frames) -> tuple[Float[Tensor, "T"], Float[Tensor, "T"]]:
    """The coordinate that the prompt's motion changes, in the scene and in truth; NaN if it stands still."""
    if prompt.motion == "standing still":
        unknown = torch.full((len(TIMES),), math.nan)
        return unknown, unknown
    offset, scale, yaw = world.pose(prompt, torch.tensor(TIMES))
    truth = {"bouncing": offset[:, 2], "sliding": offset[:, 1], "pulsing": scale, "spinning": yaw.rad2deg()}
    seen = tracking.track(prompt.motion, ours, _poses(prompt))
    return seen, truth[prompt.motion]


def _is_right(corr: float | None, gain: float | None) -> bool:
    if corr is None or gain is None:
        return False
    return corr >= RIGHT_MOTION and RIGHT_GAIN[0] <= gain <= RIGHT_GAIN[1]


def _saturation(frames: Frames) -> float:
    return metrics.mean_saturation(frames.colours, frames.inside)


def _nearest_colour(prompt: ShapePrompt, colour: Float[Tensor, "3"], truth: Float[Tensor, "3"]) -> str | None:
    """The palette's colour, in the truth's shade, that a body's is nearest to.

    None for a grey body, an empty scene's included, which has a nearest colour too.
    """
    palette = torch.tensor([world.COLOUR_RGB[name] for name in COLOURS])
    shade = truth.norm() / palette[COLOURS.index(prompt.colour)].norm()
    nearest = COLOURS[int((colour - shade * palette).norm(dim=-1).argmin())]
    return nearest if marks.chroma(colour) > marks.MIN_CHROMA else None


def _mean(values: Iterable[float]) -> float:
    return sum(values) / len(TIMES)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
