"""One live line: stage, step, percent, time left, steps/s, losses, memory."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import pytorch_lightning as pl
import torch

from fourdfy.systems.lightning import LightningSystem

REDRAW_SECONDS = {True: 0.5, False: 15.0}
"""On a terminal the line is redrawn in place; in a log a new one is written now and then."""


class ProgressLine(pl.Callback):
    """Writes to stderr; ``label`` opens the line, e.g. ``stage 1/3 shapes_stage_1``."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._live = sys.stderr.isatty()
        self._began = self._drawn = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = self._drawn = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LightningSystem, *args: Any) -> None:
        now = time.monotonic()
        due = now - self._drawn >= REDRAW_SECONDS[self._live]
        if due and trainer.global_step < trainer.max_steps:  # the last line is on_train_end's
            self._drawn = now
            self._write(self._line(trainer, pl_module, now), end="")

    def on_train_end(self, trainer: pl.Trainer, pl_module: LightningSystem) -> None:
        self._write(self._line(trainer, pl_module, time.monotonic()), end="\n" if self._live else "")

    def _line(self, trainer: pl.Trainer, module: LightningSystem, now: float) -> str:
        step, last = trainer.global_step, trainer.max_steps
        rate = (step - self._first_step) / max(now - self._began, 1e-6)
        left = (last - step) / rate if rate else 0.0
        losses = "  ".join(
            f"{name.removeprefix('loss/')} {value:.3g}"
            for name, value in sorted(module.means.read().items())
            if name.startswith("loss/")
        )
        return (
            f"{self.label}  step {step}/{last}  {100 * step // last}%  "
            f"eta {_clock(left)}  {rate:.2f} steps/s  {losses}  {_memory()}"
        )

    def _write(self, line: str, end: str) -> None:
        sys.stderr.write(f"\r\x1b[2K{line}{end}" if self._live else f"{line}\n")
        sys.stderr.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _memory() -> str:
    """The peak: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    scale = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30:.1f} GiB"
