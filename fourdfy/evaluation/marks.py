"""The front mark of the shapes world: where it is seen from, and how many there are (Janus faces).

The mark is a white disc with a dark pupil on a saturated body. A view shows a front where the middle
of its silhouette holds as much white and as much dark as the ground truth shows from straight ahead.

F frames, H x W pixels, A evenly spaced azimuths around the object, T moments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import max_pool2d

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

TOLERANCE = 2
"""Pixels by which a mark may be out of place, and the width of the seam along edges where greys are
mixed by the edge and not painted."""

MARK_SEEN = 0.5
"""A mark is seen where it should be if at least this share of its white and of its dark is there."""

GHOST_GREYNESS = 0.4
"""A ghost may be fainter than a mark, which has 0.5. Measured on trained scenes: dirt along the edges of a
cube reaches 0.35, a pale spot where a mark was or will be 0.4 and more."""

GHOST_SEEN = 0.1
"""A ghost is seen if it has at least this share of the true mark's pixels."""


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


def painted(
    colours: Float[Tensor, "F H W 3"], inside: Bool[Tensor, "F H W"], body: Float[Tensor, "3"]
) -> Bool[Tensor, "F H W 2"]:
    """The white and the dark pixels of the silhouettes: nearer to the greys than to the body's shades."""
    grey = (greyness(colours, body) > 0.5) & inside
    light = colours.mean(dim=-1) > LIGHT
    return torch.stack([grey & light, grey & ~light], dim=-1)


def visible_mark(mark: Bool[Tensor, "F H W 2"], inside: Bool[Tensor, "F H W"]) -> Float[Tensor, "F 2"]:
    """White and dark pixels in the silhouette's middle, as shares of the silhouette."""
    counts = (mark & _middle(inside)[..., None]).sum(dim=(1, 2))
    return counts / inside.sum(dim=(1, 2)).clamp_min(1)[:, None]


def mark_in_place(mark: Bool[Tensor, "T A H W 2"], truth: Bool[Tensor, "T A H W 2"]) -> Float[Tensor, "T"]:
    """How much of the true mark is seen where it is, 0..1: the lesser of white and dark."""
    found = (mark & _wider(truth)).sum(dim=(1, 2, 3))
    return (found / truth.sum(dim=(1, 2, 3)).clamp_min(1)).clamp(max=1).amin(dim=-1)


def ghosts(
    greyness: Float[Tensor, "T A H W"], truth: Bool[Tensor, "T A H W 2"], body: Bool[Tensor, "T A H W"]
) -> Float[Tensor, "T"]:
    """Pixels that look like a mark where the true one is not, for each pixel of the true one.

    Args:
        body: where both objects are seen; its edges do not count.
    """
    elsewhere = ~_wider(truth.any(dim=-1, keepdim=True) | ~body[..., None])[..., 0]
    wrong = (greyness > GHOST_GREYNESS) & elsewhere
    return wrong.sum(dim=(1, 2, 3)) / truth.sum(dim=(1, 2, 3, 4)).clamp_min(1)


def greyness(colours: Float[Tensor, "F H W 3"], body: Float[Tensor, "3"]) -> Float[Tensor, "F H W"]:
    """How near a colour is to the greys, against the shades of the body: 1 for greys, 0 for the body.

    White and pupil are grey alike. On a grey body no mark could be recognised: then all are 0.
    """
    if chroma(body) < MIN_CHROMA:
        return torch.zeros_like(colours[..., 0])
    # 0.6 to 1.4 of the median are the body's shades, as in the world.
    shade = ((colours @ body) / body.square().sum()).clamp(0.6, 1.4)[..., None]
    from_grey = (colours - colours.mean(dim=-1, keepdim=True)).norm(dim=-1)
    from_body = (colours - shade * body).norm(dim=-1)
    return from_body / (from_body + from_grey).clamp_min(1e-6)


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


def _peak_azimuth(values: Sequence[float], peak_at: int) -> float:
    spacing = 360 / len(values)
    reach = int(30 / spacing)
    near = range(peak_at - reach, peak_at + reach + 1)
    weights = [values[k % len(values)] for k in near]
    return sum(w * k for w, k in zip(weights, near, strict=True)) / sum(weights) * spacing % 360


def wrap(angle_deg: float) -> float:
    """The angle in [-180, 180)."""
    return (angle_deg + 180) % 360 - 180


def _wider(mask: Bool[Tensor, "T A H W C"]) -> Bool[Tensor, "T A H W C"]:
    """Everything within ``TOLERANCE`` pixels, in rows and in columns."""
    planes = mask.movedim(-1, 2).flatten(0, 1).float()
    wide = max_pool2d(planes, 2 * TOLERANCE + 1, stride=1, padding=TOLERANCE) > 0
    return wide.unflatten(0, mask.shape[:2]).movedim(2, -1)


def _middle(inside: Bool[Tensor, "F H W"]) -> Bool[Tensor, "F H W"]:
    """The columns within ``MIDDLE`` standard deviations of each silhouette's mean column."""
    weights = inside.sum(dim=1).float()
    columns = torch.arange(inside.shape[2], device=inside.device)
    total = weights.sum(dim=1, keepdim=True).clamp_min(1)
    centre = (weights * columns).sum(dim=1, keepdim=True) / total
    spread = ((weights * (columns - centre).square()).sum(dim=1, keepdim=True) / total).sqrt()
    return ((columns - centre).abs() <= MIDDLE * spread)[:, None, :].expand_as(inside)
