"""The front mark of the shapes world: where it is seen from, and how many there are (Janus faces).

The mark is a white disc with a dark pupil on a saturated body. A view shows a front where the middle
of its silhouette holds as much white and as much dark as the ground truth shows from straight ahead.

F frames, H x W pixels, A evenly spaced azimuths around the object, T moments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MIN_CHROMA = 0.2
"""Channels of a coloured pixel are this far apart at least. The palest body of the world, green in
full shade, has 0.28; white and pupil have 0.02."""

MIDDLE = 0.7
"""Half width of the silhouette's middle in standard deviations of its columns, a third of a ball's
radius: 45 degrees off the front the pupil is (nearly, on a cube) out of it, so that faces at right
angles stay apart."""

SEEN = 0.3
"""A front shows at least this share of the true mark from somewhere. Measured over all shapes: the
truth between two of 24 azimuths 0.8, blurred by half a pupil 0.6, an unmarked object in noise 0.05."""

VALLEY = 0.6
"""Between two fronts the score falls below this share of the lower one. Measured over all shapes with
four faces: at most 0.2, and 0.46 with a blur of one pixel and noise."""

LIGHT = 0.6
"""Greys above are white, below dark: the world's are 0.98 and 0.05, and a pupil blurred by half its
radius reaches 0.55."""

SKIP_DEG = 75.0
"""A moment is left out of a track if that shortens it by more than this: an angle that is wrong by
less can not make ``wrap`` miss a turn, as the truth moves 30 degrees between moments."""


def foreground_colour(
    rgb: Float[Tensor, "F H W 3"], opacity: Float[Tensor, "F H W 1"], background: Float[Tensor, "3"]
) -> Float[Tensor, "F H W 3"]:
    """The colour that was composited over ``background``, 0..1; meaningless where opacity is near 0."""
    return ((rgb - (1 - opacity) * background) / opacity.clamp_min(1e-3)).clamp(0, 1)


def body_colour(colours: Float[Tensor, "F H W 3"], inside: Bool[Tensor, "F H W"]) -> Float[Tensor, "3"]:
    """Median colour of the silhouette's coloured pixels, which leaves white and dark marks out.

    The median is over all its pixels if fewer than a tenth are coloured; an empty silhouette is black.
    """
    pixels = colours[inside]
    coloured = pixels[chroma(pixels) > MIN_CHROMA]
    if 10 * len(coloured) >= len(pixels):
        pixels = coloured
    return pixels.median(dim=0).values if len(pixels) else colours.new_zeros(3)


def chroma(colours: Float[Tensor, "*F 3"]) -> Float[Tensor, "*F"]:
    """Largest less smallest channel: 0 for greys."""
    return colours.amax(dim=-1) - colours.amin(dim=-1)


def visible_mark(
    colours: Float[Tensor, "F H W 3"], inside: Bool[Tensor, "F H W"], body: Float[Tensor, "3"]
) -> Float[Tensor, "F 2"]:
    """White and dark pixels in the silhouette's middle, as shares of the silhouette."""
    if chroma(body) < MIN_CHROMA:  # on a grey body no mark could be recognised
        return colours.new_zeros(len(colours), 2)
    # Nearer to the greys than to the shades of the body (0.6 to 1.4 of the median, as in the world).
    shade = ((colours @ body) / body.square().sum()).clamp(0.6, 1.4)[..., None]
    grey = colours.mean(dim=-1, keepdim=True)
    unsaturated = (colours - grey).norm(dim=-1) < (colours - shade * body).norm(dim=-1)
    mark = unsaturated & inside & _middle(inside)
    light = grey[..., 0] > LIGHT
    counts = torch.stack([(mark & light).sum(dim=(1, 2)), (mark & ~light).sum(dim=(1, 2))], dim=-1)
    return counts / inside.sum(dim=(1, 2)).clamp_min(1)[:, None]


def front_scores(visible: Float[Tensor, "F 2"], straight_ahead: Float[Tensor, "2"]) -> Float[Tensor, "F"]:
    """How much of the mark each frame shows, 0..1; white without dark, or dark without white, is 0."""
    return (visible / straight_ahead.clamp_min(1e-6)).clamp(max=1).amin(dim=-1)


def fronts(scores: Float[Tensor, "A"]) -> list[float]:
    """Azimuths (degrees, 0..360) of the fronts seen around the object.

    A front is a peak that reaches ``SEEN``, set off from the next by a valley below ``VALLEY`` times
    the lower of the two: four faces at right angles leave deep valleys that never reach 0, and noise
    on one front leaves shallow ones. An object that shows its mark from everywhere has no front.
    The azimuth is the mean of the views around the peak weighted by score, finer than their spacing.
    """
    values, start = scores.tolist(), int(scores.argmin())
    found: list[float] = []
    peak_at, valley = start, values[start]
    climbing = False
    for k in range(start, start + len(values) + 1):
        value = values[k % len(values)]
        if climbing and value > values[peak_at % len(values)]:
            peak_at = k
        elif climbing and value < VALLEY * values[peak_at % len(values)]:
            if values[peak_at % len(values)] >= SEEN:
                found.append(_peak_azimuth(values, peak_at))
            climbing, valley = False, value
        elif not climbing and VALLEY * value > valley:
            climbing, peak_at = True, k
        elif not climbing:
            valley = min(valley, value)
    return found


def angle_track(candidates: Sequence[Sequence[float]]) -> Float[Tensor, "T"]:
    """Unwrapped angle (degrees) of one front over T moments; NaN where it was not seen or left out.

    The shortest way through one candidate per moment, where leaving a moment out costs ``SKIP_DEG``:
    an object with two faces is followed along one of them, and a single wrong detection, which
    would add a whole turn to all that follows, is left out.

    Args:
        candidates: for each moment the fronts' azimuths, as returned by ``fronts``.
    """
    seen = [(moment, angles) for moment, angles in enumerate(candidates) if angles]
    nodes = [(place, moment, angle) for place, (moment, angles) in enumerate(seen) for angle in angles]
    ways: list[tuple[float, list[tuple[int, float]]]] = []  # the shortest to each node: its cost and steps
    for place, moment, angle in nodes:
        costs: list[tuple[float, list[tuple[int, float]]]] = [(SKIP_DEG * place, [])] + [
            (cost + abs(wrap(angle - other)) + SKIP_DEG * (place - before - 1), steps)
            for (before, _, other), (cost, steps) in zip(nodes, ways, strict=False)
            if before < place
        ]
        cost, steps = min(costs, key=itemgetter(0))
        ways.append((cost, [*steps, (moment, angle)]))
    ends = [
        (cost + SKIP_DEG * (len(seen) - place - 1), steps)
        for (place, _, _), (cost, steps) in zip(nodes, ways, strict=True)
    ]
    track = torch.full((len(candidates),), math.nan)
    previous = None
    for moment, angle in min(ends, key=itemgetter(0), default=(0, []))[1]:
        track[moment] = wrap(angle) if previous is None else previous + wrap(angle - previous)
        previous = float(track[moment])
    return track


def _peak_azimuth(values: Sequence[float], peak_at: int) -> float:
    spacing = 360 / len(values)
    reach = int(30 / spacing)
    near = range(peak_at - reach, peak_at + reach + 1)
    weights = [values[k % len(values)] for k in near]
    return sum(w * k for w, k in zip(weights, near, strict=True)) / sum(weights) * spacing % 360


def wrap(angle_deg: float) -> float:
    """The angle in [-180, 180)."""
    return (angle_deg + 180) % 360 - 180


def _middle(inside: Bool[Tensor, "F H W"]) -> Bool[Tensor, "F H W"]:
    """The columns within ``MIDDLE`` standard deviations of each silhouette's mean column."""
    weights = inside.sum(dim=1).float()
    columns = torch.arange(inside.shape[2], device=inside.device)
    total = weights.sum(dim=1, keepdim=True).clamp_min(1)
    centre = (weights * columns).sum(dim=1, keepdim=True) / total
    spread = ((weights * (columns - centre).square()).sum(dim=1, keepdim=True) / total).sqrt()
    return ((columns - centre).abs() <= MIDDLE * spread)[:, None, :].expand_as(inside)
