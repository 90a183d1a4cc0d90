"""Warnings of scenes that have come to nothing, from the frames that validations and tests render anyway.

F frames of H x W pixels.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.callbacks.base import Callback, Run
from fourdfy.callbacks.curves import Curves
from fourdfy.data.base import EvalBatch
from fourdfy.types import RenderOutput

logger = logging.getLogger(__name__)

STRIDE = 4
"""Every so many rows and columns are looked at."""
EMPTY = 0.001
"""Mean opacity below which nothing is to be seen. Objects of the shapes world have 0.05 to 0.3."""
FOG = 0.2
"""Opacity that 19 of 20 pixels exceed if the whole cube is filled; an object leaves some background."""
STILL = 0.05
"""Change of the most changing pixel, of 0..1, below which no motion is to be seen."""


MOVING = 100
"""Steps that a motion takes to show, at least."""
MOTION = "validation/motion"
"""The curve of ``motion`` over the validations of a dynamic stage."""


class SceneWatch(Callback):
    """Warns of a scene that is empty, that fills all of space, or that does not move although half of a
    dynamic stage is over; of each once.

    Args:
        curves: shows how much a dynamic scene moves, at each validation.
    """

    def __init__(self, curves: Curves | None = None) -> None:
        self._curves = curves
        self._rgb: dict[str, list[Tensor]] = defaultdict(list)
        self._opacity: list[Tensor] = []
        self._told: set[str] = set()

    def after_frames(self, run: Run, batch: EvalBatch, frames: RenderOutput, **progress: int) -> None:
        self._rgb[batch.split].append(frames.comp_rgb[:, ::STRIDE, ::STRIDE].cpu())
        self._opacity.append(frames.opacity[:, ::STRIDE, ::STRIDE].cpu())

    def after_validation(self, run: Run) -> None:
        rgb = {split: torch.cat(frames) for split, frames in self._rgb.items()}
        problems = [filling(torch.cat(self._opacity))] if self._opacity else []
        moved = motion(rgb)
        if self._curves and moved is not None and "val_video" in rgb:
            self._curves.scalars({MOTION: moved}, run.step - 1)
        if run.step >= max(MOVING, run.max_steps / 2) and moved is not None:
            problems.append(stillness(moved))
        for problem in problems:
            if problem and problem not in self._told:
                logger.warning("step %d: %s", run.step, problem)
                self._told.add(problem)
        self._rgb.clear()
        self._opacity.clear()

    after_test = after_validation


def filling(opacity: Float[Tensor, "F H W 1"]) -> str:
    """What to say of a scene that is nowhere or everywhere; "" of others."""
    if opacity.mean() < EMPTY:
        return (
            "the scene is empty; lower system.loss.lambda_sparsity or the learning rates "
            "(system.optimizer.params), or raise system.geometry.density_blob_scale"
        )
    values = opacity.flatten().sort().values
    if values[len(values) // 20] > FOG:
        return (
            "fog fills the whole scene; raise system.loss.lambda_sparsity, lower "
            "system.geometry.density_blob_scale, or set system.background.random_aug=true"
        )
    return ""


def motion(rgb: Mapping[str, Float[Tensor, "F H W 3"]]) -> float | None:
    """How much the most changing pixel of a dynamic scene changes, 0..1; None for a static one.

    Args:
        rgb: frames by their split. ``val_video`` is seen by one camera; ``test_static`` are the views of
            ``test``, all at time 0.
    """
    clip, at_rest = rgb.get("val_video", rgb.get("test")), rgb.get("test_static")
    if "val_video" in rgb:
        at_rest = rgb["val_video"][:1]
    return None if clip is None or at_rest is None else float((clip - at_rest).abs().max())


def stillness(moved: float) -> str:
    """What to say of a dynamic scene by its ``motion``; "" of one that moves."""
    if moved >= STILL:
        return ""
    return (
        "the scene does not move; raise data.single_view.prob_single_view_video, "
        "system.loss.lambda_sds_video or system.guidance_video.motion_amp_scale"
    )
