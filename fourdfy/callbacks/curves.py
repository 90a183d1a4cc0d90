"""Logging of a training run: TensorBoard, a CSV file and, if enabled, Weights & Biases.

A resumed run continues the earlier curves: their points from its first step on are dropped, and the
checkpoint holds the sums of the point that was not complete. So nothing is logged twice or lost. Points are
written once their numbers have come from the GPU, while it computes a later step.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from fourdfy.callbacks.base import Callback, Means, Run
from fourdfy.config import ConfigError
from fourdfy.files.atomic import by_product, lost, write_whole, writing
from fourdfy.files.images import VALIDATION_FPS

WHAT = "curves"

DENSE = 10_000
"""Points of a curve that are as dense as asked for; then there are half as many for as many steps again, and
so on: the files grow by half of this each time the run gets twice as long."""

MAX_PIXELS = 256
"""Most pixels of a logged image or clip along its longer side; larger ones lose rows and columns."""


class Curves(Callback):
    """Every so many steps (see ``interval``), and after the last: for each kind of step that came since the
    last point the mean of its scalars; and the learning rates. What can't be written costs a warning.

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
            with by_product(WHAT):
                self.writers.append(kind(self.folder / folder, run.step))
        if self.wandb.enable:
            self.writers.append(WeightsAndBiases(self.folder, self.wandb, self.values))

    def after_step(self, run: Run, *args: Any) -> None:
        if run.step % interval(run.step, self.every_n_steps) == 0 or run.step == run.max_steps:
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
        self._tell(lambda writer: writer.scalars(scalars, step))

    def _flush(self) -> None:
        while self._points:
            self._write_next()

    def _tell(self, call: Callable[[Any], None]) -> None:
        for writer in self.writers:
            with by_product(WHAT):
                call(writer)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers that come seldom, at once; do nothing outside of a run."""
        self._flush()
        self._tell(lambda writer: writer.scalars(values, step))

    def images(self, name: str, frames: UInt8[ndarray, "F H W 3"], step: int) -> None:
        """Log one frame as an image or several as a clip, until ``close``; nothing if none was trained."""
        stride = -(-max(frames.shape[1:3]) // MAX_PIXELS)
        self._tell(lambda writer: writer.images(name, frames[:, ::stride, ::stride], step))

    def end(self, *args: Any) -> None:
        self._flush()

    def close(self) -> None:
        """The test views are rendered too."""
        self._tell(lambda writer: writer.close())
        self.writers = []


_event_files = itertools.count()


def interval(step: int, every_n_steps: int) -> int:
    """Steps between the points of a curve at ``step``; see ``DENSE``."""
    return every_n_steps << ((step - 1) // (every_n_steps * DENSE)).bit_length()


class TensorBoard:
    """An event file in ``version_0`` of a folder, as Lightning names it.

    Written here and at once: TensorBoard's own writer has a thread, whose errors nobody can catch.
    """

    def __init__(self, folder: Path, start: int) -> None:
        # Readers sort files by their names.
        writer = f"{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}.{next(_event_files):04}"
        self.path = folder / "version_0" / f"events.out.tfevents.{writer}"
        write_whole(self.path, b"")
        self._add(start, file_version="brain.Event:2")
        # What a crashed run has logged from here on no longer counts.
        self._add(start, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step, summary=Summary(value=points))

    def images(self, name: str, frames: UInt8[ndarray, "F H W 3"], step: int) -> None:
        height, width = frames.shape[1:3]
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded(frames))
        self._add(step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))

    def _add(self, step: int, **content: Any) -> None:
        event = Event(wall_time=time.time(), step=step, **content)
        _warn_if_removed(self.path)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                RecordWriter(file).write(event.SerializeToString())

    def close(self) -> None:
        """Do nothing: no file is open."""


class CsvFile:
    """``version_0/metrics.csv``: a row for each logged step, a column for each scalar ever logged."""

    def __init__(self, folder: Path, start: int) -> None:
        self.path = folder / "version_0" / "metrics.csv"
        self.columns, self._last = ["step"], -1
        self._rewrite([row for row in self._rows() if int(row["step"]) < start])

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        row = {**values, "step": step}
        _warn_if_removed(self.path)
        last, self._last = self._last, step
        if step == last and (rows := self._rows()):  # what comes seldom comes after the others
            self._rewrite([*rows[:-1], rows[-1] | row])
            return
        if row.keys() - set(self.columns) or not self.path.exists():
            self._rewrite([*self._rows(), row])
            return
        with writing(self.path), open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def images(self, name: str, frames: UInt8[ndarray, "F H W 3"], step: int) -> None:
        """Do nothing: a table can't hold images."""

    def close(self) -> None:
        """Do nothing: no file is open."""

    def _rows(self) -> list[dict[str, Any]]:
        """The rows that are whole: a full disk may have cut some."""
        if not self.path.exists():
            return []
        with open(self.path, newline="", encoding="utf-8", errors="replace") as file:
            lines = [line for line in file if line.endswith("\n")]
        rows = csv.DictReader(lines)
        return [row for row in rows if None not in row and (row["step"] or "").isdecimal()]

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        self.columns = sorted({"step"}.union(*rows))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.path, text.getvalue())


def _warn_if_removed(path: Path) -> None:
    if not path.exists():
        lost(WHAT, f"{path} was removed; it begins anew")


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
