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
from fourdfy.types import RenderOutput


class SaveRenders(pl.Callback):
    """Gathers the frames of each split ("val", "val_video", "test", "test_static") and writes them."""

    def __init__(self, save_dir: Path) -> None:
        self.save_dir = save_dir
        self._frames: dict[str, list[dict[str, Tensor]]] = defaultdict(list)

    def _gather(self, trainer: Any, system: Any, outputs: RenderOutput, batch: EvalBatch, *args: Any) -> None:
        self._frames[batch.split] += [
            {"rgb": rgb, "opacity": opacity, "depth": depth}
            for rgb, opacity, depth in zip(
                outputs.comp_rgb.cpu(), outputs.opacity.cpu(), outputs.depth.cpu(), strict=True
            )
        ]

    on_validation_batch_end = _gather
    on_test_batch_end = _gather

    def on_validation_epoch_end(self, trainer: pl.Trainer, system: Any) -> None:
        for index, frame in enumerate(self._frames["val"]):
            saving.save_validation(
                self.save_dir, system.step, index, rgb=frame["rgb"], opacity=frame["opacity"]
            )
        if clip := self._frames["val_video"]:
            saving.save_validation_video(
                self.save_dir,
                system.step,
                0,
                rgb=torch.stack([frame["rgb"] for frame in clip]),
                opacity=torch.stack([frame["opacity"] for frame in clip]),
            )
        self._frames.clear()

    def on_test_epoch_end(self, trainer: pl.Trainer, system: Any) -> None:
        for kind in ("test", "test_static"):
            for index, frame in enumerate(self._frames[kind]):
                saving.save_test_frame(self.save_dir, system.step, index, frame["rgb"], kind=kind)
            if self._frames[kind]:
                saving.save_test_video(self.save_dir, system.step, kind=kind)
        if self._frames["test"]:
            saving.save_depth_jet(self.save_dir, system.step, [f["depth"] for f in self._frames["test"]])
        self._frames.clear()
