"""A 4D scene of the shapes world against its ground truth, and the command that does both.

``evaluate_scene`` looks at any renderer from fixed cameras at fixed moments. The command trains the
recipe on prompts of the grammar and evaluates each scene:

    python -m fourdfy.evaluation.shapes --prompt "a red cube spinning" --gpu 0 --json shapes.json

F frames of a call, T moments, A azimuths, H x W pixels.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from fourdfy.config import ConfigError
from fourdfy.config_files import CONFIGS
from fourdfy.evaluation import marks, metrics
from fourdfy.evaluation.report import Moment, ShapesReport, summary_table
from fourdfy.launching.devices import use_device
from fourdfy.launching.recipe import load_recipe
from fourdfy.launching.run import train_stage
from fourdfy.shapes import world
from fourdfy.shapes.grammar import COLOURS, ShapePrompt, is_held_out, parse_prompt
from fourdfy.systems.base import System
from fourdfy.types import Cameras

Render = Callable[[Cameras], tuple[Tensor, Tensor]]
"""F cameras -> rgb [F, H, W, 3] over ``BACKGROUND`` and opacity [F, H, W, 1], both 0..1."""

BACKGROUND = world.BACKGROUNDS[0]
ELEVATION_DEG = 15.0
TIMES = tuple(k / 12 for k in range(12))
"""Without t = 1, which training never reaches and which repeats t = 0."""
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
        ValueError: ``prompt`` is not of the grammar, or ``render`` gives other shapes.
    """
    prompt = parse_prompt(prompt) if isinstance(prompt, str) else prompt
    truth = ground_truth(prompt)
    spinning, still = prompt.motion == "spinning", prompt.motion == "standing still"

    ours = _look(render, TIMES, VIEWS_DEG, device)
    theirs = _look(truth, TIMES, VIEWS_DEG, device)
    ious = metrics.silhouette_iou(ours.opacity, theirs.opacity).view(len(TIMES), -1).mean(dim=1)
    psnrs = metrics.psnr(ours.rgb, theirs.rgb).view(len(TIMES), -1).mean(dim=1)

    colour, true_colour = ours.body_colour, theirs.body_colour
    palette = torch.tensor([world.COLOUR_RGB[name] for name in COLOURS])
    shade = true_colour.norm() / palette[COLOURS.index(prompt.colour)].norm()
    nearest = COLOURS[int((colour - shade * palette).norm(dim=-1).argmin())]

    around = _look(render, TIMES if spinning else TIMES[:1], AROUND_DEG, device)
    straight_ahead = _look(truth, TIMES[:1], AROUND_DEG[:1], device).visible_mark[0]
    scores = marks.front_scores(around.visible_mark, straight_ahead).view(-1, len(AROUND_DEG))
    fronts = [marks.fronts(row) for row in scores]

    unknown = torch.full((len(TIMES),), math.nan)
    if still:
        track = track_truth = unknown
    elif spinning:
        track = marks.angle_track(fronts)
        track_truth = torch.rad2deg(world.pose(prompt, torch.tensor(TIMES))[2])
    else:
        track, track_truth = (_TRACKS[prompt.motion](frames) for frames in (ours, theirs))
    corr = None if still else metrics.pearson(track, track_truth)

    return ShapesReport(
        prompt=prompt.text,
        held_out=is_held_out(prompt),
        iou=float(ious.mean()),
        psnr=float(psnrs.mean()),
        colour_error=metrics.colour_error(colour, true_colour),
        # Not so for a grey or empty scene, which has a nearest colour too.
        colour_ok=nearest == prompt.colour and bool(marks.chroma(colour) > marks.MIN_CHROMA),
        motion_corr=corr,
        motion_gain=None if still else metrics.gain(track, track_truth),
        motion_right=None if corr is None else corr >= RIGHT_MOTION,
        still_drift=_drift(ours) if still else None,
        fronts=len(fronts[0]),
        front_scores=tuple(scores[0].tolist()),
        over_time=tuple(
            Moment(time=time, iou=iou, psnr=psnr, track=_or_none(at), track_truth=_or_none(true_at))
            for time, iou, psnr, at, true_at in zip(
                TIMES, ious.tolist(), psnrs.tolist(), track.tolist(), track_truth.tolist(), strict=True
            )
        ),
    )


def evaluate_system(system: System, prompt: str, trial_dir: Path) -> ShapesReport:
    """A trained scene against the ground truth; the report is also ``save/it{step}-evaluation.json``.

    Raises:
        ConfigError: the prompt is not of the grammar, so there is no ground truth.
    """
    try:
        report = evaluate_scene(prompt, scene_renderer(system))
    except ValueError as error:
        raise ConfigError(f"system.prompt_processor.prompt: {error}") from error
    _write_json(trial_dir / "save" / f"it{system.step}-evaluation.json", asdict(report))
    return report


def scene_renderer(system: System) -> Render:
    """A system's scene over ``BACKGROUND`` instead of its own background."""

    def render(cameras: Cameras) -> tuple[Tensor, Tensor]:
        out = system.render(cameras)
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


# ---------------------------------------------------------------------------------------------
# Tracks, in scene units at the origin's depth; NaN at moments when nothing is seen


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


# ---------------------------------------------------------------------------------------------
# The command

RECIPE = CONFIGS / "shapes.yaml"

DROP_OVERRIDES: dict[str, tuple[str, ...]] = {
    "multi_view": (
        "data.prob_multi_view=0",
        "stage_1.system.guidance.max_step_percent=0.98",
        'stage_1.system.prompt_processor.moments=["at the start"]',
        "stage_1.system.optimizer.params={guidance_single_view: {lr: 0.0001}}",
    ),
    "single_view": (
        "stage_2.data.prob_multi_view=1",
        "stage_2.system.optimizer.params={guidance_single_view: null}",
        "stage_3.data.single_view.prob_single_view_video=1",
    ),
    "video": ("stage_3.data.single_view.prob_single_view_video=0",),
}
"""What switches a prior of the recipe off, as ``key=value`` overrides."""


def train_prompt(
    prompt: ShapePrompt, device: str, drop: str | None, overrides: Sequence[str], recipe: Path = RECIPE
) -> tuple[Render, float]:
    """Train a recipe of the shapes world on a prompt: the scene's renderer, and the seconds it took.

    Args:
        device: "cuda" or "cpu".
        drop: the prior to leave out, a key of ``DROP_OVERRIDES``.
        overrides: further ``key=value``, after those of ``drop``.
    """
    began = time.perf_counter()
    tag = " ".join([prompt.text, *([f"without {drop}"] if drop else []), *recipe.stem.split("_")[1:]])
    given = [
        f"tag={tag}",
        f"system.prompt_processor.prompt={prompt.text}",
        *DROP_OVERRIDES.get(drop or "", ()),
    ]
    stages = load_recipe([recipe], [*given, *overrides])
    for stage in stages:
        train_stage(stage, device=device, command=sys.argv, test=False)
    experiment = stages[-1].experiment
    system = experiment.load_system(device, experiment.last_checkpoint)
    return scene_renderer(system), time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m fourdfy.evaluation.shapes``: train and evaluate prompts, one after the other."""
    parser = _parser()
    args = parser.parse_intermixed_args(argv)
    try:
        prompts = [parse_prompt(text) for text in args.prompt]
        results = Results(args.json, config=args.config.stem, drop=args.drop, overrides=args.overrides)
    except ValueError as error:
        parser.error(str(error))
    for override in args.overrides:
        if "=" not in override or override.startswith("="):
            parser.error(f"{override!r}: expected key=value, e.g. seed=1")

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        device = use_device(args.gpu)
    except ConfigError as error:
        parser.error(str(error))
    rows = []
    for prompt in prompts:
        render, seconds = train_prompt(prompt, device, args.drop, args.overrides, args.config)
        report = evaluate_scene(prompt, render)
        rows.append(results.add(report, seconds))
    Console().print(summary_table(rows))
    return 0


class Results:
    """The results of a run, in a JSON file that is whole after every prompt.

    What an earlier command left in the file stays, so ablations can share one; the same prompt with
    the same recipe, drop and overrides replaces its own row.
    """

    def __init__(self, path: Path | None, *, config: str, drop: str | None, overrides: Sequence[str]) -> None:
        self._path = path
        self._settings = {"config": config, "drop": drop, "overrides": list(overrides)}
        self._rows: list[dict[str, Any]] = []
        if path is None or not path.exists():
            return
        try:
            self._rows = json.loads(path.read_text(encoding="utf-8"))
            self._keys = [self._key(row) for row in self._rows]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} holds no results of this command; name another file") from error

    def add(self, report: ShapesReport, seconds: float) -> dict[str, Any]:
        """Add the row of a prompt, write the file, and give the row."""
        row = asdict(report) | {"seconds": seconds} | self._settings
        self._rows = [other for other in self._rows if self._key(other) != self._key(row)] + [row]
        if self._path is not None:
            _write_json(self._path, self._rows)
        return row

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["prompt"], row["config"], row["drop"], tuple(row["overrides"])


def _write_json(path: Path, values: Any) -> None:
    """The old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half_written = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    half_written.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    half_written.replace(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fourdfy.evaluation.shapes",
        description="Train the shapes recipe on prompts and compare the scenes with the ground truth.",
    )
    parser.add_argument("--prompt", action="append", required=True, help='e.g. "a red cube spinning"')
    parser.add_argument(
        "--config", type=Path, default=RECIPE, metavar="YAML", help="the recipe (configs/shapes.yaml)"
    )
    parser.add_argument(
        "--gpu", metavar="ID", help="which GPU, or cpu (default: the first GPU, else the CPU)"
    )
    parser.add_argument("--drop", choices=sorted(DROP_OVERRIDES), help="leave one prior out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides")
    return parser


if __name__ == "__main__":
    sys.exit(main())
