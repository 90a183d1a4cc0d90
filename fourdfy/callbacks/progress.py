"""One live line: stage, step, percent, time left, speed, the loss of each kind of step, memory."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.cells import cell_len, set_cell_size

from fourdfy.callbacks.base import Callback, Means, Run
from fourdfy.devices import peak_memory
from fourdfy.terminal import printable, write

REDRAW_SECONDS = {True: 0.5, False: 15.0}
"""On a terminal the line is redrawn in place; in a log a new one is written now and then."""

SHORT_NAMES = {"multi_view": "views", "single_view": "image"}


class ProgressLine(Callback):
    """Writes to stderr; the run's label opens the line."""

    def __init__(self) -> None:
        self._line = LiveLine()
        self._began = self._drawn = 0.0
        self._first_step = 0
        self._means, self._coming = Means({}), Means({})
        self.rate = 0.0
        """Steps per second of the last stage that has ended."""

    def begin(self, run: Run) -> None:
        self._began, self._first_step = time.monotonic(), run.step
        self._line.open()
        self._show(_pieces(run, 0.0, {}))

    def after_step(self, run: Run, *args: Any) -> None:
        if self._is_due() and run.step < run.max_steps:  # the last line is written at the end
            self._show(_pieces(run, self._rate(run), self._latest(run)))

    def after_frames(self, run: Run, batch: Any, *args: Any, done: int, total: int) -> None:
        if not batch.split.startswith("test"):
            return
        self._line.open()
        if self._is_due() or done == total:
            self._show([(0, run.label), (0, f"rendering test views, {100 * done // total}%")])

    def after_test(self, run: Run) -> None:
        self._line.close()

    def end(self, run: Run, error: BaseException | None) -> None:
        if error is None:
            self.rate = self._rate(run)
            self._show(_pieces(run, self.rate, run.means.read()))
        self._line.close()

    def _latest(self, run: Run) -> Means:
        """The newest means that nobody has to wait for."""
        for _ in range(2):  # those that were asked for when the line was last drawn, and those of now
            if self._coming.is_ready:
                self._means, self._coming = self._coming, run.means.read()
        return self._means

    def _rate(self, run: Run) -> float:
        """Steps per second."""
        return (run.step - self._first_step) / max(time.monotonic() - self._began, 1e-6)

    def _is_due(self) -> bool:
        return time.monotonic() - self._drawn >= REDRAW_SECONDS[self._line.is_live]

    def _show(self, pieces: list[tuple[int, str]]) -> None:
        self._drawn = time.monotonic()
        self._line.show(pieces)


class LiveLine:
    """The last row of a terminal, drawn again and again in place; what is logged appears above it.

    If stderr is no terminal, every line that is shown is written at its full length.
    """

    def __init__(self) -> None:
        self.is_live = sys.stderr.isatty()
        self._shown = ""
        self._around = _Call(self._erase), _Call(self._draw)

    def open(self) -> None:
        """Make log records and warnings appear above the line from now on, unless it is open already."""
        if self.is_live and self._around[0] not in logging.root.handlers:
            first, last = self._around
            logging.root.handlers[:] = [first, *logging.root.handlers, last]
            logging.captureWarnings(True)

    def show(self, pieces: list[tuple[int, str]]) -> None:
        """Show texts with their ranks in one row; if it is too narrow, the highest rank is left out first."""
        if self.is_live:
            width = _columns() - 1  # a full row would wrap into another one
            self._shown = set_cell_size(printable(fit(pieces, width)), width)
            self._draw()
        else:
            write(printable(fit(pieces, sys.maxsize)) + "\n")

    def close(self) -> None:
        """Leave the line as it is and continue below it; do nothing if it is closed already."""
        if self._around[0] in logging.root.handlers:
            for handler in self._around:
                logging.root.removeHandler(handler)
            logging.captureWarnings(False)
            write("\n")
            self._shown = ""

    def _draw(self) -> None:
        write(f"\r{self._shown}")

    def _erase(self) -> None:
        write(f"\r{' ' * cell_len(self._shown)}\r")


class _Call(logging.Handler):
    """Calls a function at every record."""

    def __init__(self, function: Callable[[], None]) -> None:
        super().__init__()
        self._function = function

    def emit(self, record: logging.LogRecord) -> None:
        self._function()


def _pieces(run: Run, rate: float, means: Mapping[str, float]) -> list[tuple[int, str]]:
    losses = [
        f"{SHORT_NAMES.get(kind, kind)} {_brief(value)}"
        for name, value in means.items()
        if name.endswith("/total")
        for kind in [name.split("/")[1]]
    ]
    return [
        (0, run.label),
        (0, f"{run.step}/{run.max_steps}"),
        (2, f"{100 * run.step // run.max_steps}%"),
        (0, f"eta {_clock((run.max_steps - run.step) / rate) if rate else '-'}"),
        (0, f"{rate:.2f}/s"),
        *[(1, loss) for loss in losses],
        (3, _memory()),
    ]


def fit(pieces: list[tuple[int, str]], width: int) -> str:
    """The texts in one line; while it is too long, the last of those of the highest rank is left out."""
    kept = list(pieces)
    while cell_len(line := "  ".join(text for _, text in kept if text)) > width and max(kept)[0] > 0:
        rank = max(kept)[0]
        kept.remove([piece for piece in kept if piece[0] == rank][-1])
    return line


def _columns() -> int:
    """Columns of the terminal at stderr; the variable COLUMNS has precedence."""
    try:
        return int(os.environ.get("COLUMNS") or os.get_terminal_size(sys.stderr.fileno()).columns) or 80
    except (OSError, ValueError):
        return 80


def _brief(value: float) -> str:
    return f"{value:.0f}" if 10 <= abs(value) < 1e6 else f"{value:.2g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _memory() -> str:
    """The peak so far; empty if the system doesn't report it."""
    peak = peak_memory()
    return f"{peak / 2**30:.1f} GiB" if peak else ""
