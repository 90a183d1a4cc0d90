"""Logging of a training run: TensorBoard, a CSV file and, if enabled, Weights & Biases.

A resumed run continues the earlier curves: their points from its first step on are dropped, and the
checkpoint holds the sums of the point that was not complete. So nothing is logged twice or lost. Points are
written once their numbers have come from the GPU, while it computes a later step.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import deque
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from fourdfy.callbacks.base import Callback, Means, Run
from fourdfy.config import ConfigError
from fourdfy.files.atomic import by_product, whole_file
from fourdfy.files.images import VALIDATION_FPS

FLUSH_SECONDS = 10
"""How long TensorBoard's points may wait to be seen."""

MAX_PIXELS = 256
"""Most pixels of a logged image or clip along its longer side; larger ones lose rows and columns."""


class Curves(Callback):
    """Every so many steps, and after the last: for each kind of step that came since the last point the mean
    of its scalars; and the learning rates. What can't be written costs a warning.

    Args:
        wandb: settings of Weights & Biases, see ``system.loggers.wandb``.
        values: the config, for Weights & Biases.

    Raises:
        ConfigError: Weights & Biases is asked for and can't be imported.
    """

    def __init__(self, folder: Path, every_n_steps: int, wandb: Any, values: Mapping[str, Any]) -> None:
        self.folder, self.every_n_steps = folder, every_n_steps
        self.wandb, self.values = wandb, values
        if wandb.enable:
            try:
                import_module("wandb")
            except ImportError as error:
                raise ConfigError(
                    f"system.loggers.wandb.enable=true: {error}; pip install wandb, or set it to false"
                ) from error
        self.writers: list[Any] = []
        self._points: deque[tuple[int, Means, dict[str, float]]] = deque()

    def begin(self, run: Run) -> None:
        self.writers = []
        for kind, folder in ((TensorBoard, "tb_logs"), (CsvFile, "csv_logs")):
            with by_product("curves"):
                self.writers.append(kind(self.folder / folder, run.step))
        if self.wandb.enable:
            self.writers.append(WeightsAndBiases(self.folder, self.wandb, self.values))

    def after_step(self, run: Run, *args: Any) -> None:
        if run.step % self.every_n_steps == 0 or run.step == run.max_steps:
            groups = run.optimizer.param_groups if run.optimizer else ()
            rates = {f"lr/{group['name']}": group["lr"] for group in groups}
            self._points.append((run.step - 1, run.means.take(), rates))
        while self._points and self._points[0][1].is_ready:
            self._write_next()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a checkpoint is about to be written, so everything before it is on disk now."""
        self._flush()
        return {}

    def _write_next(self) -> None:
        step, means, rates = self._points.popleft()
        scalars = {**means, **rates}
        for writer in self.writers:
            with by_product("curves"):
                writer.scalars(scalars, step)

    def _flush(self) -> None:
        while self._points:
            self._write_next()
        for writer in self.writers:
            with by_product("curves"):
                writer.flush()

    def images(self, name: str, frames: UInt8[ndarray, "F H W 3"], step: int) -> None:
        """Log one frame as an image or several as a clip; do nothing outside of a run."""
        stride = -(-max(frames.shape[1:3]) // MAX_PIXELS)
        for writer in self.writers:
            writer.images(name, frames[:, ::stride, ::stride], step)

    def end(self, *args: Any) -> None:
        self._flush()
        for writer in self.writers:
            with by_product("curves"):
                writer.close()
        self.writers = []


class TensorBoard:
    """``version_0`` of a folder, as Lightning names it."""

    def __init__(self, folder: Path, start: int) -> None:
        self.writer = SummaryWriter(folder / "version_0", purge_step=start, flush_secs=FLUSH_SECONDS)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._add([Summary.Value(tag=name, simple_value=value) for name, value in values.items()], step)

    def images(self, name: str, frames: UInt8[ndarray, "F H W 3"], step: int) -> None:
        height, width = frames.shape[1:3]
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded(frames))
        self._add([Summary.Value(tag=name, image=image)], step)

    def _add(self, values: list[Summary.Value], step: int) -> None:
        self.writer._get_file_writer().add_summary(Summary(value=values), step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class CsvFile:
    """``version_0/metrics.csv``: a row for each logged step, a column for each scalar ever logged."""

    def __init__(self, folder: Path, start: int) -> None:
        self.path = folder / "version_0" / "metrics.csv"
        self.columns = ["step"]
        self._rewrite(
            [row for row in self._rows() if (row["step"] or "").isdecimal() and int(row["step"]) < start]
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        row = {**values, "step": step}
        if row.keys() - set(self.columns):
            self._rewrite([*self._rows(), row])
            return
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def images(self, name: str, frames: UInt8[ndarray, "F H W 3"], step: int) -> None:
        """Do nothing: a table can't hold images."""

    def flush(self) -> None:
        """Do nothing: no file is open."""

    close = flush

    def _rows(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with open(self.path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        self.columns = sorted({"step"}.union(*rows))
        with (
            whole_file(self.path) as half_written,
            open(half_written, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)


class WeightsAndBiases:
    """A run of wandb for each trial; a resumed trial continues its run."""

    def __init__(self, trial: Path, cfg: Any, values: Mapping[str, Any]) -> None:
        import wandb

        self.wandb = wandb
        try:
            self.run = wandb.init(
                project=cfg.project,
                name=cfg.name or f"{trial.parent.name}/{trial.name}",
                id=hashlib.blake2b(str(trial.resolve()).encode(), digest_size=8).hexdigest(),
                resume="allow",
                dir=str(trial),
                config=dict(values),
            )
        except Exception as error:  # no account or network; before the first step, so nothing is lost
            raise ConfigError(
                f"system.loggers.wandb: {error}; WANDB_MODE=offline needs no account, enable=false no wandb"
            ) from error
        # wandb's own steps only grow; after a crash ours start again at the checkpoint.
        self.run.define_metric("global_step")
        self.run.define_metric("*", step_metric="global_step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log({**values, "global_step": step})

    def images(self, name: str, frames: UInt8[ndarray, "F H W 3"], step: int) -> None:
        if len(frames) == 1:
            picture = self.wandb.Image(frames[0])
        else:
            picture = self.wandb.Video(io.BytesIO(encoded(frames)), format="gif")
        self.run.log({name: picture, "global_step": step})

    def flush(self) -> None:
        """Do nothing: wandb sends by itself."""

    def close(self) -> None:
        self.run.finish()


def encoded(frames: UInt8[ndarray, "F H W 3"]) -> bytes:
    """One frame as PNG, or several as an endless GIF."""
    from PIL import Image

    first, *others = (Image.fromarray(np.ascontiguousarray(frame)) for frame in frames)
    file = io.BytesIO()
    if others:
        first.save(file, "GIF", save_all=True, append_images=others, duration=1000 // VALIDATION_FPS, loop=0)
    else:
        first.save(file, "PNG")
    return file.getvalue()
