"""``ckpts/last.ckpt``, kept fresh."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from fourdfy.callbacks.saving import whole_file
from fourdfy.types import StepBatch


class LastCheckpoint(pl.Callback):
    """Keeps ``last.ckpt`` fresh: every so many steps, at the end, and when the process is told to stop.

    Of the regular saves every ``keep_every``-th stays, as ``step_{step}.ckpt``; -1: all, 0: none.
    """

    def __init__(self, path: Path, every_n_train_steps: int, keep_every: int = 0) -> None:
        self.path = path
        self.every_n_train_steps, self.keep_every = every_n_train_steps, abs(keep_every)
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

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        if batch.part + 1 < trainer.accumulate_grad_batches:  # half a step can't be gone on from
            return
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
            saves, beside = divmod(trainer.global_step, self.every_n_train_steps)
            if self.keep_every and not beside and saves % self.keep_every == 0:
                with whole_file(self.path.with_name(f"step_{trainer.global_step}.ckpt")) as copy:
                    shutil.copyfile(self.path, copy)

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
