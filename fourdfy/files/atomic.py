"""Atomic writing: a file appears under its name only when it is complete."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from uuid import uuid4

logger = logging.getLogger(__name__)


@contextmanager
def whole_file(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """A temporary path in the same folder (made if missing); renamed to ``path`` on success, else removed.

    With ``sync`` the content is on the disk before the name is: after a power cut it is the old or the new.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # No two writers share a name, whichever machine they are on. The suffix stays last: writers choose
    # the format by it.
    half_written = path.with_name(f".{path.stem}.{uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        yield half_written
        if sync:
            with half_written.open("rb+") as file:
                os.fsync(file.fileno())
        half_written.replace(path)
    finally:
        half_written.unlink(missing_ok=True)


@contextmanager
def by_product(what: str) -> Iterator[None]:
    """A context for optional writing: if it fails, one warning says why, and the run continues."""
    try:
        yield
    except Exception as error:  # of any kind: hours of training are worth more
        warn_once(f"{what} could not be written; the run continues ({type(error).__name__}: {error})")


warn_once = cache(logger.warning)
