"""A 4D scene of a creature against its ground truth: silhouettes, colours and motion of its parts, its faces.

T moments, A azimuths, F = T * A frames (times slowest), H x W pixels, G groups of parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from fourdfy.evaluation import marks, metrics
from fourdfy.evaluation.frames import BACKGROUND, Frames, Render, drift, look, orbit
from fourdfy.evaluation.report import CreatureMoment, CreatureReport
from fourdfy.shapes.creature_prompts import CreaturePrompt, is_held_out
from fourdfy.shapes.creatures import CREATURES, Creature
from fourdfy.shapes.gestures import bodies, groups
from fourdfy.shapes.tracing import render_bodies
from fourdfy.shapes.world import COLOUR_RGB
from fourdfy.types import Cameras

TIMES = tuple(k / 12 for k in range(12))
VIEWS_DEG = tuple(60.0 * k for k in range(6))
AROUND_DEG = tuple(15.0 * k for k in range(24))
MOVES = 0.02
"""Scene units (root mean square) from which on a part is one that moves."""
MIN_PIXELS = 40
"""Of a group in all frames together; below, nothing is said of its colour."""
FACE_BLUR = 9
"""Pixels over which faces are blurred before they are compared, so that of a face seen aslant one eye is
not taken for both. Of the truth's own scores, those at 15 degrees are 0.4 to 0.9, and beyond they fall."""
FACE = 0.3
"""Share of its strongest pixel's change from which on a pixel is of the face."""
RIGHT_COLOUR = 0.15
RIGHT_MOTION = 0.8


@torch.no_grad()
def evaluate_creature(
    prompt: CreaturePrompt, render: Render, *, device: str | torch.device = "cpu", supersample: int = 2
) -> CreatureReport:
    """Compare what ``render`` shows with the ground truth of ``prompt``; see ``scenes.evaluate_scene``.

    Args:
        supersample: rays per pixel and axis of the ground truth.
    """
    creature = CREATURES[prompt.creature]
    ours = look(render, TIMES, VIEWS_DEG, device)
    theirs, group = _truth(prompt, creature, orbit(TIMES, VIEWS_DEG, "cpu"), supersample)
    colours = part_colours(ours, theirs, group)
    errors = {name: colours[n] for n, name in enumerate(_names(creature)) if n in colours}
    motion = part_motion(ours, theirs, group, _centroids(prompt, creature))
    moving = {name: motion[n] for n, name in enumerate(_names(creature)) if n in motion}
    scores = face_scores(prompt, look(render, TIMES[:1], AROUND_DEG, device), supersample)
    ious, psnrs = (
        measure(mine, true).view(len(TIMES), -1).mean(dim=1).tolist()
        for measure, mine, true in (
            (metrics.silhouette_iou, ours.opacity, theirs.opacity),
            (metrics.psnr, ours.rgb, theirs.rgb),
        )
    )
    return CreatureReport(
        prompt=prompt.text,
        held_out=is_held_out(prompt),
        iou=_mean(ious),
        psnr=_mean(psnrs),
        colour_error=_mean(errors.values()),
        colour_errors=errors,
        colours_right=_mean(error < RIGHT_COLOUR for error in errors.values()),
        motion_corr=_mean(moving.values()) if moving else None,
        part_motion=moving,
        parts_right=_mean(corr >= RIGHT_MOTION for corr in moving.values()) if moving else None,
        still_drift=None if moving else drift(ours, len(TIMES)),
        faces=len(marks.fronts(scores)),
        face_scores=tuple(scores.tolist()),
        over_time=tuple(
            CreatureMoment(time=time, iou=iou, psnr=psnr)
            for time, iou, psnr in zip(TIMES, ious, psnrs, strict=True)
        ),
    )


def part_colours(ours: Frames, theirs: Frames, group: Int[Tensor, "F H W"]) -> dict[int, float]:
    """Group -> error of its median colour, over the pixels where the truth shows it and both objects are."""
    found = {}
    for n in range(int(group.max()) + 1):
        seen = (group == n) & ours.inside
        if int((group == n).sum()) >= MIN_PIXELS:
            median = ours.colours[seen].median(dim=0).values if seen.any() else torch.zeros(3)
            found[n] = metrics.colour_error(median, theirs.colours[group == n].median(dim=0).values)
    return found


def part_motion(
    ours: Frames, theirs: Frames, group: Int[Tensor, "F H W"], centroids: Float[Tensor, "T G 3"]
) -> dict[int, float]:
    """Group -> correlation of its centroid's track with the true one, for the groups that move.

    A group is where the truth has it at the moment whose images, in the window that the group ever
    covers, match best; so what is measured is the motion, whatever the colours.
    """
    moments = (len(TIMES), len(VIEWS_DEG))
    mine, true = (
        torch.cat([frames.smooth.rgb, frames.smooth.opacity], dim=-1).unflatten(0, moments)
        for frames in (ours, theirs)
    )
    places = group.unflatten(0, moments)
    found = {}
    for n in range(centroids.shape[1]):
        away = centroids[:, n] - centroids[:, n].mean(dim=0)
        if away.square().sum(dim=-1).mean().sqrt() >= MOVES:
            window = _wide((places == n).any(dim=0))
            costs = torch.stack(
                [((true - moment) * window[..., None]).square().flatten(1).sum(1) for moment in mine]
            )
            track = away[costs.argmin(dim=1)]
            found[n] = metrics.pearson((track - track.mean(dim=0)).flatten(), away.flatten()) or 0.0
    return found


def face_scores(prompt: CreaturePrompt, around: Frames, supersample: int = 2) -> Float[Tensor, "A"]:
    """How much of the face, as seen from straight ahead, each of ``AROUND_DEG`` shows, 0..1.

    In the face's place in the image: how much nearer to the true creature's front than a faceless one's is.
    """
    creature = CREATURES[prompt.creature]
    ahead = orbit(TIMES[:1], AROUND_DEG[:1], "cpu")
    (front, _), (bare, _) = (
        _truth(prompt, one, ahead, supersample) for one in (creature, _faceless(creature))
    )
    face = _blurred(front.rgb - bare.rgb)
    where = face.norm(dim=-1, keepdim=True) > FACE * face.norm(dim=-1).amax()
    seen = _blurred((around.rgb - bare.rgb) * around.inside[..., None])
    missing = ((seen - face) * where).square().flatten(1).sum(dim=1)
    return (1 - missing / (face * where).square().sum()).clamp(0, 1)


def ground_truth(prompt: CreaturePrompt, supersample: int = 2) -> Render:
    """The true scene of a creature as a renderer."""

    def render(cameras: Cameras) -> tuple[Tensor, Tensor]:
        seen, _ = _truth(prompt, CREATURES[prompt.creature], cameras, supersample)
        return seen.rgb, seen.opacity

    return render


def _truth(
    prompt: CreaturePrompt, creature: Creature, cameras: Cameras, supersample: int
) -> tuple[Frames, Int[Tensor, "F H W"]]:
    """Frames, and the group seen in each pixel (-1: none)."""
    background = torch.tensor(BACKGROUND).expand(len(cameras), 3)
    posed = bodies(creature, prompt.gesture, cameras.times, _colour(prompt, cameras))
    rgb, opacity, part = render_bodies(posed, cameras, background, supersample=supersample)
    names = _names(creature)
    of_part = torch.tensor([*(names.index(name) for name in groups(creature)), -1])
    return Frames(rgb=rgb, opacity=opacity), of_part[part]


def _centroids(prompt: CreaturePrompt, creature: Creature) -> Float[Tensor, "T G 3"]:
    centres = bodies(creature, prompt.gesture, torch.tensor(TIMES)).centres
    names = groups(creature)
    chosen = [
        torch.tensor([n for n, name in enumerate(names) if name == group]) for group in _names(creature)
    ]
    return torch.stack([centres[:, parts].mean(dim=1) for parts in chosen], dim=1)


def _colour(prompt: CreaturePrompt, cameras: Cameras) -> Float[Tensor, "F 3"] | None:
    return None if prompt.colour is None else torch.tensor(COLOUR_RGB[prompt.colour]).expand(len(cameras), 3)


def _names(creature: Creature) -> tuple[str, ...]:
    return tuple(dict.fromkeys(groups(creature)))


@lru_cache
def _faceless(creature: Creature) -> Creature:
    return replace(creature, parts=tuple(part for part in creature.parts if part.group != "face"))


def _blurred(images: Float[Tensor, "F H W C"]) -> Float[Tensor, "F H W C"]:
    return avg_pool2d(images.movedim(-1, 1), FACE_BLUR, stride=1, padding=FACE_BLUR // 2).movedim(1, -1)


def _wide(mask: Bool[Tensor, "A H W"], pixels: int = 2) -> Bool[Tensor, "A H W"]:
    size = 2 * pixels + 1
    return max_pool2d(mask.float(), size, stride=1, padding=pixels) > 0


def _mean(values: Iterable[float]) -> float:
    known = [*values]
    return sum(known) / len(known)
