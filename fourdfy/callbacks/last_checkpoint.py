"""``ckpts/last.ckpt``, kept fresh."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytorch_lightning as pl


class LastCheckpoint(pl.Callback):
    """Keeps ``last.ckpt`` fresh: every so many steps, at the end, and when the process is told to stop."""

    def __init__(self, path: Path, every_n_train_steps: int) -> None:
        self.path = path
        self.every_n_train_steps = every_n_train_steps
        self.signal: int | None = None
        """The signal that ended the run early, if one did."""
        self._saved_step = -1
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step = trainer.global_step
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._stop_after_step)

    def _stop_after_step(self, number: int, frame: Any) -> None:
        if self.signal is not None:  # asked twice: the user does not want to wait for the step
            raise KeyboardInterrupt
        self.signal = number

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.signal is not None or trainer.global_step % self.every_n_train_steps == 0:
            self._save(trainer)
        trainer.should_stop |= self.signal is not None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)
        self._restore_handlers()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._restore_handlers()

    def _save(self, trainer: pl.Trainer) -> None:
        if self._saved_step != trainer.global_step:
            trainer.save_checkpoint(self.path, weights_only=False)  # the optimizer too
            self._saved_step = trainer.global_step

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
