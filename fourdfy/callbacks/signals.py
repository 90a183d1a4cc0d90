"""Signals that ask a run to end: the training step is finished and saved first."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from fourdfy.callbacks.base import Callback, Run

logger = logging.getLogger(__name__)

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGBREAK")
"""Signals that terminals and batch systems send before they kill. Not every platform has all of them."""


class Stopped(SystemExit):
    """A signal ended the run. The exit status is 128 plus its number, as in a shell."""

    code: int


class StopSignals(Callback):
    """Within this context a signal to end raises ``Stopped``; ``advice()`` is then logged.

    As a callback of a training, it lets the current step be finished and saved first: the signal is only
    noted in ``received``, and a second one raises. Signals that are ignored (``nohup``) stay ignored, and
    outside the main thread, where Python allows no handlers, nothing changes.

    Args:
        advice: returns how to continue.
    """

    def __init__(self, advice: Callable[[], str]) -> None:
        self.advice = advice
        self.deferred = False
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def begin(self, run: Run) -> None:
        self.deferred = True

    def after_step(self, run: Run, *args: Any) -> None:
        if self.received is not None:
            run.stop()

    def end(self, run: Run, error: BaseException | None) -> None:
        self.deferred = False
        self.after_step(run)

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, number
        if not (self.deferred and first):
            raise Stopped(128 + number)

    def check(self) -> None:
        """Raise for the signal that was received, if there was one."""
        if self.received is not None:
            raise Stopped(128 + self.received)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, Stopped):
            logger.warning("stopped by %s; %s", signal.Signals(error.code - 128).name, self.advice())
