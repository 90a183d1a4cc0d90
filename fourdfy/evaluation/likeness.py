"""Metrics that ask CLIP or X-CLIP whether the views show what the prompt says.

N azimuths, T texts.
"""

from __future__ import annotations

from statistics import fmean

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fourdfy.evaluation.registry import metric
from fourdfy.evaluation.views import Views

SIDES = ("front", "side", "back")
APART = 2
"""Views that do not show a front, between two fronts that count as two."""


@metric("highest", "clip")
def clip_score(views: Views) -> float:
    """100 times the mean cosine of CLIP's vectors of the orbit's views and of the prompt; real pictures of
    what a text says have about 30 (Hessel et al. 2021, without its factor; as in 4D-fy's tables)."""
    return 100 * float(_cosines(views, [views.prompt]).mean())


@metric("highest", "clip")
def clip_r_precision(views: Views) -> float:
    """Share of the orbit's views, 0..1, for which CLIP finds the scene's own prompt among all captions
    (Park et al. 2021; Jain et al. 2022). It depends on the captions, which the report names."""
    captions = list(dict.fromkeys([views.prompt, *views.captions]))
    return float((_cosines(views, captions).argmax(dim=-1) == 0).float().mean())


@metric("highest", "xclip")
def xclip_score(views: Views) -> float | None:
    """100 times the mean cosine of X-CLIP's vectors of the clips and of the prompt (Ni et al. 2022); None of
    a still."""
    judge = views.networks("xclip") if views.clips else None
    return 100 * fmean(judge.video_similarity(c.rgb, views.prompt) for c in views.clips) if judge else None


@metric("lowest", "clip")
def clip_fronts(views: Views) -> int:
    """Fronts that CLIP sees around the object: 1 is right, 2 or more is the Janus problem, 0: it sees none.

    A view shows the front if CLIP prefers "front view of PROMPT" to its side and back views. A heuristic:
    CLIP knows the front of a face better than that of a chair.
    """
    return separate_runs(_is_front(views), APART)


def separate_runs(marked: Bool[Tensor, "N"], apart: int) -> int:
    """Runs of what is marked, on a circle, with at least so many unmarked ones between them."""
    values = marked.tolist()
    if not any(values):
        return 0
    start = values.index(True)
    gaps, gap = 0, 0
    for value in [*values[start + 1 :], *values[: start + 1]]:
        gaps += value and gap >= apart
        gap = 0 if value else gap + 1
    return max(1, gaps)


def _is_front(views: Views) -> Bool[Tensor, "N"]:
    judge = views.networks("clip")
    texts = judge.texts([f"{side} view of {views.prompt}" for side in SIDES])
    return (judge.images(views.around.rgb) @ texts.T).argmax(dim=-1) == SIDES.index("front")


def _cosines(views: Views, texts: list[str]) -> Float[Tensor, "N T"]:
    judge = views.networks("clip")
    vectors = torch.cat([judge.images(rgb) for rgb in views.orbit.rgb.split(32)])
    return vectors @ judge.texts(texts).T
