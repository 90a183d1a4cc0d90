"""Saving of what evaluation renders, under the original's file names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from fourdfy.callbacks.base import Callback, Run
from fourdfy.callbacks.curves import Curves
from fourdfy.data.base import EvalBatch
from fourdfy.files import atomic, images
from fourdfy.files.evaluations import TEST, VALIDATION, record_evaluation
from fourdfy.ops.compositing import expected_depth
from fourdfy.types import RenderOutput


class SaveRenders(Callback):
    """Gathers the frames of each split ("val", "val_video", "test", "test_static") and writes them.

    Args:
        curves: shows validation images, and the clips of validation and test, too.
        trained: the scene is trained in this run; what can't be written then costs a warning.

    Raises:
        WriteError: they can't be written, and writing them is all that was asked for.
    """

    def __init__(self, save_dir: Path, curves: Curves | None = None, *, trained: bool = False) -> None:
        self.save_dir, self.curves, self.is_essential = save_dir, curves, not trained
        self._images: dict[str, dict[str, list[Tensor]]] = defaultdict(dict)

    def after_frames(self, run: Run, batch: EvalBatch, frames: RenderOutput, **progress: int) -> None:
        views = {
            "rgb": frames.comp_rgb,
            "normal": frames.comp_normal,
            "opacity": frames.opacity,
            "depth": expected_depth(frames.opacity, frames.depth),
        }
        for name, image in views.items():
            if image is not None:
                self._images[batch.split].setdefault(name, []).extend(image.cpu())

    def after_validation(self, run: Run) -> None:
        with self._written("validation images", run, VALIDATION):
            views, clip = self._shown("val"), self._shown("val_video")
            for index, frames in enumerate(zip(*views, strict=True)):
                images.save_validation(self.save_dir, run.step, index, frames)
                self._log(f"val/{index}", frames[0][None], run.step - 1)
            if clip:
                clips = [torch.stack(frames) for frames in clip]
                images.save_validation_video(self.save_dir, run.step, 0, clips)
                self._log("val/video", clips[0], run.step - 1)

    def after_test(self, run: Run) -> None:
        with self._written("test images and videos (--test renders them again)", run, TEST):
            for split in ("test", "test_static"):
                shown = self._images[split]
                for name, kind in (("rgb", split), ("normal", split.replace("test", "test-normal"))):
                    if name in shown:
                        images.save_test(self.save_dir, run.step, shown[name], kind=kind)
            if clip := self._images["test"].get("rgb"):
                self._log("test/video", torch.stack(clip), run.step - 1)
            if depths := self._images["test"].get("depth"):
                images.save_depths(self.save_dir, run.step, depths)

    def _log(self, name: str, frames: Tensor, step: int) -> None:
        """Add to the curves, whose steps count from 0."""
        if self.curves is not None:
            self.curves.images(name, images.to_pixels(frames), step)

    @contextmanager
    def _written(self, what: str, run: Run, names: str) -> Iterator[None]:
        try:
            with nullcontext() if self.is_essential else atomic.by_product(what):
                yield
                if self.save_dir == run.folder / "save":
                    with atomic.by_product("the record of evaluations"):
                        record_evaluation(run.folder, names.format(run.step))
        finally:
            self._images.clear()

    def _shown(self, split: str) -> list[list[Tensor]]:
        """The images that validation shows side by side; those that the scene lacks are left out."""
        shown = self._images[split]
        return [shown[name] for name in ("rgb", "normal", "opacity") if name in shown]
