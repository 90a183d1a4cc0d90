"""``ckpts/last.ckpt``, kept fresh."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from fourdfy.files.atomic import whole_file
from fourdfy.launching.signals import StopSignals
from fourdfy.types import StepBatch


class LastCheckpoint(pl.Callback):
    """Keeps ``last.ckpt`` fresh: every so many steps, at the end, and when the run is asked to stop.

    Of the regular saves every ``keep_every``-th stays, as ``step_{step}.ckpt``; -1: all, 0: none.
    """

    def __init__(self, path: Path, every_n_train_steps: int, stop: StopSignals, keep_every: int = 0) -> None:
        self.path = path
        self.every_n_train_steps, self.keep_every = every_n_train_steps, abs(keep_every)
        self._stop = stop
        self._saved_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step = trainer.global_step
        self._stop.install()  # over Lightning's, which would end the process without a checkpoint
        self._stop.deferred = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        if batch.part + 1 < trainer.accumulate_grad_batches:  # half a step can't be gone on from
            return
        stop = self._stop.received is not None
        if stop or trainer.global_step % self.every_n_train_steps == 0:
            self._save(trainer)
        trainer.should_stop |= stop

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)
        self._stop.deferred = False

    def _save(self, trainer: pl.Trainer) -> None:
        if self._saved_step != trainer.global_step:
            trainer.save_checkpoint(self.path, weights_only=False)  # the optimizer too
            self._saved_step = trainer.global_step
            saves, beside = divmod(trainer.global_step, self.every_n_train_steps)
            if self.keep_every and not beside and saves % self.keep_every == 0:
                with whole_file(self.path.with_name(f"step_{trainer.global_step}.ckpt")) as copy:
                    shutil.copyfile(self.path, copy)
