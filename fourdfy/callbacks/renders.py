"""What evaluation renders, saved under the original's file names."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from fourdfy.callbacks import saving
from fourdfy.data.datamodule import EvalBatch
from fourdfy.ops.compositing import expected_depth
from fourdfy.types import RenderOutput


class SaveRenders(pl.Callback):
    """Gathers the frames of each split ("val", "val_video", "test", "test_static") and writes them."""

    def __init__(self, save_dir: Path) -> None:
        self.save_dir = save_dir
        self._images: dict[str, dict[str, list[Tensor]]] = defaultdict(dict)

    def _gather(self, trainer: Any, system: Any, outputs: RenderOutput, batch: EvalBatch, *args: Any) -> None:
        images = {
            "rgb": outputs.comp_rgb,
            "normal": outputs.comp_normal,
            "opacity": outputs.opacity,
            "depth": expected_depth(outputs.opacity, outputs.depth),
        }
        for name, image in images.items():
            if image is not None:
                self._images[batch.split].setdefault(name, []).extend(image.cpu())

    on_validation_batch_end = _gather
    on_test_batch_end = _gather

    def on_validation_epoch_end(self, trainer: pl.Trainer, system: Any) -> None:
        views, clip = self._shown("val"), self._shown("val_video")
        for index, images in enumerate(zip(*views, strict=True)):
            saving.save_validation(self.save_dir, system.step, index, images)
        if clip:
            saving.save_validation_video(self.save_dir, system.step, 0, [torch.stack(x) for x in clip])
        self._images.clear()

    def on_test_epoch_end(self, trainer: pl.Trainer, system: Any) -> None:
        for split in ("test", "test_static"):
            images = self._images[split]
            for name, kind in (("rgb", split), ("normal", split.replace("test", "test-normal"))):
                for index, image in enumerate(images.get(name, [])):
                    saving.save_test_frame(self.save_dir, system.step, index, image, kind=kind)
                if name in images:
                    saving.save_test_video(self.save_dir, system.step, kind=kind)
        if depths := self._images["test"].get("depth"):
            saving.save_depths(self.save_dir, system.step, depths)
        self._images.clear()

    def _shown(self, split: str) -> list[list[Tensor]]:
        """The images that validation shows side by side, as far as there are any."""
        images = self._images[split]
        return [images[name] for name in ("rgb", "normal", "opacity") if name in images]
