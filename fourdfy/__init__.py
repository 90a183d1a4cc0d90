"""fourdfy: text to 4D scenes by hybrid score distillation."""

import os
import tempfile
from pathlib import Path

__version__ = "0.1.0"

# What libraries read when they load.

# OpenMP's threads wait for each other by spinning unless told otherwise, and beside any other busy process
# a step then takes several times as long (docs/benchmarks.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    Path.home()
except RuntimeError:  # a user whom the system doesn't know, as in some containers; caches go there
    os.environ["HOME"] = tempfile.gettempdir()
