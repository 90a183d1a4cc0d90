"""Files that appear under their name when they are whole, never before."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder (made if missing); renamed to ``path`` on success, else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: writers choose the format by it.
    half_written = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield half_written
        half_written.replace(path)
    finally:
        half_written.unlink(missing_ok=True)


@contextmanager
def by_product(what: str) -> Iterator[None]:
    """Writing that a run can do without: where it fails, one warning says why, and the run goes on."""
    try:
        yield
    except Exception as error:  # whatever it is, hours of training are worth more
        warn_once(f"{what} could not be written; the run goes on ({type(error).__name__}: {error})")


warn_once = cache(logger.warning)
