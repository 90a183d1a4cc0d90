"""What a terminal is shown: text from configs, prompts and files can't act on it."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress


def printable(text: str) -> str:
    """``text`` with its control characters escaped, line breaks too."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """``text`` with its control characters escaped, but for line breaks."""
    return "\n".join(map(printable, text.split("\n")))


def say(text: str) -> None:
    """Write to stderr, control characters escaped; do nothing if that can't be done."""
    write(printable_lines(text))


def write(text: str) -> None:
    """Write to stderr as it is; do nothing if that can't be done."""
    with suppress(OSError, ValueError):  # nobody reads the pipe any more, the disk is full, it was closed
        sys.stderr.write(text)
        sys.stderr.flush()


def open_streams() -> None:
    """Send to nowhere what is written to a stream that the process was started without."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115


def log_to_stderr() -> None:
    """Show what is logged, with control characters escaped, unless a program has its own handlers."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class PrintableFormatter(logging.Formatter):
    """A record's message, with its control characters escaped."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))
