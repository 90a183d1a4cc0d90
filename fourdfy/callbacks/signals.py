"""What a run does before it stops at a signal."""

from __future__ import annotations

from typing import Any

from fourdfy.callbacks.base import Callback, Run
from fourdfy.data.base import EvalBatch
from fourdfy.ops.ranks import largest
from fourdfy.signals import StopSignals


class FinishStep(Callback):
    """Lets a training step, or the view of a validation, be finished at a signal; then the run is saved.

    Nothing else needs to be finished: what is rendered after training can be rendered again. A signal to one
    rank is one to all.
    """

    on_all_ranks = True

    def __init__(self, stop: StopSignals) -> None:
        self.stop = stop

    def begin(self, run: Run) -> None:
        self.stop.check()
        self.stop.deferred = True
        run.is_asked_to_stop = lambda: self.stop.received is not None

    def after_step(self, run: Run, *args: Any) -> None:
        (received,) = largest([self.stop.received or 0])
        if received:  # else one that came meanwhile is known to all after the next step
            self.stop.received = received
            run.stop()

    def after_frames(self, run: Run, batch: EvalBatch, *args: Any, done: int, total: int) -> None:
        if batch.split.startswith("test"):
            self.stop.deferred = False  # only now: the last checkpoint is written after ``end``
        if self.stop.deferred:
            self._stop_if_asked(run)
        elif not run.stopping:
            self.stop.check()

    def end(self, run: Run, error: BaseException | None) -> None:
        self._stop_if_asked(run)

    def _stop_if_asked(self, run: Run) -> None:
        if self.stop.received is not None:
            run.stop()
