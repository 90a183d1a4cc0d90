"""fourdfy: text to 4D scenes by hybrid score distillation."""

import os
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# Libraries read these settings when they are imported.

# OpenMP's threads wait for each other by spinning unless told otherwise, and beside any other busy process
# a step then takes several times as long (docs/benchmarks.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    Path.home()
except RuntimeError:  # a user unknown to the system, as in some containers; caches go there
    os.environ["HOME"] = tempfile.gettempdir()


def __getattr__(name: str) -> Any:
    """``train`` and ``load``, imported when they are first asked for: PyTorch takes seconds."""
    if name in ("train", "load"):
        return getattr(import_module("fourdfy.launching.train"), name)
    raise AttributeError(f"module 'fourdfy' has no attribute {name!r}")
