"""Saving of ``ckpts/last.ckpt`` during training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fourdfy.callbacks.base import Callback, Run
from fourdfy.files.atomic import by_product, whole_file
from fourdfy.systems.base import DoesNotFit


class LastCheckpoint(Callback):
    """Saves ``last.ckpt`` every so many steps, at the end, and when the run is asked to stop
    or has too little memory for a step.

    Every ``keep_every``-th regular save is also kept as ``step_{step}.ckpt``; -1 keeps all, 0 none.
    """

    is_essential = True

    def __init__(self, path: Path, every_n_train_steps: int, keep_every: int = 0) -> None:
        self.path = path
        self.every_n_train_steps, self.keep_every = every_n_train_steps, abs(keep_every)
        self._saved_step = -1

    def begin(self, run: Run) -> None:
        self._saved_step = run.step

    def after_step(self, run: Run, *args: Any) -> None:
        if run.stopping or run.step % self.every_n_train_steps == 0:
            self._save(run)

    def end(self, run: Run, error: BaseException | None) -> None:
        if error is None or isinstance(error, DoesNotFit):
            self._save(run)

    def _save(self, run: Run) -> None:
        if self._saved_step != run.step:
            run.save(self.path)
            self._saved_step = run.step
            saves, beside = divmod(run.step, self.every_n_train_steps)
            if self.keep_every and not beside and saves % self.keep_every == 0:
                kept = self.path.with_name(f"step_{run.step}.ckpt")
                with by_product(str(kept)), whole_file(kept) as copy:
                    shutil.copyfile(self.path, copy)
