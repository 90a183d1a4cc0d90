"""Signals that ask a program to stop: one rule, whatever it is doing."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGBREAK")
"""Signals that terminals and batch systems send before they kill. Not every platform has all of them."""

ONE_REQUEST_SECONDS = 0.1
"""Signals this close together are one request: ``timeout`` and some wrappers pass theirs on twice."""

IMPORTING = "<frozen importlib._bootstrap>"

AGAIN_SECONDS = 0.02
"""After which a signal that came while an object was being deleted is sent again."""

PARENT = "FOURDFY_PARENT"
"""The variable that gives a process the number of its parent, with which it is to end."""

PARENT_SECONDS = 1.0
"""Between two looks at the parent."""


class Stopped(SystemExit):
    """A signal ended the program. The exit status is 128 plus its number, as in a shell."""

    code: int


class StopSignals:
    """Within this context a signal to end raises ``Stopped``; ``advice()`` is logged when the context ends.

    While ``deferred`` is set, the signal is only noted in ``received``. A second Ctrl-C ends the process
    at once, and so does any signal during an import. Signals that are ignored (``nohup``) stay ignored, and
    outside the main thread, where Python allows no handlers, nothing changes.

    Args:
        advice: returns how to continue; may be replaced.

    Raises:
        Stopped: also at the end of the context, if a library caught the first one.
    """

    def __init__(self, advice: Callable[[], str]) -> None:
        self.advice = advice
        self.deferred = False
        self.received: int | None = None
        self._received_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if _is_within(frame, name="__del__"):  # Python ignores what is raised there, with a traceback
            threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), number)).start()
            return
        now, name = time.monotonic(), signal.Signals(number).name
        if self.received is None:
            self.received, self._received_at = number, now
            if self.deferred:
                _say(f"\n{name}: stopping; Ctrl-C quits at once")
        elif now - self._received_at < ONE_REQUEST_SECONDS:
            return
        elif number == signal.SIGINT:
            self._quit(number, "\nquit at once")
        if self.deferred:
            return
        # What is half imported breaks the rest, and some modules catch everything.
        if _is_within(frame, file=IMPORTING):
            self._quit(number, f"stopped by {name}")
        raise Stopped(128 + number)

    def _quit(self, number: int, what: str) -> None:
        """End the process without any cleaning up: nothing of ours needs it, as it may be killed anyway."""
        _say(f"{what}; {self.advice()}")
        os._exit(128 + number)

    def check(self) -> None:
        """Raise for the signal that was received, if there was one."""
        if self.received is not None:
            raise Stopped(128 + self.received)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self.received is not None:
            logger.warning("stopped by %s; %s", signal.Signals(self.received).name, self.advice())
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if error is None:
            self.check()


def stop_with_parent() -> None:
    """If ``PARENT`` names the parent, have its end stop this process, as SIGTERM does."""
    parent = os.environ.pop(PARENT, None)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(PARENT_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def _is_within(frame: FrameType | None, *, name: str = "", file: str = "") -> bool:
    """Whether a function of that name, or of that file, is being executed."""
    while frame is not None and frame.f_code.co_name != name and frame.f_code.co_filename != file:
        frame = frame.f_back
    return frame is not None


def _say(text: str) -> None:
    """Write a line to stderr from a handler, which may have interrupted a write of Python's own."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())
